"""Trains by real ranks that share a device, and on the simulator on the same device, and compares the two."""

from __future__ import annotations

import inspect
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from experiments.app.quiet import hush
from experiments.gpu.cases import Contract
from experiments.gpu.hardware import nccl_variables
from experiments.gpu.limits import Skipped
from experiments.harness.workers import forked
from experiments.networks import mlp
from experiments.trainers import Batches, Module, Simulated, differences, make_optimizer, quiet_trainer
from resist_lightning import ISTStrategy, LocalSGDStrategy, NeuronSimulator, ResISTStrategy, Simulator
from resist_lightning.comm.byte_formulas import TRAINING_KINDS
from resist_lightning.methods.resist.bytes import sync_bytes
from resist_lightning.methods.resist.config import Config
from resist_lightning.models import PreActResNet
from resist_lightning.schedule.transfers import plan_sync
from resist_lightning.strategies.base import SubnetStrategy

ROUNDS, LOCAL_STEPS = 5, 4
EVALUATE_EVERY = 7  # local steps: in the second and in the fourth round, not at their borders
CLASSES, LR = 10, 0.01
STRATEGIES: dict[str, Any] = {"resist": ResISTStrategy, "local_sgd": LocalSGDStrategy, "ist": ISTStrategy}
# Of the largest change by training, in double precision. In single precision a sum in another order may flip a ReLU,
# and weights differed by a hundredth of the change; a block at a wrong worker changes them as much as training does.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Task:
    """The settings of a rank."""

    case: Contract
    device: str
    backend: str
    width: float  # 1.0 is the paper's
    pixels: int
    batch: int  # examples of a rank in a local step

    @property
    def workers(self) -> int:
        return self.case.ranks // self.case.devices_per_worker


def compared(task: Task, *, classic: bool) -> dict[str, Any]:
    """Train twice, and compare the results."""
    if task.case.devices_per_worker > 1 and not has_nodes(task.case.method):
        raise Skipped(f"{STRATEGIES[task.case.method].__name__} has no option devices_per_worker")
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # without it sums of a GPU depend on chance
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def variables(rank: int) -> dict[str, str]:
            return nccl_variables(rank, classic) if task.backend == "nccl" else {}

        ranks = forked(_train, (task, folder), task.case.ranks, grouped=False, variables=variables)
        models = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(task.case.ranks)]
    # From here on this process uses the device, too.
    reproducible()
    network = make_network(task)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    simulated, evaluations = _simulate(task, network)
    found = differences(simulated.state_dict(), models[0], before)
    apart = [abs(ours - theirs) for ours, theirs in zip(evaluations, ranks[0]["evaluations"], strict=True)]
    row = {
        **found,
        "backend": ranks[0]["backend"],
        "rounds": ROUNDS,
        "local_steps": LOCAL_STEPS,
        "ranks_equal": all(torch.equal(one[name], models[0][name]) for one in models for name in one),
        "evaluations": ranks[0]["evaluations"],
        "evaluations_simulated": evaluations,
        "largest_difference_of_evaluations": max(apart),
        "sent_bytes": [rank["sent_bytes"] for rank in ranks],
        "sent_bytes_by_formula": [rank["sent_bytes_by_formula"] for rank in ranks],
    }
    return {**row, "broken": broken(row)}


def broken(row: dict[str, Any]) -> list[str]:
    """The contracts that a comparison breaks."""
    limit = TOLERANCE * row["largest_change_by_training"]
    found = {
        "the ranks end with different models": not row["ranks_equal"],
        # As "not at most": numbers that are NaN are no agreement.
        "not the simulator's model": not row["largest_difference"] <= limit,
        "not the simulator's evaluations": not row["largest_difference_of_evaluations"] <= TOLERANCE,
        "not the bytes of the closed form": any(
            formula is not None and formula != sent
            for sent, formula in zip(row["sent_bytes"], row["sent_bytes_by_formula"], strict=True)
        ),
    }
    return [what for what, is_so in found.items() if is_so]


def has_nodes(method: str) -> bool:
    """Whether a worker of this method can be several ranks."""
    return "devices_per_worker" in inspect.signature(STRATEGIES[method]).parameters


def make_strategy(task: Task, **more: Any) -> SubnetStrategy:
    """The strategy of a rank; all ranks share one device."""
    options: dict[str, Any] = {
        "local_steps": LOCAL_STEPS, "check": "full", "parallel_devices": [torch.device(task.device)] * task.case.ranks,
        "process_group_backend": task.backend, **more,
    }  # fmt: skip
    if task.case.devices_per_worker > 1:
        options["devices_per_worker"] = task.case.devices_per_worker
    if task.case.method == "resist":
        options["min_blocks"] = 2
    strategy: SubnetStrategy = STRATEGIES[task.case.method](**options)
    return strategy


