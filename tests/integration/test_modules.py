"""Modules as users write them: other precisions, networks beside the trained one, tools that call fit themselves."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from resist_lightning import Config, NotFinite
from tests.helpers.auxnet import make_stages
from tests.helpers.plain import Classifier, Late, batch_of, held_out, make_net
from tests.helpers.processes import run_workers
from tests.helpers.trainers import (
    fit,
    loop_by_hand,
    make_strategy,
    make_trainer,
    run_trainers,
    train_by_hand,
)
from tests.helpers.training import assert_equal_states, clone_state

CONFIG = Config(local_steps=3, min_blocks=1)
State = dict[str, Tensor]


def trained_as(worker: int, module: type[Classifier]) -> State:
    made = module()
    fit(worker, made, 5)
    return clone_state(made)


def by_hand(worker: int) -> State:
    module = Classifier("small")
    train_by_hand(worker, module, CONFIG, 5)
    return clone_state(module)


def by_trainers(worker: int, folder: str) -> dict[str, Any]:
    return {
        "ordinary": [trained_as(worker, module) for module in (SmallLate, Different)],
        "precisions": trained_in_each(worker),
        "frozen": trained_as(worker, WithBoth),
        "gathered": gather(worker),
        "diverged": search_until_it_diverges(worker, folder),
        "tuned": tune_each(folder),
        "failed": search_until_there_is_nan(worker, folder),
    }


def all_by_hand(worker: int) -> dict[str, Any]:
    return {"ordinary": by_hand(worker), "precisions": by_hand_in_each(worker)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Each worker's results of all trainings in this file but that of warnings."""
    return by_name(run_trainers(by_trainers, 2, str(tmp_path_factory.mktemp("modules"))))


@pytest.fixture(scope="module")
def expected() -> dict[str, list[Any]]:
    """The same by hand."""
    return by_name(run_workers(all_by_hand, 2))


def by_name(found: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [each[name] for each in found] for name in found[0]}


# Modules that train like the ordinary one.


class Different(Classifier):
    """A module that calls itself, built in ``setup``: with other weights and statistics on all workers but worker 0."""

    def __init__(self) -> None:
        super().__init__("small", calls="self")
        del self.net

    def setup(self, stage: str) -> None:
        self.net = make_net("small")
        if self.trainer.global_rank:
            with torch.no_grad():
                for tensor in [*self.parameters(), *self.buffers()]:
                    tensor.fill_(self.trainer.global_rank)


class SmallLate(Late):
    def __init__(self) -> None:
        super().__init__("small")


def test_they_train_as_the_ordinary_module_does(trained: Any, expected: Any) -> None:
    for states, by_hand in zip(trained["ordinary"], expected["ordinary"], strict=True):
        assert len(states) == 2
        for state in states:
            assert_equal_states(state, by_hand, exactly=True)


# Precisions.


PRECISIONS = {"bf16-true": torch.bfloat16, "bf16-mixed": torch.float32}


def trained_in_each(worker: int) -> list[State]:
    found = []
    for precision in PRECISIONS:
        module = Classifier("small")
        fit(worker, module, 5, precision=precision)
        found.append(clone_state(module))
    return found


def by_hand_in_each(worker: int) -> list[State]:
    return [by_hand_in(worker, precision) for precision in PRECISIONS]


def by_hand_in(worker: int, precision: str) -> State:
    module = Classifier("small")
    if precision == "bf16-true":
        module.bfloat16()
    mixed = partial(torch.autocast, "cpu", dtype=torch.bfloat16, cache_enabled=False)
    context = mixed if precision == "bf16-mixed" else nullcontext
    optimizer = module.configure_optimizers()

    def train_step(step: int) -> None:
        images, labels = batch_of(worker, step)
        optimizer.zero_grad()
        with context():
            loss = module.training_step((images.bfloat16() if precision == "bf16-true" else images, labels), step)
        loss.backward()
        optimizer.step()

    return loop_by_hand(module, [optimizer], range(5), train_step, context)


def test_other_precisions_train_as_the_plain_loop_does(trained: Any, expected: Any) -> None:
    for states, by_hands in zip(trained["precisions"], expected["precisions"], strict=True):
        for state, by_hand, dtype in zip(states, by_hands, PRECISIONS.values(), strict=True):
            assert_equal_states(state, by_hand, exactly=True)
            assert state["net.stem.weight"].dtype == dtype
            assert state["net.stem.weight"].isfinite().all()


