"""``Trainer.fit`` gives the weights of the plain engine loop, bit for bit, and those of the reference simulator."""

from __future__ import annotations

import os
import time
import warnings
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist

from resist_lightning import QSR, Config
from resist_lightning.schedule.partition import draw_partition
from tests.helpers.plain import Classifier, held_out
from tests.helpers.trainers import (
    QUIET,
    fit,
    make_strategy,
    make_trainer,
    run_trainers_and_by_hand,
    traces,
    train_by_hand,
    train_in_one_process,
)
from tests.helpers.training import assert_equal_states, clone_state


@dataclass(frozen=True)
class Case:
    """A training: number of workers, strategy, and number of steps in epochs of a given length."""

    workers: int
    options: dict[str, Any] = field(default_factory=dict)
    face: str = "resist"
    steps: int = 11
    epoch: int = 4
    optimizer: str = "sgd"

    @property
    def config(self) -> Config:
        if self.face == "local_sgd":
            return Config(local_steps=3, blocks=[], batch_norm="running", **self.options)
        return Config(**{"local_steps": 3, "min_blocks": 1, **self.options})

    def held(self, worker: int, step: int) -> list[int]:
        """The blocks that a worker has at a step."""
        number, config = step // 3, self.config
        if self.face == "local_sgd" or number < config.warmup_rounds:
            return [0, 1, 2, 3]
        assert config.min_blocks is not None
        return list(draw_partition(4, self.workers, config.min_blocks, config.seed, number).held[worker])

    def module(self) -> Classifier:
        return Classifier("small", optimizer=self.optimizer)


CASES = {
    "one worker": Case(1),
    "two workers": Case(2),
    # The last bit of a mean over holders must not depend on the worker that computes it, or its target.
    "three workers, several holders, momentum travels with AdamW, an end on a border": Case(
        3, {"min_blocks": 3, "momentum": "travel", "seed": 5}, steps=9, optimizer="adamw"
    ),
    "warm-up, its own scale, running statistics": Case(
        2, {"warmup_rounds": 2, "test_scale": 0.3, "batch_norm": "running"}, steps=10
    ),
    "an end on the border of the warm-up, momentum is kept": Case(
        2, {"min_blocks": 3, "momentum": "keep", "warmup_rounds": 2}, steps=6
    ),
    "local SGD": Case(2, face="local_sgd"),
}
EXPECTED_LEFT = {"MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"}


class Watcher(L.Callback):
    """Notes the worker's blocks in each batch, and checks that nothing is left of the others; sends after the run."""

    def __init__(self) -> None:
        self.held: list[list[int]] = []
        self.left: list[str] = []
        self.received: list[Any] = []

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.received.append(messages(trainer, module))

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        present = {}
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if name.startswith("net.section3.") and name[13] != "0":
                assert present.setdefault(int(name[13]) - 1, not tensor.is_meta) != tensor.is_meta
        for name, parameter in module.named_parameters():
            if parameter.is_meta and (parameter.grad is not None or parameter in trainer.optimizers[0].state):
                self.left.append(name)
            if not parameter.is_meta and parameter.grad is None:
                self.left.append(f"{name} has no gradient")
        self.held.append(sorted(block for block, here in present.items() if here))


def messages(trainer: L.Trainer, module: L.LightningModule) -> list[Any]:
    """What a worker receives after its run, when it has left the group."""
    own, strategy = torch.tensor(float(trainer.global_rank)), trainer.strategy
    gathered: Any = module.all_gather(own)
    return [strategy.reduce(own).item(), strategy.broadcast(trainer.global_rank), gathered.tolist()]


def meet_late(trainer: L.Trainer) -> float:
    """The time before a barrier in worker 0, which comes late, and behind it in the others."""
    if trainer.global_rank == 0:
        time.sleep(0.1)
        before = time.monotonic()
        trainer.strategy.barrier()
        return before
    trainer.strategy.barrier()
    return time.monotonic()


def by_trainer(worker: int, case: Case) -> dict[str, Any]:
    before = dict(os.environ)
    module, watcher = case.module(), Watcher()
    identities = [id(parameter) for parameter in module.parameters()]
    strategy = make_strategy(case.face, **case.options)
    trainer = fit(worker, module, case.epoch, strategy, max_epochs=-1, max_steps=case.steps, callbacks=[watcher])
    if worker == 0:  # the others' next group, for messages, was waited for until the timeout then
        make_trainer(make_strategy(case.face), devices=1).test(case.module(), held_out(worker), verbose=False)
    changed = {key for key in before.keys() | os.environ.keys() if before.get(key) != os.environ.get(key)}
    return {
        "state": clone_state(module),
        "held": watcher.held,
        "left of absent blocks": watcher.left,
        "traces": traces(module),
        "same objects": identities == [id(parameter) for parameter in module.parameters()],
        "group left": dist.is_initialized(),
        "variables": changed - EXPECTED_LEFT,
        "received": [*watcher.received, messages(trainer, module)],
        "met": meet_late(trainer),
        "steps": trainer.global_step,
        "patched": [key for key in ("_broadcast_sigterm_tensor",) if key in vars(trainer.fit_loop.epoch_loop)]
        + [key for key in ("run",) if key in vars(trainer.fit_loop.epoch_loop.val_loop)],
    }