def make_network(task: Task) -> nn.Module:
    """The network, with the same weights whenever it is made."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if task.case.method == "ist":
            norm = "layer" if task.case.devices_per_worker > 1 else "batch"
            width = round(1024 * task.width)
            return mlp(in_features=3 * task.pixels**2, num_classes=CLASSES, depth=3, width=width, norm=norm).double()
        network = PreActResNet((1, 1, 7, 1), CLASSES, width_multiplier=task.width).double()
        return without_statistics(network) if task.case.devices_per_worker > 1 else network


def without_statistics(network: nn.Module) -> nn.Module:
    """The network with group norm: the ranks of a worker see parts of its batch, and batch norm would show it."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, nn.GroupNorm(1, child.num_features, dtype=torch.float64))
    return network


def batch_of(task: Task, step: int, rank: int) -> tuple[Tensor, Tensor]:
    """The batch of a rank in a local step; the rank after the last one has the batch that all evaluate."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    labels = torch.randint(0, CLASSES, (task.batch,), generator=generator)
    shape = (task.batch, 3, task.pixels, task.pixels)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    return noise + labels.view(-1, 1, 1, 1) / CLASSES, labels


class Steps(Dataset[tuple[Tensor, Tensor]]):
    """The batches of one rank, one for each local step."""

    def __init__(self, task: Task, rank: int, steps: int) -> None:
        self.task, self.rank, self.steps = task, rank, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        return batch_of(self.task, step, self.rank)


class Evaluated(Module):
    """Notes the loss of each evaluation."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.losses: list[float] = []

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.losses.append(float(nn.functional.cross_entropy(self.net(batch[0]), batch[1])))


class Bytes(L.Callback):
    """Adds up the bytes that this worker sends, by the closed form where the method is ResIST or local SGD."""

    backend = ""
    by_formula: int | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.backend = dist.get_backend()
        engine: Any = trainer.strategy.engine  # type: ignore[attr-defined]
        if type(engine.config) is Config and engine.collective.workers == trainer.world_size:
            self.sizes = engine.layout.sizes(engine.states)
            self.by_formula = 0

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        engine: Any = trainer.strategy.engine  # type: ignore[attr-defined]
        if self.by_formula is None:
            return
        for number in range(engine.clock.round):  # a sync for each that has ended
            plan = plan_sync(engine.layout.partition(number), engine.layout.partition(number + 1))
            sent = sync_bytes(plan, self.sizes, engine.collective.workers)[engine.collective.worker]
            self.by_formula += sum(sent.values())


def _train(rank: int, task_and_folder: tuple[Task, Path]) -> dict[str, Any]:
    task, folder = task_and_folder
    hush()
    reproducible()
    module = Evaluated(make_network(task))
    strategy = make_strategy(task)
    sent = Bytes()
    trainer = quiet_trainer(
        strategy, devices="auto", accelerator="auto", max_epochs=1, val_check_interval=EVALUATE_EVERY,
        num_sanity_val_steps=0, use_distributed_sampler=False, precision="64-true", callbacks=[sent],
    )  # fmt: skip
    training = DataLoader(Steps(task, rank, ROUNDS * LOCAL_STEPS), batch_size=None)
    evaluation = DataLoader(Steps(task, task.case.ranks, 1), batch_size=None)
    trainer.fit(module, training, evaluation)
    torch.save(module.net.state_dict(), folder / f"{rank}.pt")
    assert strategy.engine is not None
    counted = strategy.engine.collective.sent_bytes
    return {
        "backend": sent.backend,
        "evaluations": module.losses,
        "sent_bytes": sum(counted[kind] for kind in TRAINING_KINDS),
        "sent_bytes_by_formula": sent.by_formula,
    }


def _simulate(task: Task, network: nn.Module) -> tuple[nn.Module, list[float]]:
    """The full model after the same training, and the losses of the same evaluations."""
    config: Any = make_strategy(task).config
    kind: Any = NeuronSimulator if task.case.method == "ist" else Simulator
    trainer = Simulated(kind(network.to(task.device), lambda copied: make_optimizer(copied, LR), config, task.workers))
    x, y = (part.to(task.device) for part in batch_of(task, 0, task.case.ranks))
    losses = []
    for step in range(ROUNDS * LOCAL_STEPS):
        trainer.step(_batches(task, step), LR)
        if (step + 1) % EVALUATE_EVERY == 0:
            with torch.no_grad():
                losses.append(float(nn.functional.cross_entropy(trainer.full_model().eval()(x), y)))
    return trainer.full_model(), losses


def _batches(task: Task, step: int) -> Batches:
    """A batch for each worker: those of its ranks together."""
    found = []
    per_worker = task.case.devices_per_worker
    for worker in range(task.workers):
        ranks = range(worker * per_worker, (worker + 1) * per_worker)
        parts = [batch_of(task, step, rank) for rank in ranks]
        x, y = (torch.cat(part).to(task.device) for part in zip(*parts, strict=True))
        found.append((x, y))
    return found


def reproducible() -> None:
    """Choose deterministic kernels."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
