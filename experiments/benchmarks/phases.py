"""The memory of a worker from the start of a training to its end, phase by phase, and with DDP and local SGD.

python experiments/benchmarks/phases.py                         (2, 4 and 8 workers, some five minutes)
python experiments/benchmarks/phases.py size=smoke out=FOLDER   (to see that it works)

Real processes under the Trainer, on the CPU: a chain of residual MLPs, SGD with momentum, batches so small that
activations do not count. Phases: `start` (from the call of fit to the first batch), `training`, `sync`, `evaluation`
and `checkpoint` in mid-round, `end`, and `resume` (the start of a second fit, from the checkpoint). In each the peak of
tensors from malloc (sampled once a millisecond), and the peak in RAM (by the kernel, exact), above the process's memory
before the module was built. Prints tables, draws a picture and writes experiments/benchmarks/results/held_phases.jsonl.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor, nn

from experiments.benchmarks import tables
from experiments.benchmarks.steps import quiet
from experiments.harness import cli
from experiments.harness.figures import BLUE, GREEN, GREY, ORANGE, SKY, drawn
from experiments.harness.memory import allocate_large_tensors_apart, allocated_bytes, resident_bytes
from experiments.harness.record import write_record
from experiments.harness.settings import option
from experiments.harness.tables import show_and_write
from experiments.harness.workers import forked
from experiments.trainers import quiet_trainer
from resist_lightning import LocalSGDStrategy, ResISTStrategy

STEPS, SAVED_AFTER = 6, 5  # in rounds of two local steps: saved, and validated after the third one, in mid-round
PHASES = tables.PHASES


@dataclass(kw_only=True)
class Options(cli.Command):
    out: str = option(str(tables.RESULTS), "folder of the result file and the picture", smoke="runs/benchmarks")
    workers: list[int] = option([2, 4, 8], "processes", least=2, smoke=[2])
    methods: list[str] = option(list(tables.METHODS), "trained", choices=tuple(tables.METHODS), smoke=["resist_late"])
    width: int = option(512, "width of the network", least=8, smoke=64)
    blocks: int = option(16, "residual MLPs", least=2, smoke=4)


class Block(nn.Module):
    """A residual MLP."""

    residual_branch_end = "out"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inside, self.out = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(torch.relu(self.inside(x)))


def chain(width: int, blocks: int, inputs: int = 8) -> nn.Sequential:
    """The network; with ``inputs`` times ``width`` numbers its first layer is as large as ``inputs`` / 4 blocks."""
    body = nn.Sequential(*(Block(width) for _ in range(blocks)))
    return nn.Sequential(nn.Linear(inputs * width, width), body, nn.Linear(width, 10))


def sizes(width: int, inputs: int = 8) -> tuple[int, int]:
    """Bytes of the shared weights, and of a block's."""
    shared, with_block = (
        4 * sum(parameter.numel() for parameter in chain(width, blocks, inputs).parameters()) for blocks in (0, 1)
    )
    return shared, with_block - shared


class Net(L.LightningModule):
    """Builds its network in the constructor, or ``late`` in ``configure_model``."""

    def __init__(self, size: tuple[int, int, int], *, late: bool) -> None:
        super().__init__()
        self.size = size
        self.net = None if late else chain(*size)

    def configure_model(self) -> None:
        if self.net is None:
            self.net = chain(*self.size)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.trainer.phases.mark("training")  # type: ignore[attr-defined]
        assert self.net is not None
        return self.net(batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        assert self.net is not None
        self.net(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        assert self.net is not None
        # One tensor after the other: torch's default makes copies of all gradients at once.
        return torch.optim.SGD(self.net.parameters(), 0.01, momentum=0.9, foreach=False)


class Phases:
    """The peak of each phase: bytes from malloc, and bytes in RAM."""

    def __init__(self, on_phase: Callable[[str], Any]) -> None:
        self._on_phase = on_phase
        allocate_large_tensors_apart()
        self._before = {"allocated": allocated_bytes(), "resident": resident_bytes()}
        self._phase, self._peak = "", 0
        self.found: dict[str, dict[str, int]] = {}
        self._ended, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def mark(self, phase: str) -> None:
        """End the present phase, and begin another one."""
        self._look()
        if self._phase:
            status = Path("/proc/self/status").read_text()
            resident = int(status.partition("VmHWM:")[2].split()[0]) * 1024
            peaks = {"allocated": self._peak, "resident": resident}
            known = self.found.setdefault(self._phase, {"allocated": 0, "resident": 0})
            for key, value in peaks.items():
                known[key] = max(known[key], value - self._before[key])
        Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's peak
        self._on_phase(phase)
        with self._lock:
            self._phase, self._peak = phase, allocated_bytes()

    def end(self) -> None:
        self.mark("")
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.001):
            self._look()

    def _look(self) -> None:
        with self._lock:
            self._peak = max(self._peak, allocated_bytes())


class Marks(L.Callback):
    """Marks the phases of a training, and saves a checkpoint."""

    def __init__(self, phases: Phases, path: Path) -> None:
        self.phases, self.path = phases, path

    def on_train_batch_start(self, *_: Any) -> None:
        self.phases.mark("sync")

    def on_validation_start(self, *_: Any) -> None:
        self.phases.mark("evaluation")

    def on_validation_end(self, *_: Any) -> None:
        self.phases.mark("evaluation")

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx + 1 == SAVED_AFTER and not self.path.exists():
            trainer.strategy.barrier()  # all have checked whether it exists
            self.phases.mark("checkpoint")
            trainer.save_checkpoint(self.path)
            self.phases.mark("training")

    def on_train_end(self, *_: Any) -> None:
        self.phases.mark("end")


def stated_bytes(part: int, width: int) -> dict[str, int]:
    """Maximum bytes of a worker but the first in each phase, by the closed form of docs/how-it-works.md.

    Args:
        part: bytes of the weights that it holds, Q + k b.
        width: of the network.
    """
    shared, block = sizes(width)
    return {
        "start": part + max(shared, block), "training": 3 * part, "sync": 3 * part, "evaluation": 2 * part + block,
        "checkpoint": 3 * part + block, "end": 3 * part + block, "resume": 2 * part,
    }  # fmt: skip


def strategy_for(method: str) -> Strategy:
    if method in ("ddp", "single"):
        return DDPStrategy(process_group_backend="gloo") if method == "ddp" else SingleDeviceStrategy("cpu")
    if method == "local_sgd":
        return LocalSGDStrategy(local_steps=2)
    first = {"evaluate_on": "first", "full_model_on": "first"} if method == "resist_late" else {}
    return ResISTStrategy(local_steps=2, min_blocks=0, blocks="net.1.*", **first)


def fit(method: str, size: tuple[int, int, int], path: Path, phases: Phases, ckpt_path: Path | None) -> Any:
    phases.mark("resume" if ckpt_path else "start")
    module = Net(size, late=method == "resist_late")
    strategy = strategy_for(method)
    trainer = quiet_trainer(
        strategy, dist.get_world_size(), max_epochs=1, callbacks=[Marks(phases, path)], val_check_interval=3,
        use_distributed_sampler=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.phases = phases  # type: ignore[attr-defined]
    batches: Any = [torch.randn(2, size[0] * size[2]) for _ in range(STEPS)]
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None), batches[:1], ckpt_path=ckpt_path)
    return strategy


