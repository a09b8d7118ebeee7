"""Measurements that need a GPU: contracts over NCCL, memory, step times, faults, and accuracy. At most nine minutes.

python experiments/gpu/run.py folder=PATH                  (all parts, on the first GPU; PATH: train/<class>/*, test/<class>/*)
python experiments/gpu/run.py contracts steps              (some of them; a second call resumes)
python experiments/gpu/run.py size=smoke out=FOLDER        (seconds, on the CPU)

Parts: probes contracts memory steps faults accuracy. Options are key=value: see `Options`. Every case is a process of its
own with a limit; a result is written as soon as it is there (results/PART.jsonl), also that a case failed or was killed.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

# Before torch: cases are forks of this process, which must have one thread, and must not look at the GPU by CUDA.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this machine, whatever its name resolves to
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.gpu import accuracy, contracts, faults, hardware, memory, steps, tables
from experiments.gpu.cases import METHODS, MODES, PARTS, Allowance, Case, Probe, chosen_backend, chosen_parts
from experiments.gpu.limits import measured
from experiments.harness import cli
from experiments.harness.settings import ConfigError, Failure, option
from experiments.harness.study import Study
from experiments.harness.tables import show_and_write

NINE_MINUTES = 540
LOOK_SECONDS = 60.0  # for the first use of the GPU
KINDS = ("kill", "freeze", "raise_error")


@dataclass(kw_only=True)
class Options(cli.Command):
    out: str = option(str(tables.RESULTS), "folder of the result files")
    seconds: float = option(520, "time limit of the whole command, in seconds", above=0, smoke=85)
    fresh: bool = option(False, "true measures existing results again")
    ranks: list[int] = option([2, 4], "numbers of ranks that share the device", least=2, most=8, smoke=[2])
    methods: list[str] = option(list(METHODS), "methods whose contracts are checked", choices=METHODS)
    width: float = option(1.0, "width of the networks; 1.0 is the paper's", above=0, smoke=0.0625)
    pixels: int = option(32, "height and width of the synthetic images", least=8, smoke=8)
    batch: int = option(128, "images per rank and local step", least=1, smoke=4)
    modes: list[str] = option(
        list(MODES), "modes whose step times are measured", choices=MODES, smoke=[MODES[0], MODES[-1]]
    )
    steps: int = option(10, "local steps timed together", least=1, smoke=2)
    turns: int = option(5, "repetitions of the step times", least=1, smoke=2)
    compiler: str = option("inductor", "backend of torch.compile for compiled blocks", smoke="eager")
    backends: list[str] = option(
        ["gloo", "nccl"], "backends of the fault cases", choices=("gloo", "nccl"), smoke=["gloo"]
    )
    kinds: list[str] = option(list(KINDS), "kinds of faults", choices=KINDS, smoke=["kill"])
    data: str = option("folder", "data of the accuracy cases", choices=("folder", "digits"), smoke="digits")
    folder: str | None = option(None, "folder=PATH with train/<class>/* and test/<class>/*; null: no accuracy cases")
    cache_dir: str = option("runs/cache", "folder for decoded images")
    depth: int = option(101, "depth of the network whose accuracy is measured", choices=(38, 101, 152, 200), smoke=38)
    training_seconds: float = option(30, "seconds of each training of the accuracy cases", above=0, smoke=1.5)


# Options that a result depends on, besides the case.
RECORDED = {
    "contracts": ("width", "pixels", "batch"),
    "memory": ("width", "pixels", "batch"),
    "steps": ("width", "pixels", "batch", "steps", "turns", "compiler"),
    "accuracy": ("width", "batch", "data", "depth", "training_seconds"),
}


@dataclass
class Script:
    """A call of the command."""

    options: Options
    machine: dict[str, Any]  # as `hardware.look` found it
    began: float

    @property
    def device(self) -> str:
        return "cuda:0" if self.machine["device"] == "cuda" else "cpu"

    def study(self, name: str) -> Study:
        """The rows measured of a part; cases that were not done are tried again."""
        settings = {"device": self.machine["device"], "gpu": self.machine["gpu"]}
        settings |= self.options.take(*RECORDED.get(name, ()))
        study = Study.at(Path(self.options.out) / f"{name}.jsonl", settings, fresh=self.options.fresh)
        study.machine = {key: value for key, value in self.machine.items() if key != "device"}
        study.rows = [row for row in study.rows if row["outcome"] == "done"]
        return study

    def measure(self, name: str, works: Callable[[Probe], bool]) -> Study:
        """Measure the missing cases of a part."""
        part, study, began = PARTS[name], self.study(name), time.monotonic()
        study.path.parent.mkdir(parents=True, exist_ok=True)

        def allowed() -> Allowance:
            now = time.monotonic()
            left = self.options.seconds - (now - self.began)
            return Allowance(part.seconds_of_a_case, part.seconds - (now - began), left)

        missing = study.missing(part.cases(self.options))
        work = partial(self.work, works=works)
        for case, row in measured(missing, work, allowed, part.together):
            study.add(case, row)
            print(f"{name}: {case.name}: {row['outcome']} in {row['seconds']:.0f} s {row['reason'] or ''}", flush=True)
        return study

    def work(self, case: Any, works: Callable[[Probe], bool]) -> dict[str, Any]:
        """Measure one case, in its process."""
        options = self.options
        sizes = options.take("width", "pixels", "batch")
        match case:
            case Probe():
                return hardware.probe(case, self.machine["device"])
            case contracts.Contract():
                backend, classic = chosen_backend(self.machine["device"], case.ranks, works)
                # Double precision is slow: a quarter of the width, and of the batch.
                small = {
                    "width": max(options.width / 4, 1 / 16),
                    "batch": max(4, options.batch // 4),
                    "pixels": options.pixels,
                }
                return contracts.compared(contracts.Task(case, self.device, backend, **small), classic=classic)
            case memory.Memory():
                return memory.measure(memory.Task(case, self.device, **sizes))
            case steps.Steps():
                more = options.take("steps", "turns", "compiler")
                return steps.measure(steps.Task(case, self.device, **sizes, **more))
            case faults.Struck():
                backend, classic = chosen_backend(self.machine["device"], faults.WORKERS, works)
                return faults.strike(case, self.device, backend, classic=classic)
            case _:
                more = options.take("depth", "width", "folder", "cache_dir", "batch", "data")
                return accuracy.measure(accuracy.Task(case, self.device, options.training_seconds, **more))


def run(names: Sequence[str], options: Options) -> int:
    """Measure, show, and tell by the exit code whether a case failed, was killed, or broke a contract."""
    began = time.monotonic()
    script = Script(options, look(), began)
    if script.device == "cpu" and options.size == "full":
        raise ConfigError("no GPU can be used, but size=full needs one: set size=smoke out=FOLDER")
    done: dict[str, Study] = {}

    def works(probe: Probe) -> bool:
        row = done["probes"].row_of(probe)
        return row is not None and row["outcome"] == "done"

    for name in chosen_parts(names):
        done[name] = script.measure(name, works)
    show_and_write(Path(options.out), tables.RESULTS, tables.STUDIES, done, [])
    print(f"{time.monotonic() - began:.0f} s")
    # A probe may fail: that is its purpose.
    return int(any(is_bad(row) for name, study in done.items() if name != "probes" for row in study.rows))


def is_bad(row: dict[str, Any]) -> bool:
    """Whether a row needs attention."""
    return row["outcome"] in ("failed", "killed") or bool(row.get("broken")) or bool(row.get("findings"))


@dataclass(frozen=True)
class Look(Case):
    """The first use of the GPU."""


def look() -> dict[str, Any]:
    """The GPU and the versions of this machine."""
    ((_, row),) = measured([Look()], hardware.look, lambda: Allowance(LOOK_SECONDS, LOOK_SECONDS, LOOK_SECONDS), 1)
    if row["outcome"] != "done":
        raise Failure(f"the GPU cannot be used: {row['reason']}")
    return {key: value for key, value in row.items() if key not in ("outcome", "reason", "seconds")}


if __name__ == "__main__":
    sys.exit(cli.run(run, Options, __doc__, list(PARTS)))