# Networks beside the trained one.


class WithTeacher(Classifier):
    """A module with a teacher, called without gradients, whose batch norm is never in training mode."""

    def __init__(self, kind: str = "small") -> None:
        super().__init__(kind)
        self.teacher = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).requires_grad_(False)
        self.teacher[1].running_mean.fill_(5.0)
        self.teacher[1].running_var.fill_(2.0)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.teacher.eval()
        with torch.no_grad():
            hint = self.teacher(batch[0]).mean()
        return super().training_step(batch, batch_idx) + hint


class WithFrozenStatistics(Classifier):
    """A module whose first block, which all workers hold, keeps its batch-norm statistics, as in fine-tuning."""

    def __init__(self, kind: str = "small") -> None:
        super().__init__(kind)
        self.net.section3[0].norm.running_mean.fill_(5.0)
        self.net.section3[0].norm.running_var.fill_(2.0)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.net.section3[0].norm.eval()
        return super().training_step(batch, batch_idx)


class WithBoth(WithTeacher, WithFrozenStatistics):
    """A module with a teacher and frozen statistics."""


def test_batch_norms_that_do_not_train_keep_their_statistics(trained: Any) -> None:
    statistics = {name: value for name, value in clone_state(WithBoth()).items() if (value == 5.0).all()}
    assert {name.split(".")[0] for name in statistics} == {"teacher", "net"}
    for state in trained["frozen"]:
        for name, value in statistics.items():
            torch.testing.assert_close(state[name], value)


# Tools of Lightning that call fit themselves.


class Tunable(Classifier):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.lr = 0.05


TUNED: dict[str, tuple[str, dict[str, Any]]] = {
    "resist": ("small", {"warmup_rounds": 1, "momentum": "keep"}),
    "local_sgd": ("chain", {"wire": "int8"}),
    "ist": ("chain", {"momentum": "travel"}),
    "auxnet": ("small", {"cuts": ["section3.1"]}),
}
"""Networks and options."""


def tune_each(folder: str) -> dict[str, list[tuple[State, int, int, Any]]]:
    """By method: states, rounds, local steps and bytes sent, without a search for the learning rate and with one."""
    ways = ["not at all", "by a callback", "before"]
    return {face: [tune(face, how, folder) for how in ways[: 3 if face == "ist" else 2]] for face in TUNED}


def tune(face: str, how: str, folder: str) -> tuple[State, int, int, Any]:
    kind, options = TUNED[face]
    module = Tunable(kind)
    data = DataLoader([batch_of(0, step) for step in range(5)], batch_size=None)  # type: ignore[arg-type]
    strategy = make_stages(**options) if face == "auxnet" else make_strategy(face, **options)
    callbacks = [LearningRateFinder(num_training_steps=4)] if how == "by a callback" else []  # too few to choose by
    trainer = make_trainer(strategy, max_epochs=1, default_root_dir=folder, callbacks=callbacks)
    if how == "before":
        result = Tuner(trainer).lr_find(module, data, num_training=4, update_attr=False)
        assert result is not None
        assert len(result.results["lr"]) == 4
    trainer.fit(module, data)
    engine = strategy.engine
    assert engine is not None
    sent = {kind: bytes for kind, bytes in engine.sent_bytes_by_worker.items() if kind != "control"}
    return clone_state(module), engine.clock.round, engine.clock.step, sent


@pytest.mark.parametrize("face", TUNED)
def test_a_search_for_the_learning_rate_leaves_no_trace(trained: Any, face: str) -> None:
    for untuned, *others in (found[face] for found in trained["tuned"]):
        assert len(others) == (2 if face == "ist" else 1)
        for state, *place in others:
            assert_equal_states(state, untuned[0], exactly=True)
            assert place == [1, 2, untuned[-1]]


