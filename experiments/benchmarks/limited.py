"""Does a network train whose weights, gradients and momentum are ten times the memory limit of a worker?

python experiments/benchmarks/limited.py                         (sixteen processes, some minutes; as root)
python experiments/benchmarks/limited.py size=smoke out=FOLDER   (to see that it works)

The network of phases.py, each worker in a control group with a memory limit: three times its part, a block, and
Python's own memory; for the first worker also the weights of the full model, and its part once more. It trains,
evaluates, saves, and resumes from its checkpoint. Then the same with ResIST, where the network is built in the
constructor; with DDP and with one process, which get the first worker's limit. The kernel kills processes above it.
Writes experiments/benchmarks/results/limited.jsonl.
"""

from __future__ import annotations

import gc
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from torch.multiprocessing import ProcessExitedException

from experiments.benchmarks import phases, tables
from experiments.harness import cli
from experiments.harness.memory_limit import MemoryGroup, memory_groups
from experiments.harness.record import write_record
from experiments.harness.settings import option
from experiments.harness.tables import show_and_write
from experiments.harness.workers import forked

PYTHON = 60_000_000  # private memory of a process beside tensors

METHODS = ("resist_late", "resist", "ddp", "single")


@dataclass(kw_only=True)
class Options(cli.Command):
    out: str = option(str(tables.RESULTS), "folder of the result file", smoke="runs/benchmarks")
    methods: list[str] = option(list(METHODS), "tried", choices=METHODS, smoke=["resist_late"])
    workers: int = option(16, "processes of ResIST", least=2, smoke=2)
    width: int = option(1024, "width of the network", least=8, smoke=256)
    blocks: int = option(64, "number of residual MLPs, a multiple of workers", least=2, smoke=8)


def work(worker: int, task: tuple[str, int, int, str, list[MemoryGroup]]) -> dict[str, Any]:
    """A worker, in its group; notes its phase in a file, as it may be killed."""
    *sizes, folder, groups = task
    groups[min(worker, len(groups) - 1)].join()
    note = Path(folder) / f"{worker}.phase"
    return phases.measure(worker, (*sizes, folder), inputs=1, on_phase=note.write_text)  # type: ignore[arg-type]


def run_limited(method: str, workers: int, options: Options, limits: Sequence[int]) -> dict[str, Any]:
    """Train under limits: the first worker's, and that of each other one."""
    gc.collect()
    gc.freeze()  # else each worker's collector would write into all pages that they share
    with tempfile.TemporaryDirectory() as folder, memory_groups(limits) as groups:
        row: dict[str, Any] = {"method": method, "workers": workers, "limits": [limits[0], limits[-1]]}
        try:
            forked(work, (method, options.width, options.blocks, folder, groups), workers)
        except ProcessExitedException as error:
            phase = (Path(folder) / f"{error.error_index}.phase").read_text()
            row["killed"] = {"worker": error.error_index, "phase": phase}
    return row


def run(_: Sequence[str], options: Options) -> None:
    shared, block = phases.sizes(options.width, inputs=1)
    part, full = shared + options.blocks // options.workers * block, shared + options.blocks * block
    limit = 3 * part + block + PYTHON
    first = limit + full + part
    rows = []
    for method in options.methods:
        workers = {"ddp": 2, "single": 1}.get(method, options.workers)
        limits = [first, *[limit if method.startswith("resist") else first] * (workers - 1)]
        rows.append(run_limited(method, workers, options, limits))
        print(f"tried: {method}, {workers} workers", flush=True)
    out = Path(options.out)
    settings = {"width": options.width, "blocks": options.blocks}
    write_record(out / "limited.jsonl", {"settings": settings, "state_bytes": 3 * full, "rows": rows})
    show_and_write(out, tables.RESULTS, tables.STUDIES, ["limited"], [])


if __name__ == "__main__":
    sys.exit(cli.run(run, Options, __doc__))