def measure(
    worker: int, task: tuple[str, int, int, str], inputs: int = 8, on_phase: Callable[[str], Any] = lambda phase: None
) -> dict[str, Any]:
    """A worker: trains, and resumes from its checkpoint."""
    method, width, blocks, folder = task
    quiet()
    path = Path(folder) / f"{method}.ckpt"
    chain(width, 1, inputs)(torch.randn(2, inputs * width)).sum().backward()  # libraries' one-time allocations
    phases = Phases(on_phase)
    size = width, blocks, inputs
    strategy = fit(method, size, path, phases, None)
    engine = getattr(strategy, "engine", None)
    part = engine.layout.held_parameters(0)[worker] if engine is not None else None
    del strategy, engine
    phases.mark("")
    gc.collect()
    fit(method, size, path, phases, path)
    phases.end()
    return {"part": part, "phases": {phase: phases.found[phase] for phase in PHASES if phase in phases.found}}


def run(_: Sequence[str], options: Options) -> None:
    rows = []
    parameters = sum(parameter.numel() for parameter in chain(options.width, options.blocks).parameters())
    for workers in options.workers:
        for method in options.methods:
            with tempfile.TemporaryDirectory() as folder:
                task = method, options.width, options.blocks, folder
                found = forked(measure, task, workers)
            for worker, row in enumerate(found):
                part = 4 * (row["part"] or parameters)
                mine = {"method": method, "workers": workers, "worker": worker, "bound": 3 * part, **row["phases"]}
                if method == "resist_late":
                    mine["stated"] = stated_bytes(part, options.width)
                rows.append(mine)
            print(f"measured: {method}, {workers} workers", flush=True)
    out = Path(options.out)
    settings = {"width": options.width, "blocks": options.blocks}
    write_record(out / "held_phases.jsonl", {"settings": settings, "full_bytes": 4 * parameters, "rows": rows})
    picture = draw(out / "held_phases.png", rows, options.workers[-1], 4 * parameters)
    show_and_write(out, tables.RESULTS, tables.STUDIES, ["held_phases"], [picture])


def draw(path: Path, rows: list[dict[str, Any]], workers: int, full: int) -> Path:
    """Draw the peak bytes from malloc by phase, of the worst worker other than the first."""
    colours = dict(zip(tables.METHODS, (GREY, SKY, ORANGE, BLUE), strict=True))
    methods = tables.methods_in(rows)
    title = f"What a worker holds, {workers} workers"
    with drawn(path, 10, 4.6, title, "most bytes of tensors in each phase, worst worker but the first") as figure:
        axes = figure.subplots()
        for place, method in enumerate(methods):
            heights = [tables.most(rows, method, workers, phase, first=False) / 1e6 for phase in PHASES]
            spots = [number + 0.2 * (place - 1.5) for number in range(len(PHASES))]
            axes.bar(spots, heights, 0.2, color=colours[method], label=tables.METHODS[method].replace("`", ""))
        bound = max(row["bound"] for row in rows if row["method"] == methods[-1] and row["workers"] == workers)
        axes.axhline(bound / 1e6, color=GREEN, linewidth=1.5, label="3 (Q + k b)")
        axes.axhline(full / 1e6, color=GREY, linewidth=1, linestyle=":", label="weights of the full model")
        axes.set_xticks(range(len(PHASES)), PHASES)
        axes.set_ylabel("MB")
        axes.legend(ncols=3, loc="upper left", fontsize=9)
        axes.set_ylim(top=axes.get_ylim()[1] * 1.25)
    return path


if __name__ == "__main__":
    sys.exit(cli.run(run, Options, __doc__))