def by_hand(worker: int, case: Case) -> dict[str, Any]:
    module = case.module()
    train_by_hand(worker, module, case.config, case.steps)
    return clone_state(module)


def all_by_trainer(worker: int, cases: dict[str, Case]) -> dict[str, dict[str, Any]]:
    found = {name: by_trainer(worker, case) for name, case in cases.items()}
    return found | {"short": train_shortly(worker)} if "two workers" in cases else found


def all_by_hand(worker: int, cases: dict[str, Case]) -> dict[str, dict[str, Any]]:
    return {name: by_hand(worker, case) for name, case in cases.items()}


@cache
def trained(workers: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Each worker's results by case, and those of the plain loop, for all cases with this number of workers."""
    cases = {name: case for name, case in CASES.items() if case.workers == workers}
    return run_trainers_and_by_hand(all_by_trainer, all_by_hand, workers, cases)


@pytest.mark.parametrize("name", CASES)
def test_the_trainer_trains_what_the_plain_loop_trains(name: str) -> None:
    case = CASES[name]

    results, expected = ([found[name] for found in by_worker] for by_worker in trained(case.workers))

    simulated = train_in_one_process(case.module(), case.config, case.workers, case.steps).full_model().state_dict()
    assert_equal_states(results[0]["state"], simulated)
    for worker, result in enumerate(results):
        assert result["held"] == [case.held(worker, step) for step in range(case.steps)]
        assert_equal_states(result["state"], expected[0], exactly=True)
        assert result["steps"] == case.steps
        assert result["same objects"]
        assert not result["group left"]
        assert [result["traces"], result["variables"], result["patched"]] == [[], set(), []]
        assert result["left of absent blocks"] == []
        # Up to version 0.1 every worker received what it had sent itself, in silence.
        ranks = [float(rank) for rank in range(case.workers)]
        assert result["received"] == 2 * [[sum(ranks) / case.workers, 0, ranks]]
        assert result["met"] >= results[0]["met"]


# Options of the Trainer that make a training short.

SHORT: dict[str, tuple[dict[str, Any], int]] = {
    "fast_dev_run": ({"fast_dev_run": True}, 1),
    "overfit_batches": ({"overfit_batches": 2}, 2),
    "no batches": ({"limit_train_batches": 0}, 0),
    "no epochs": ({"max_epochs": 0}, 0),
    "shorter than a round, by epochs": ({"limit_train_batches": 1, "max_epochs": 2}, 2),
    "shorter than a round, by steps, IST": ({"max_epochs": 9, "max_steps": 2}, 2),
    "shorter than a round, QSR": ({"max_epochs": 1}, 4),
    "barebones": ({"barebones": True, **dict.fromkeys(QUIET.keys() - {"accelerator", "use_distributed_sampler"})}, 4),
}


STRATEGIES = {
    "shorter than a round, by steps, IST": {"face": "ist"},
    "shorter than a round, QSR": {"face": "local_sgd", "local_steps": QSR(1, 1.0)},
}


class Told(Classifier):
    """Notes, at its first batch, whether a warning said that the workers average only once."""

    heard: bool | None = None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.heard is None:
            self.heard = any("the workers will average only once" in str(warning.message) for warning in self.caught)


def train_shortly(worker: int) -> dict[str, tuple[int, list[str], bool]]:
    found = {}
    for name, (options, _) in SHORT.items():
        strategy = STRATEGIES.get(name, {})
        module = Told("chain" if strategy else "small")
        with warnings.catch_warnings(record=True) as module.caught:
            warnings.simplefilter("always")
            trainer = fit(worker, module, 4, make_strategy(**strategy), val_dataloaders=held_out(worker), **options)
        found[name] = (trainer.global_step, traces(module), bool(module.heard))
    return found


def test_the_shortest_trainings_end_with_the_full_model_too_and_those_of_one_round_are_told_before() -> None:
    told, heard = (found["short"] for found in trained(2)[0])
    for name, (_, steps) in SHORT.items():
        assert told[name] == (steps, [], "shorter" in name or name == "overfit_batches"), name
        assert heard[name] == (steps, [], False), name  # rank 0 speaks for all