def search_until_it_diverges(worker: int, folder: str) -> tuple[float, int, int]:
    """The learning rate found, the number of steps of the search, and of the training; on the worker's own data."""
    module = Tunable("chain")
    data = DataLoader([batch_of(worker, step) for step in range(40)], batch_size=None)  # type: ignore[arg-type]
    threshold = 1e-4 if worker == 0 else None  # stop at the first comparison, and never
    finder = LearningRateFinder(min_lr=1e-3, max_lr=1.0, num_training_steps=40, early_stop_threshold=threshold)
    strategy = make_strategy("local_sgd", local_steps=100)
    trainer = make_trainer(strategy, max_steps=2, default_root_dir=folder, callbacks=[finder])
    trainer.fit(module, data)
    assert finder.optimal_lr is not None
    return module.lr, len(finder.optimal_lr.results["lr"]), trainer.global_step


def test_a_search_that_stops_early_on_one_worker_stops_on_all(trained: Any) -> None:
    """Lightning sets the stop flag of the worker whose loss diverges, then broadcasts worker 0's."""
    first, second = trained["diverged"]
    assert first == second
    assert 1 < first[1] < 40
    assert first[2] == 2


class Explodes(Tunable):
    def on_train_batch_end(self, *_: Any) -> None:
        if self.trainer.global_step == 4:
            next(self.parameters()).data.fill_(float("nan"))


def search_until_there_is_nan(worker: int, folder: str) -> tuple[str, list[Path]]:
    finder = LearningRateFinder(num_training_steps=10, early_stop_threshold=None)
    with pytest.raises(NotFinite) as caught:
        fit(worker, Explodes("small"), 10, default_root_dir=folder, callbacks=[finder])
    return str(caught.value), [*Path(folder).glob(".lr_find*")]


def test_a_search_that_fails_says_why_and_leaves_no_file(trained: Any) -> None:
    """Lightning restored its checkpoint first: into blocks that a worker lacked, which was the only error."""
    for said, left in trained["failed"]:
        assert "NaN or infinity after local step 3 of round 1" in said
        assert said.endswith("In a search for the learning rate, lower its max_lr.")
        assert left == []


# A module's requests to other workers.


class Gathering(Classifier):
    """Sends messages when a validation ends, where any warning would be an error."""

    def on_validation_epoch_end(self) -> None:
        mine = torch.full((2,), float(self.global_rank))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.gathered = self.all_gather({"rank": mine})["rank"]
            self.largest = self.trainer.strategy.reduce(mine.clone(), reduce_op="max")
            self.told = self.trainer.strategy.broadcast({"from": self.global_rank})


def gather(worker: int) -> tuple[Any, Any, Any]:
    module = Gathering("small")
    fit(worker, module, 4, val_dataloaders=held_out(worker))
    return module.gathered, module.largest, module.told


def test_a_module_may_gather_reduce_and_broadcast_in_validation(trained: Any) -> None:
    for ranks, largest, told in trained["gathered"]:
        assert ranks.tolist() == [[0, 0], [1, 1]]
        assert largest.tolist() == [1, 1]
        assert told == {"from": 0}


# Warnings.


class Talkative(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("train/loss", loss, sync_dist=True)
        self.log("train/epoch_loss", functional.relu(loss), on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
        closure() if batch_idx % 2 else optimizer.step(closure)


WARNINGS = {
    "Timer": "Timer sends a message after every batch",
    "log": "self.log('train/loss', sync_dist=True) sends a message after every batch",
    "other logs": "self.log('train/epoch_loss",
    "loaders": "the workers' training epochs have",
    "nothing partitioned": "nothing is partitioned: the default min_blocks=1",
    "shape": "match `blocks` but stay shared",
    "no step": "finish_rounds=1 is planned for 8 local steps",
    "early end": "ended after 4: of 3 rounds the last 1 did not come",
}


def warn_of_much(worker: int) -> dict[str, int]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")  # Python's default: once for each place
        strategy = make_strategy(min_blocks=None, blocks="section3.[01]", finish_rounds=1)
        fit(
            worker,
            Talkative(),
            4 + worker,
            strategy,
            max_epochs=2,
            max_time="00:01:00:00",
            val_dataloaders=held_out(worker),
        )
    messages = [str(warning.message) for warning in caught]
    return {name: sum(text in message for message in messages) for name, text in WARNINGS.items()}


def test_warnings_come_once_and_from_one_worker() -> None:
    mine, theirs = run_trainers(warn_of_much, 2)

    assert mine == dict.fromkeys(WARNINGS, 1) | {"other logs": 0}
    assert theirs == dict.fromkeys(WARNINGS, 0)
