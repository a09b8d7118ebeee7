"""Trains one case: one process, DDP, local SGD or IST, on the same examples in the same order."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from statistics import mean
from typing import Any

import torch
from torch import nn

from experiments.data import Digits, SpeechShaped
from experiments.data.module import ArrayData
from experiments.ist.cases import TASKS, Case
from experiments.links.closed_form import neuron_bytes
from experiments.networks import mlp
from experiments.trainers import (
    LARGEST_WORKERS,
    NORMS,
    Curve,
    DataParallel,
    Prepared,
    Simulated,
    Trainer,
    accuracy,
    rate,
    steps_of,
    stops,
)  # fmt: skip
from experiments.trainers import train as train_by
from resist_lightning import Config, NeuronConfig, NeuronSimulator, Simulator
from resist_lightning.comm.byte_formulas import ddp_bytes, local_sgd_bytes
from resist_lightning.methods.ist.layout import NeuronLayout
from resist_lightning.schedule.progress import Clock
from resist_lightning.state.batch_norm import norms_with_statistics
from resist_lightning.state.optimizer_state import OptimizerStates

EVALUATIONS = {"full": 8, "smoke": 2}  # in a training, by size
FINISH = 0.1  # share of the steps that a finish takes


def data_of(task: str, size: str) -> ArrayData[Any]:
    """The data module of a task."""
    small = size == "smoke"
    if task == "digits":
        return Digits(limit=50 if small else None)
    if small:
        return SpeechShaped(train_size=400, test_size=100, features=32, classes=4)
    return SpeechShaped()


@lru_cache(maxsize=2)
def prepared(task: str, size: str) -> Prepared:
    """Read a task's examples."""
    return Prepared.of(data_of(task, size))


def samples(task: str, size: str, passes: int | None) -> int:
    """Training examples that all workers see together: whole steps of the most workers; None for the task's passes."""
    step = TASKS[task].batch * LARGEST_WORKERS
    return len(prepared(task, size).examples.labels) // step * step * (passes or TASKS[task].passes[size])


def make_network(task: str, size: str, **options: Any) -> nn.Module:
    """The task's network; ``options`` are those of `experiments.networks.mlp`."""
    data, chosen = data_of(task, size), TASKS[task]
    return mlp(
        in_features=data.in_features,
        num_classes=data.num_classes,
        depth=chosen.depth,
        width=chosen.width[size],
        **options,
    )


def measure(case: Case, size: str, passes: int | None) -> dict[str, Any]:
    """Train and evaluate ``case``: a row of a record, accuracies in per cent."""
    started, data = time.perf_counter(), prepared(case.task, size)
    steps = steps_of(samples(case.task, size, passes), TASKS[case.task].batch, case.workers)
    finish_at = round(steps * (1 - FINISH)) if case.finish else steps
    curve = Curve(data, stops(steps, EVALUATIONS[size]))
    trainer = train(case, size, steps, finish_at, curve)
    return {
        **curve.row(),
        "local_steps_done": steps,
        "samples": steps * case.workers * TASKS[case.task].batch,
        "sent_bytes": sent_bytes(case, size, steps, finish_at),
        "policies": _policies(trainer, data) if case.method == "ist" and not case.finish else {},
        "seconds": round(time.perf_counter() - started, 1),
    }


def train(
    case: Case,
    size: str,
    steps: int,
    finish_at: int,
    told: Callable[[Trainer, int], None] = lambda trainer, done: None,
) -> Trainer:
    """Train ``case`` for so many local steps, from ``finish_at`` on (``steps``: never) as local SGD.

    ``told`` is called with the trainer, and the number of local steps done.
    """

    def after_step(trainer: Trainer, done: int) -> Trainer | None:
        told(trainer, done)
        return finisher(case, trainer.full_model()) if done == finish_at < steps else None

    stream = prepared(case.task, size).stream(TASKS[case.task].batch, case.seed)
    rates = [rate(case.lr, step, steps) if case.schedule == "multistep" else case.lr for step in range(steps)]
    return train_by(make_trainer(case, make_start(case, size), steps), stream, case.workers, rates, after_step)


def make_start(case: Case, size: str) -> nn.Module:
    """The network before training: of a seed, the same for all methods."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        return make_network(case.task, size, norm=case.norm, output_norm=case.output_norm)


def make_optimizer(module: nn.Module, case: Case) -> torch.optim.SGD:
    """The optimizer of the authors' code: no weight decay, and usually no momentum."""
    return torch.optim.SGD(module.parameters(), case.lr, momentum=case.sgd_momentum)


def make_trainer(case: Case, network: nn.Module, steps: int) -> Trainer:
    """The trainer of ``case`` for so many local steps."""
    if case.method in ("single", "ddp"):
        return DataParallel(network, make_optimizer(network, case), case.workers)
    if case.method == "local_sgd":
        return finisher(case, network)
    config = _config(case)
    return Simulated(NeuronSimulator(network, lambda copied: make_optimizer(copied, case), config, case.workers, steps))


def _config(case: Case) -> NeuronConfig:
    shares = tuple(float(share) for share in case.shares.split(",") if share)
    return NeuronConfig(
        local_steps=case.local_steps,
        seed=case.seed,
        momentum=case.momentum,  # type: ignore[arg-type]
        min_share=shares[0] if len(shares) == 1 else 0.0,
        growth=shares if len(shares) > 1 else None,
        finish_rounds=case.finish_rounds,
    )


def finisher(case: Case, network: nn.Module) -> Simulated:
    """Local SGD that starts from a network."""
    config = Config(local_steps=case.local_steps, seed=case.seed, momentum="reset", blocks=[])
    return Simulated(Simulator(network, lambda copied: make_optimizer(copied, case), config, case.workers))


def sent_bytes(case: Case, size: str, steps: int, finish_at: int) -> float:
    """Bytes that a worker sends in a training by closed form, mean over workers; of IST over its own rounds."""
    with torch.device("meta"):
        network = make_start(case, size)
    parameters = sum(tensor.nbytes for tensor in network.parameters())
    whole = parameters + sum(tensor.nbytes for tensor in network.buffers())
    if case.method in ("single", "ddp"):
        return ddp_bytes(parameters, case.workers, steps if case.workers > 1 else 0)
    if case.method == "local_sgd":
        return local_sgd_bytes(whole, case.workers, (steps - 1) // case.local_steps)
    layout = NeuronLayout(network, _config(case), case.workers)
    layout.plan_end(Clock(case.local_steps), steps)
    states = OptimizerStates([make_optimizer(network, case)])
    rounds = (finish_at - 1) // case.local_steps  # the last round is followed by no sync: the training is over
    sent = sum(mean(neuron_bytes(layout, states, number)) for number in range(rounds))
    if case.finish:  # everyone gets the full model, and averages it from then on
        cut = whole - sum(tensor.nbytes for tensor in layout.shared.values())
        sent += cut * (case.workers - 1) / case.workers
        sent += local_sgd_bytes(whole, case.workers, (steps - finish_at) // case.local_steps)
    return sent


def _policies(trainer: Trainer, data: Prepared) -> dict[str, float]:
    """Test accuracy of the same training by batch-norm policy, where there is batch norm."""
    if not norms_with_statistics(trainer.full_model()):
        return {}
    return {norm: accuracy(trainer.full_model(norm), data.test) for norm in NORMS}
