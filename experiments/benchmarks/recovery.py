"""The cost of losing little when workers die: snapshots, checkpoints in mid-round, resuming, and the watchdog.

python experiments/benchmarks/recovery.py
python experiments/benchmarks/recovery.py size=smoke out=FOLDER files=FOLDER

The paper's network of 41 million parameters, SGD with momentum, real processes over loopback, one thread each;
Lightning's DDP trains the same network in the same run. Files are flushed to the disk by this package and not by
Lightning, and are in the page cache when they are read. The added time of a local step is measured on a tiny network:
stretches with and without the watch and the notes, interleaved; each turn's means over all steps and workers (the
median step hides costs that occur once a second). Prints tables and writes
experiments/benchmarks/results/recovery.jsonl.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, Strategy

from experiments.benchmarks import tables
from experiments.benchmarks.steps import Clock, gathered, images, quiet
from experiments.harness import cli
from experiments.harness.record import write_record
from experiments.harness.settings import option
from experiments.harness.tables import show
from experiments.harness.workers import forked
from experiments.trainers import Module, quiet_trainer
from resist_lightning import ResISTStrategy
from resist_lightning.models import PreActResNet
from resist_lightning.strategies.launching.guard import Guard
from resist_lightning.strategies.saving.data_position import Position

PAPER_STEPS = 50
TINY = {"sections": (1, 1, 3, 1), "width": 1 / 64, "batch": 1, "image": 16}
SAVED_AT = 2  # local steps of the first round after which checkpoints are written: in the middle of the round


@dataclass(kw_only=True)
class Options(cli.Command):
    out: str = option(str(tables.RESULTS), "folder of the result file", smoke="runs/benchmarks")
    files: str | None = option(None, "folder for the files, which are kept; null: a temporary folder")
    workers: int = option(2, "processes", least=2)
    sections: list[int] = option([3, 4, 23, 3], "blocks", least=1, repeats=True, smoke=[1, 2, 5, 3])
    width: float = option(1.0, "1.0 is the paper's", above=0, smoke=1 / 32)
    batch: int = option(2, "images", least=1)
    rounds: int = option(8, "rounds with snapshots", least=2, smoke=3)
    local_steps: int = option(3, "per round", least=2)
    every: list[int] = option([1, 10], "rounds between two snapshots", least=1, smoke=[1, 2])
    saves: int = option(4, "checkpoints", least=1, smoke=2)
    resumes: int = option(3, "resumes of each kind", least=1, smoke=1)
    turns: int = option(9, "repetitions that measure the added time", least=1, smoke=1)
    steps: int = option(1000, "local steps of each repetition", least=20, smoke=20)


class Measured(ResISTStrategy):
    """Notes seconds and bytes of each snapshot, keeps the newest file, and notes whether a run resumes exactly."""

    def __init__(self, kept: Path | None = None, **options: Any) -> None:
        super().__init__(min_blocks=1, **options)
        self.kept = kept
        self.written: list[dict[str, float]] = []
        self.exact = False
        self._write = self.resumer.write_snapshot
        self.resumer.write_snapshot = self._write_and_note  # type: ignore[method-assign]

    def _write_and_note(self, engine: Any, *state: Any, **ending: Any) -> None:
        start = time.perf_counter()
        self._write(engine, *state, **ending)
        seconds = time.perf_counter() - start
        snapshots = self.resumer._snapshots
        if snapshots is None or not snapshots.due(engine.clock.round):
            return
        folder = snapshots.folder.path / f"round={engine.clock.round:08d}"
        (file,) = folder.glob(f"worker-{self.global_rank}-of-*.pt")
        self.written.append({"seconds": seconds, "bytes": file.stat().st_size})
        if self.kept is not None:  # the end of the training removes the snapshots, and this link stays
            for old in self.kept.glob(f"*/{file.name.split('.')[0]}.*"):
                old.unlink()
            (self.kept / folder.name).mkdir(parents=True, exist_ok=True)
            os.link(file, self.kept / folder.name / file.name)

    def setup_environment(self) -> None:
        super().setup_environment()
        assert self.session is not None
        restore = self.session.trainer_state.load_state_dict

        def note_and_restore(state: dict[str, Any]) -> None:
            self.exact = True
            restore(state)

        self.session.trainer_state.load_state_dict = note_and_restore  # type: ignore[method-assign]


class Saver(L.Callback):
    """Saves ``saves`` checkpoints after a local step in mid-round; the last one stays."""

    def __init__(self, folder: Path, saves: int) -> None:
        self.folder, self.saves = folder, saves
        self.seconds: list[float] = []

    @property
    def path(self) -> Path:
        return self.folder / f"save={self.saves - 1}.ckpt"

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        for number in range(self.saves if batch_idx + 1 == SAVED_AT else 0):
            trainer.strategy.barrier()
            start = time.perf_counter()
            trainer.save_checkpoint(self.folder / f"save={number}.ckpt")
            self.seconds.append(time.perf_counter() - start)
            if number:
                trainer.strategy.remove_checkpoint(self.folder / f"save={number - 1}.ckpt")


class Present(L.Callback):
    """Records which of the watch and the notes are present in a training."""

    def __init__(self) -> None:
        self.parts: set[str] = set()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        position: Any = trainer.strategy.session.trainer_state.position  # type: ignore[attr-defined]
        watched = any(thread.name == "resist_lightning watchdog" for thread in threading.enumerate())
        self.parts = {part for part, there in (("watch", watched), ("notes", position._before_fetch)) if there}
        self.on_train_batch_end = nothing  # type: ignore[method-assign]


def fit(strategy: Strategy, net: dict[str, Any], steps: int, path: Path | None = None, *more: L.Callback) -> Clock:
    """Train for ``steps`` local steps in all; the clock begins with the call of ``fit``, then a start for each batch."""
    torch.manual_seed(0)
    module = Module(PreActResNet(net["sections"], 10, width_multiplier=net["width"]))
    loader = images(steps + 1, net["batch"], net.get("image", 32))
    clock = Clock()
    trainer = quiet_trainer(
        strategy, dist.get_world_size(), max_steps=steps, callbacks=[clock, *more], use_distributed_sampler=False
    )
    dist.barrier()
    clock.starts.append(time.perf_counter())
    trainer.fit(module, loader, ckpt_path=path)
    return clock


def ddp() -> Strategy:
    return DDPStrategy(process_group_backend="gloo")


def snapshots(settings: dict[str, Any], files: Path) -> dict[str, Any]:
    """Bytes and seconds of a snapshot, for each n, and of a local step between them; by worker 0's clock."""
    found: dict[str, Any] = {}
    for every in settings["every"]:
        local_steps = settings["local_steps"] if every == 1 else 1
        rounds = settings["rounds"] if every == 1 else 2 * every
        strategy = Measured(files / f"kept-{every}", local_steps=local_steps, snapshots=files / f"snapshots-{every}",
                            snapshot_every_n_rounds=every)  # fmt: skip
        starts = fit(strategy, settings, rounds * local_steps + 1).starts[1:]
        workers = gathered(strategy.written)
        seconds: list[float] = []
        for rows in workers:
            seconds += [row["seconds"] for row in rows]
        found[str(every)] = {
            "bytes_by_worker": [rows[-1]["bytes"] for rows in workers],
            "median_write_seconds": median(seconds),
            "snapshots": len(strategy.written),
        }
        if every == 1:
            # A batch that begins a round syncs, and the first one of all warms up: neither is a plain step.
            steps = [after - before for before, after in pairwise(starts)]
            plain = [step for number, step in enumerate(steps) if number % local_steps]
            found["median_step_seconds"] = mean(gathered(median(plain)))
    for every in settings["every"]:
        row = found[str(every)]
        rounds_between = every * PAPER_STEPS * found["median_step_seconds"]
        row["share_of_training"] = row["median_write_seconds"] / rounds_between
    return found


