"""Worker processes: the group of a distributed training, and independent ones that share out cases."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import multiprocessing as torch_processes

from experiments.harness.links.namespaces import free_port

Program: TypeAlias = Callable[[int, Any], Any]
Variables: TypeAlias = Callable[[int], Mapping[str, str]]
PATIENCE = timedelta(seconds=120)


def forked(
    program: Program, task: Any, workers: int, *, grouped: bool = True, variables: Variables = lambda worker: {}
) -> list[Any]:
    """Run ``program(worker, task)`` in so many processes, of one thread each; returns their results.

    Forked, so that not every worker imports torch anew: call this before anything is computed here.

    Args:
        program: of each process; its result must fit into JSON.
        task: its second argument.
        workers: number of workers.
        grouped: whether they are in a gloo group when the program begins; else it finds the variables of torchrun.
        variables: more variables of a worker's environment.
    """
    with tempfile.TemporaryDirectory(prefix="forked_") as folder:
        port = free_port()
        ranks = {"WORLD_SIZE": str(workers), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

        def environment(worker: int) -> dict[str, str]:
            return {**ranks, "RANK": str(worker), "LOCAL_RANK": str(worker), **variables(worker)}

        begin = _in_group if grouped else _write
        arguments = (environment, begin, program, task, workers, folder)
        torch_processes.start_processes(_work, arguments, nprocs=workers, daemon=True, start_method="fork")
        return [json.loads((Path(folder) / f"{worker}.json").read_text()) for worker in range(workers)]


def _work(worker: int, environment: Variables, begin: Callable[..., None], *arguments: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(environment(worker))
    rank_zero_only.rank = worker  # as if Lightning had been imported with these variables
    begin(worker, *arguments)


def _in_group(worker: int, program: Program, task: Any, workers: int, folder: str) -> None:
    place = f"file://{folder}/rendezvous"  # no port that another process could take
    dist.init_process_group("gloo", init_method=place, rank=worker, world_size=workers, timeout=PATIENCE)
    try:
        _write(worker, program, task, workers, folder)
        dist.barrier()  # a worker that leaves early closes connections that others still need
    finally:
        dist.destroy_process_group()


def _write(worker: int, program: Program, task: Any, _: int, folder: str) -> None:
    (Path(folder) / f"{worker}.json").write_text(json.dumps(program(worker, task)))


def each(cases: Sequence[Any], work: Callable[[Any], Any], jobs: int) -> Iterator[tuple[Any, Any]]:
    """Do some work for every case, ``jobs`` at a time; gives each result as soon as it is there.

    Stopped in the middle (an exception, Ctrl-C, SIGTERM), the processes are ended before the error is raised.
    """
    if min(jobs, len(cases)) < 2:  # in this process: a second one would import torch anew
        torch.set_num_threads(1)
        yield from ((case, work(case)) for case in cases)
        return
    # An exception, so that the processes below are ended before this one.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    context = multiprocessing.get_context("spawn")  # this process may have computed, and have threads
    executor = ProcessPoolExecutor(min(jobs, len(cases)), mp_context=context, initializer=_begin)
    known = set(multiprocessing.active_children())
    finished = False
    try:
        futures = {executor.submit(work, case): case for case in cases}
        for future in as_completed(futures):
            yield futures[future], future.result()
        finished = True
    finally:
        if not finished:
            executor.shutdown(wait=False, cancel_futures=True)
            for child in set(multiprocessing.active_children()) - known:
                child.terminate()
        executor.shutdown(wait=True, cancel_futures=True)
        signal.signal(signal.SIGTERM, before)


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and ends us
    torch.set_num_threads(1)
