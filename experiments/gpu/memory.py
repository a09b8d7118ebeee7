"""Bytes that the ranks of a ResIST training hold and reserve, in each of its phases, against the closed form."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from experiments.app.quiet import hush
from experiments.gpu.cases import Memory
from experiments.gpu.contracts import Evaluated
from experiments.harness.memory import held_bytes
from experiments.harness.workers import forked
from experiments.trainers import quiet_trainer
from resist_lightning import ResISTStrategy
from resist_lightning.models import preact_resnet

ROUNDS, LOCAL_STEPS = 3, 4
EVALUATE_EVERY, SAVE_EVERY = 6, 7  # in the middle of a round
# The engine's activities, as the user sees them.
PHASES = {
    "local steps": "training", "handshake": "sync", "averaging": "sync", "hand_over": "sync",
    "evaluation": "evaluation", "saving": "checkpoint",
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """The settings of a rank."""

    case: Memory
    device: str
    width: float  # 1.0 is the paper's
    batch: int
    pixels: int


def measure(task: Task) -> dict[str, Any]:
    """Measure the ranks: they share the device, and each has its own account of it."""
    with tempfile.TemporaryDirectory() as folder:
        return {"by_worker": forked(_train, (task, Path(folder)), task.case.ranks, grouped=False)}


class Account(L.Callback):
    """Notes the memory held between local steps, and the peak in each phase."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rest: list[dict[str, int]] = []  # after each local step
        self.peaks: dict[str, dict[str, int]] = {}  # of each phase
        self._phase = ""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        engine: Any = trainer.strategy.engine  # type: ignore[attr-defined]
        self._engine = engine
        self._blocks = [sum(p.nbytes for p in block.module.parameters()) for block in engine.layout.blocks]
        # The engine begins after the callbacks: the module is still complete.
        self._shared = sum(p.nbytes for p in pl_module.parameters()) - sum(self._blocks)
        engine.activity.listeners.append(lambda activity: self._begin(PHASES.get(activity.what, "")))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        buffers = sum(buffer.nbytes for buffer in pl_module.buffers() if not buffer.is_meta)
        # Parameters, gradients and momentum of the worker's part.
        bound = 3 * (self._shared + self._held_blocks()) + buffers
        noted = {"closed_form": bound, "held": held_bytes(pl_module, trainer.optimizers[0], pl_module.buffers())}
        if self.device.type == "cuda":
            noted["allocated"] = torch.cuda.memory_allocated(self.device)
        self.rest.append(noted)

    def _held_blocks(self) -> int:
        held = self._engine.partition.held[self._engine.collective.worker]
        return sum(self._blocks[block] for block in held)

    def _begin(self, phase: str) -> None:
        """Close the account of the phase before."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            now = {
                "allocated": torch.cuda.max_memory_allocated(self.device),
                "reserved": torch.cuda.max_memory_reserved(self.device),
            }
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            now = {}
        if self._phase:
            before = self.peaks.setdefault(self._phase, {})
            before.update({name: max(value, before.get(name, 0)) for name, value in now.items()})
        self._phase = phase


def _train(rank: int, task_and_folder: tuple[Task, Path]) -> dict[str, Any]:
    task, folder = task_and_folder
    hush()
    torch.manual_seed(0)
    device = torch.device(task.device)
    account = Account(device)
    # "running": the inputs recorded for the other policy are not in the closed form.
    strategy = ResISTStrategy(
        local_steps=LOCAL_STEPS, min_blocks=1, batch_norm="running", parallel_devices=[device] * task.case.ranks,
        process_group_backend="gloo",
    )  # fmt: skip
    saving = ModelCheckpoint(folder, every_n_train_steps=SAVE_EVERY)
    trainer = quiet_trainer(
        strategy, devices="auto", accelerator="auto", max_epochs=1, val_check_interval=EVALUATE_EVERY,
        num_sanity_val_steps=0, enable_checkpointing=True, callbacks=[account, saving],
    )  # fmt: skip
    steps = ROUNDS * LOCAL_STEPS + 1  # one more, so that the last sync is seen
    module = Evaluated(preact_resnet(101, num_classes=10, width_multiplier=task.width))
    full = sum(parameter.nbytes for parameter in module.parameters())
    trainer.fit(module, _images(task, steps), _images(task, 1))
    worst = max(account.rest, key=lambda row: row.get("allocated", row["held"]) / row["closed_form"])
    return {"full": 3 * full, "at_rest": worst, "peaks": account.peaks, "local_steps": len(account.rest)}


def _images(task: Task, steps: int) -> DataLoader[Any]:
    """``steps`` batches for each rank."""
    pixels = torch.randn(steps * task.batch * task.case.ranks, 3, task.pixels, task.pixels)
    return DataLoader(TensorDataset(pixels, torch.zeros(len(pixels), dtype=torch.long)), task.batch)