def checkpoints(settings: dict[str, Any], files: Path) -> dict[str, Any]:
    """Bytes and seconds of a checkpoint in mid-round and of DDP's; the seconds are all workers', from a barrier on."""
    found = {}
    for name, strategy in (("resist", Measured(local_steps=SAVED_AT + 2)), ("ddp", ddp())):
        saver = Saver(files / name, settings["saves"])
        fit(strategy, settings, SAVED_AT + 1, None, saver)
        own = sorted(Path(f"{saver.path}.workers").glob("*.pt"))
        found[name] = {
            "bytes": saver.path.stat().st_size,
            "bytes_by_worker": [file.stat().st_size for file in own],
            # All wait for the slowest.
            "median_seconds": median(map(max, zip(*gathered(saver.seconds), strict=True))),
        }
    return found


def resumes(settings: dict[str, Any], files: Path) -> dict[str, Any]:
    """Seconds from the call of ``fit`` to the first batch, of the slowest worker; interleaved."""
    name = f"save={settings['saves'] - 1}.ckpt"
    taken = settings["rounds"] * settings["local_steps"]
    ways: dict[str, tuple[Callable[[], Strategy], int, Path | None]] = {
        "from the beginning": (lambda: Measured(local_steps=SAVED_AT + 2), 1, None),
        "workers' files": (lambda: Measured(local_steps=SAVED_AT + 2), SAVED_AT + 1, files / "resist" / name),
        "snapshots": (lambda: Measured(local_steps=settings["local_steps"]), taken + 1, files / "kept-1"),
        "DDP from the beginning": (ddp, 1, None),
        "DDP's checkpoint": (ddp, SAVED_AT + 1, files / "ddp" / name),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(settings["resumes"]):
        for way, (make, steps, path) in ways.items():
            strategy = make()
            starts = fit(strategy, settings, steps, path).starts
            assert len(starts) == 2, (way, len(starts))  # it resumed where it was: one step was left
            assert path is None or getattr(strategy, "exact", True), way
            seconds[way].append(max(gathered(starts[1] - starts[0])))
    return {"median_seconds": {way: median(values) for way, values in seconds.items()}, "seconds": seconds}


def nothing(*_: object) -> None:
    """A stand-in for a part that is left out; a mock would cost more than that."""


@contextmanager
def without(*left_out: str) -> Iterator[None]:
    """Leave out the watch or the notes, in this process."""
    watch = mock.patch.object(Guard, "begin", nothing) if "watch" in left_out else nullcontext()
    notes = mock.patch.object(Position, "note_fetch", nothing) if "notes" in left_out else nullcontext()
    with watch, notes:
        yield


def added(settings: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a local step of a tiny network, with and without the watch and the notes; every second turn backwards."""
    left_out = {"neither": ("watch", "notes"), "watch": ("notes",), "notes": ("watch",), "both": ()}
    seconds: dict[str, list[float]] = {name: [] for name in left_out}
    for turn in range(settings["turns"]):
        order = list(left_out.items())
        if turn % 2:
            order.reverse()  # so that a machine that becomes slower favours none
        for name, parts in order:
            with without(*parts):
                present = Present()
                starts = fit(Measured(local_steps=10**6), TINY, settings["steps"], None, present).starts[1:]
            assert present.parts == {"watch", "notes"} - set(parts), (name, present.parts)
            first = len(starts) // 10  # those warm up
            steps = len(starts) - 1 - first
            seconds[name].append(mean(gathered((starts[-1] - starts[first]) / steps)))
    ratios, differences = {}, {}
    for name, values in seconds.items():
        # By turns: a temporary slow-down of the machine affects both.
        pairs = list(zip(values, seconds["neither"], strict=True))
        ratios[name] = median(value / off for value, off in pairs)
        differences[name] = median(value - off for value, off in pairs)
    return {
        "median_step_seconds": {name: median(values) for name, values in seconds.items()},
        "median_ratio": ratios,
        "median_added_seconds": differences,
        "seconds": seconds,
    }


def measure_all(_: int, task: tuple[dict[str, Any], str]) -> dict[str, Any]:
    """A worker: measures all parts."""
    settings, files = task[0], Path(task[1])
    quiet()
    for message in (".*does not have many workers", ".*your dataloader is not resumable"):
        warnings.filterwarnings("ignore", message=message)
    parts = {"snapshots": snapshots(settings, files), "checkpoints": checkpoints(settings, files)}
    return {**parts, "resumes": resumes(settings, files), "added": added(settings)}


def run(_: Sequence[str], options: Options) -> None:
    settings = {key: value for key, value in vars(options).items() if key not in ("size", "out", "files")}
    with tempfile.TemporaryDirectory() as temporary:
        found = forked(measure_all, (settings, options.files or temporary), options.workers)[0]
    out = Path(options.out)
    write_record(out / "recovery.jsonl", {"settings": settings, "workers": options.workers, **found})
    show(out, tables.STUDIES, ["recovery"])


if __name__ == "__main__":
    sys.exit(cli.run(run, Options, __doc__))
