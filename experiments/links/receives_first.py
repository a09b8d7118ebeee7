"""The gain of receives posted before sends, with two workers that send each other a buffer at once.

python experiments/links/receives_first.py megabytes=37.8 bandwidth_gbit=0.1

Prints a table and writes receives_first.jsonl (docs/decisions/0004-receives-first.md). Needs root and iproute2.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from torch import Tensor

from experiments.harness import cli
from experiments.harness.links.namespaces import kernel, namespaces, why_no_namespaces
from experiments.harness.links.workers import Place, linked_workers
from experiments.harness.record import write_record
from experiments.harness.settings import ConfigError, option
from experiments.harness.tables import show
from experiments.links import tables
from experiments.links.rig import LEAST_GBIT, MOST_GBIT
from resist_lightning.comm.torch_collective import GroupCollective

Way = Callable[[Tensor, Tensor, int], None]


@dataclass(kw_only=True)
class Options(cli.Command):
    out: str = option(str(tables.RESULTS), "folder of the result file")
    megabytes: float = option(37.8, "each way; 37.8 is a hand-over of the paper's network", above=0, most=4000)
    bandwidth_gbit: float = option(0.1, "0.1 is a link of 100 Mbit/s", least=LEAST_GBIT, most=MOST_GBIT)
    repeats: int = option(3, "repetitions of each way, interleaved", least=1)
    timeout_seconds: float = option(300.0, "limit for the whole exchange", above=0)


def sends_first(out: Tensor, into: Tensor, peer: int) -> None:
    _batch([dist.P2POp(dist.isend, out, peer), dist.P2POp(dist.irecv, into, peer)])


def receives_first(out: Tensor, into: Tensor, peer: int) -> None:
    _batch([dist.P2POp(dist.irecv, into, peer), dist.P2POp(dist.isend, out, peer)])


def all_to_all_single(out: Tensor, into: Tensor, peer: int) -> None:
    own, other = [0, out.numel()], [0, into.numel()]
    if peer == 0:
        own, other = own[::-1], other[::-1]
    dist.all_to_all_single(into, out, other, own)


def ours(out: Tensor, into: Tensor, peer: int) -> None:
    GroupCollective().exchange({peer: [out]}, {peer: [into]}, {"hand_over": out.nbytes})


def _batch(operations: list[dist.P2POp]) -> None:
    for work in dist.batch_isend_irecv(operations):
        work.wait()


WAYS: dict[str, Way] = {way.__name__: way for way in (sends_first, receives_first, all_to_all_single, ours)}


def main(place: Place, settings: dict[str, Any]) -> None:
    """A worker: exchanges flat buffers with its neighbour, in all ways."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    numbers = round(settings["megabytes"] * 1e6 / 4)
    out = torch.full((numbers,), float(place.worker))
    into = torch.empty(numbers)
    peer = 1 - place.worker
    for way in WAYS.values():  # connections are made, pages are touched
        way(out[:1000], into[:1000], peer)
    place.ready()
    found: dict[str, list[float]] = {}
    for _ in range(settings["repeats"]):
        for name, way in WAYS.items():
            into.fill_(-1)  # old values must not look like those that arrive now
            dist.barrier()
            start = time.perf_counter()
            way(out, into, peer)
            found.setdefault(name, []).append(time.perf_counter() - start)
            assert bool((into == peer).all()), f"{name}: something else arrived"
    place.measured()
    place.report({"payload_bytes": out.nbytes, "seconds": found})
    dist.barrier()
    dist.destroy_process_group()


def run(_: Sequence[str], options: Options) -> None:
    if missing := why_no_namespaces():
        raise ConfigError(f"{missing}: the exchange needs a shaped link, so root and iproute2")
    settings = options.take("megabytes", "repeats", "bandwidth_gbit")
    with namespaces(2) as network, linked_workers(network, "experiments.links.receives_first") as workers:
        told = workers.run(settings, gbit=options.bandwidth_gbit, timeout=options.timeout_seconds)["workers"]
    payload = told[0]["payload_bytes"]
    seconds = {}
    for name in WAYS:
        both = zip(*(one["seconds"][name] for one in told), strict=True)
        seconds[name] = [max(pair) for pair in both]
    ideal = payload * 8 / options.bandwidth_gbit / 1e9
    content = {"settings": settings, "payload_bytes": payload, "ideal_seconds": ideal, "seconds": seconds}
    write_record(Path(options.out) / "receives_first.jsonl", content, **kernel())
    show(Path(options.out), {"receives_first": (tables.receives_first,)}, ["receives_first"])


if __name__ == "__main__":
    sys.exit(cli.run(run, Options, __doc__))
