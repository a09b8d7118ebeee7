"""The soak: random faults over small trainings of real processes. No worker may hang, and none may resume wrongly.

python experiments/faults/run.py                            (200 faults)
python experiments/faults/run.py size=sample out=runs/faults
python experiments/faults/run.py number=20 seed=1 out=runs/faults
python experiments/faults/run.py join=[runs/a/faults.jsonl,runs/b/faults.jsonl]   (records of different seeds, as one)

After every fault it checks the end of each worker and the processes and files that are left, and resumes from the last
checkpoint to compare the weights, bit for bit, with those of a training without a fault. Prints a table, and writes
faults.jsonl and faults.png. Ends with exit code 1 if anything was found. Needs Linux.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: the workers are forks of this process, which must have one thread
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.faults import tables
from experiments.faults.cases import SAMPLE, Case, draw
from experiments.faults.continuation import Unbroken, check_resuming, look, lost_steps, train_unbroken
from experiments.faults.training import Settings
from experiments.faults.verdict import findings, survived
from experiments.faults.workers import run_training
from experiments.harness import cli
from experiments.harness.record import hiding, read_record, write_record
from experiments.harness.settings import option
from experiments.harness.tables import show


@dataclass(kw_only=True)
class Options(cli.Command):
    out: str = option(str(tables.RESULTS), "folder of the result file", sample="runs/faults", smoke="runs/faults")
    minutes: float = option(60.0, "no fault is started later", above=0)
    cases: str = option(
        "random",
        "random: every kind at every place; sample: selected ones",
        choices=("random", "sample"),
        sample="sample",
        smoke="sample",
    )
    number: int = option(200, "faults", least=1, sample=10, smoke=2)
    seed: int = option(0, "seed of the random faults", least=0)
    timeout_seconds: float = option(
        20.0, "timeout= of the strategy; must exceed the slowest worker's lag in a round", above=0
    )
    silence_seconds: float = option(3.0, "silence= of the strategy; must exceed the slowest local step", above=0)
    limit_seconds: float = option(
        35.0, "from a fault to the end of the last survivor; a process that still runs then counts as hanging", above=0
    )
    launch_seconds: float = option(
        40.0,
        "added to limit_seconds and timeout_seconds where a launcher starts the workers, one after another",
        above=0,
    )
    join: list[str] = option([], "result files to join instead of running", empty=True)


class Soak:
    """Runs cases one after another: two at a time would disturb each other's seconds."""

    def __init__(self, cfg: Options, folder: Path) -> None:
        self.cfg, self.folder = cfg, folder
        self._unbroken: dict[tuple[str, int], Unbroken] = {}

    def run(self, case: Case) -> dict[str, Any]:
        """Inject the fault, check what is left, resume; returns the row of the record."""
        unbroken, settings = self.unbroken(case), self.settings(case)
        folder = Path(tempfile.mkdtemp(dir=self.folder)) / "run"
        limit = self.cfg.limit_seconds + self.cfg.launch_seconds * (case.launcher != "forked")
        ended = run_training(settings, folder, case.launcher, limit=limit)
        left = look(folder, unbroken)
        resumed = check_resuming(settings, folder, left, unbroken) if left.last is not None else None
        hide = hiding(folder)
        found = [hide(finding) for finding in findings(case, ended, left, resumed)]
        errors = [error and {"type": error["type"], "text": hide(error["text"])} for error in ended.errors]
        shutil.rmtree(folder.parent)  # a soak of hundreds would fill the disk
        seconds = None
        if ended.struck is not None and ended.survived_until is not None and not survived(case, ended):
            seconds = round(max(ended.survived_until - ended.struck["at"], 0.0), 3)
        return {
            **asdict(case.fault),
            **asdict(case),
            "fault": str(case.fault),
            "ends": ended.ends,
            "errors": errors,
            "seconds": seconds,
            "thawed": ended.thawed,
            "left_over": len(ended.left_over),
            "half_written": len(left.half_written),
            "temporary": left.temporary,
            "resumed_from": left.last,
            "lost_steps": lost_steps(ended.struck["steps"], left) if ended.struck is not None else None,
            "findings": found,
        }

    def unbroken(self, case: Case) -> Unbroken:
        """The same training without a fault; made once."""
        key = (case.face, case.workers)
        if key not in self._unbroken:
            settings = self.settings(Case(case.fault, *key))
            clean = Settings(settings.face, settings.workers, settings.timeout, settings.silence)
            self._unbroken[key] = train_unbroken(clean, self.folder / f"{case.face}-{case.workers}")
        return self._unbroken[key]

    def settings(self, case: Case) -> Settings:
        """The training that a case strikes."""
        timeout = self.cfg.timeout_seconds + self.cfg.launch_seconds * (case.launcher != "forked")
        return Settings(case.face, case.workers, timeout, self.cfg.silence_seconds, case.fault)


def soak(options: Options) -> dict[str, Any]:
    """Run the cases; returns the record."""
    cases = draw(options.number, options.seed) if options.cases == "random" else list(SAMPLE[: options.number])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts in the background
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # and leave no worker behind
    rows, start = [], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        soak = Soak(options, Path(folder))
        for number, case in enumerate(cases, 1):
            if time.monotonic() - start > 60 * options.minutes:
                print(f"stopped after {options.minutes:g} minutes, as set", flush=True)
                break
            rows.append(soak.run(case))
            print(f"{number}/{len(cases)} {tables.line(rows[-1])}", flush=True)
    settings = {key: value for key, value in asdict(options).items() if key not in ("out", "size", "join")}
    return {"settings": settings, "seconds": round(time.monotonic() - start), "rows": rows}


def run(_: Sequence[str], options: Options) -> int:
    """Run or join, write, and tell by the exit code whether anything was found."""
    content = tables.joined([read_record(Path(path)) for path in options.join]) if options.join else soak(options)
    out = Path(options.out)
    machine = content.pop("machine", {})  # of joined records
    write_record(out / "faults.jsonl", content, **machine)
    show(out, {"faults": (tables.faults_by_kind,)}, ["faults"])
    # Only now: the workers of the soak are forks of this process, and have no use for matplotlib.
    from experiments.faults.figure import draw_seconds

    print(f"wrote {draw_seconds(out / 'faults.png', content)}")
    return int(any(row["findings"] for row in content["rows"]))


if __name__ == "__main__":
    sys.exit(cli.run(run, Options, __doc__))
