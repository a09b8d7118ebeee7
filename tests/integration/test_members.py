"""Workers of several processes under a Trainer: same training, one file per worker, exact resume, errors by rank."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from resist_lightning import (
    AuxNetStrategy,
    ISTStrategy,
    NeuronConfig,
    NeuronSimulator,
    WorkerLost,
    WorkersDisagree,
)
from tests.helpers.plain import Classifier, batch_of, stream
from tests.helpers.trainers import make_strategy, make_trainer, run_in_turn, run_trainers
from tests.helpers.training import assert_equal_states, clone_state
from tests.integration.test_exact_resume import BATCHES, EPOCHS, Case, SavesAt, unbroken_and_resumed
from tests.integration.test_snapshots import Stops

TWO = {"devices_per_worker": 2}
SEED = 17  # with others an activation falls on the kink of a ReLU, where the last bit decides

Found = dict[str, list[Any]]

RESUMED = {
    "resist": (
        2,
        Case(4, "resist", {**TWO, "momentum": "travel", "min_blocks": 3}, "adamw", "shuffled", 2, (3, 8), early=True),
    ),
    "ist": (2, Case(6, "ist", {"devices_per_worker": 3, "momentum": "keep"}, "sgd", "shuffled", 1, (7,))),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_of_workers_with_members_resumes_exactly(name: str, tmp_path: Path) -> None:
    workers, case = RESUMED[name]
    results = run_trainers(unbroken_and_resumed, case.workers, case, str(tmp_path))

    first = results[0][0]
    for unbroken, *resumed in results:
        assert_equal_states(unbroken, first, exactly=True)
        for state in resumed:
            assert_equal_states(state, unbroken, exactly=True)
    for stop in case.stops:
        assert len(os.listdir(tmp_path / f"{stop}.ckpt.workers")) == workers


class ByHand(Classifier):
    """Two backward passes and two steps in each batch."""

    def __init__(self, seed: int) -> None:
        super().__init__("chain", seed=seed)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        for images in (batch[0], -batch[0]):
            optimizer.zero_grad()
            self.manual_backward(functional.cross_entropy(self.net(images), batch[1]))
            optimizer.step()


def shard_by_shard(module: Classifier, members: int, worker: int, step: int, images: int = 1) -> None:
    """Add up the gradients of the members' batches in one process; buffers are the first member's."""
    for member in range(members):
        before = {name: buffer.clone() for name, buffer in module.named_buffers()}
        x, y = batch_of(worker * members + member, step)
        (functional.cross_entropy(module.net(images * x), y) / members).backward()
        if member:
            module.load_state_dict(before, strict=False)


def trained(rank: int, _: Path, manual: bool) -> dict[str, Tensor]:
    module: Any = ByHand(seed=SEED) if manual else Classifier("chain", seed=SEED)
    accumulate = 1 if manual else 2
    trainer = make_trainer(make_strategy("local_sgd", **TWO), max_epochs=1, accumulate_grad_batches=accumulate)
    trainer.fit(module, stream(rank, 6))
    return clone_state(module)


@pytest.mark.parametrize("manual", [False, True])
def test_gradients_are_averaged_in_a_worker_and_weights_between_workers(manual: bool, found: Found) -> None:
    results = found["by hand" if manual else "accumulated"]

    modules = [Classifier("chain", seed=SEED), Classifier("chain", seed=SEED)]
    optimizers = [module.configure_optimizers() for module in modules]
    for step in range(6):
        for worker, (module, optimizer) in enumerate(zip(modules, optimizers, strict=True)):
            train_batch(module, optimizer, worker, step, manual=manual)
        # Three local steps a round: one per batch by hand, else one per two batches.
        if (step + 1) % (3 if manual else 6) == 0:
            average(modules)
            for optimizer in optimizers:
                optimizer.state.clear()
    for state in results:
        assert_equal_states(state, results[0], exactly=True)
        assert_equal_states(state, modules[0].state_dict())


def train_batch(module: Classifier, optimizer: Any, worker: int, step: int, *, manual: bool) -> None:
    if manual:
        for sign in (1, -1):
            optimizer.zero_grad()
            shard_by_shard(module, 2, worker, step, sign)
            optimizer.step()
        return
    if step % 2 == 0:
        optimizer.zero_grad()
    shard_by_shard(module, 2, worker, step)
    if step % 2:
        for parameter in module.parameters():
            assert parameter.grad is not None
            parameter.grad /= 2  # Lightning divides the loss by the number of batches
        optimizer.step()


def average(modules: list[Classifier]) -> None:
    states = [module.state_dict() for module in modules]
    for name, value in states[0].items():
        mean = torch.stack([state[name].double() for state in states]).mean(0).to(value.dtype)
        for state in states:
            state[name].copy_(mean)


def stop_two_by_two(rank: int, folder: Path) -> None:
    strategy = make_strategy(**TWO, snapshots=folder / "snapshots")
    callbacks = [SavesAt(str(folder), (4,)), Stops(5)]
    with pytest.raises((KeyError, WorkerLost)):
        make_trainer(strategy, max_epochs=EPOCHS, callbacks=callbacks).fit(Classifier(), stream(rank, BATCHES))


def resumed_as(rank: int, folder: Path, name: str, options: dict[str, Any]) -> list[str]:
    """The messages on files that do not fit, in a run that ``stop_two_by_two`` has begun."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make_trainer(make_strategy(**options), max_epochs=EPOCHS)
        module = Classifier(seed=3)
        trainer.fit(module, stream(rank, BATCHES), ckpt_path=folder / name)
        assert trainer.strategy.engine is not None
        assert trainer.strategy.engine.collective.workers == 4 // options.get("devices_per_worker", 1)
    assert all(torch.isfinite(tensor).all() for tensor in module.parameters())
    return [str(each.message) for each in caught if "own files" in str(each.message)]


@pytest.mark.parametrize("name", ["as four workers", "as one worker", "from snapshots, as four workers"])
def test_a_run_resumes_with_another_number_of_workers_and_members(name: str, found: Found) -> None:
    assert found[name] == [[]] * 4


class Fails(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_rank == 3 and batch_idx == 2:
            raise KeyError("a bad sample")
        return super().training_step(batch, batch_idx)


class Drifts(Classifier):
    def on_train_batch_end(self, *_: Any) -> None:
        if self.global_rank == 1:
            with torch.no_grad():
                next(self.net.parameters()).add_(1.0)


def error_of(rank: int, _: Path, kind: type[Classifier], **options: Any) -> BaseException | None:
    """The error with which a training ends, or None."""
    trainer = make_trainer(make_strategy("local_sgd", **TWO, **options), max_epochs=1)
    try:
        trainer.fit(kind("chain"), stream(rank, 6))
    except (KeyError, RuntimeError) as error:
        return error
    return None


def test_a_member_that_fails_ends_all_by_name_of_worker_and_rank(found: Found) -> None:
    *others, last = found["fails"]

    assert isinstance(last, KeyError)
    for error in others:
        assert isinstance(error, WorkerLost)
        assert "worker 1 (rank 3)" in str(error)


def test_members_that_hold_different_weights_are_named(found: Found) -> None:
    for error in found["drifts"]:
        assert isinstance(error, WorkersDisagree)
        assert "the members of worker 0 (ranks 0, 1) hold different weights (net." in str(error)


class WithUnused(Classifier):
    """A module with a layer that no step uses."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.unused = nn.Linear(2, 2)


def test_parameters_without_a_gradient_are_named_also_in_the_last_step_of_a_round(found: Found) -> None:
    for error in found["unused"]:
        assert isinstance(error, RuntimeError)
        assert "unused.weight" in str(error)
        assert "set find_unused_parameters=True" in str(error)
    assert found["unused and found"] == [None] * 4


class Thaws(Classifier):
    """Unfreezes its first layer in the middle of a round."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        first = next(self.net.parameters())
        first.requires_grad_(batch_idx >= 4)


def thaws(rank: int, _: Path) -> Tensor:
    module = Thaws("chain")
    make_trainer(make_strategy("local_sgd", **TWO, check="off"), max_epochs=1).fit(module, stream(rank, 6))
    return next(module.net.parameters()).detach()


def test_a_parameter_that_is_unfrozen_within_a_round_is_averaged_by_the_members(found: Found) -> None:
    modules = [Classifier("chain"), Classifier("chain")]
    optimizers = [module.configure_optimizers() for module in modules]
    for step in range(6):
        for worker, (module, optimizer) in enumerate(zip(modules, optimizers, strict=True)):
            next(module.net.parameters()).requires_grad_(step >= 4)
            optimizer.zero_grad()
            shard_by_shard(module, 2, worker, step)
            optimizer.step()
        if step % 3 == 2:
            average(modules)
            for optimizer in optimizers:
                optimizer.state.clear()

    for first in found["thaws"]:
        torch.testing.assert_close(first, next(modules[0].net.parameters()).detach())


@pytest.mark.parametrize(("devices", "options"), [(4, {"devices_per_worker": 3}), (3, {"devices_per_worker": 2})])
def test_uneven_numbers_are_refused_before_any_process_starts(devices: int, options: dict[str, Any]) -> None:
    trainer = L.Trainer(accelerator="cpu", devices=devices, strategy=make_strategy(**options), logger=False)
    with pytest.raises(ValueError, match=f"does not divide the {devices} processes"):
        trainer.fit(Classifier(), stream(0, 6))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="devices_per_worker=2: an AuxNet worker holds one stage"):
        AuxNetStrategy(devices_per_worker=2)
    with pytest.raises(ValueError, match="devices_per_worker=0 must be a whole number"):
        ISTStrategy(devices_per_worker=0)
    with pytest.raises(ValueError, match=r"sync_batchnorm=True contradicts local training.*devices_per_worker"):
        L.Trainer(accelerator="cpu", devices=2, strategy=make_strategy(), sync_batchnorm=True, logger=False)


def trained_ist(rank: int, _: Path) -> dict[str, Tensor]:
    module = Classifier("chain")
    make_trainer(make_strategy("ist", **TWO), max_epochs=1).fit(module, stream(rank, 7))
    return clone_state(module)


def test_neurons_of_workers_with_members(found: Found) -> None:
    config = NeuronConfig(local_steps=3, recalibration_batches=16)  # eight from each member
    simulator = NeuronSimulator(Classifier("chain"), lambda copy: copy.configure_optimizers(), config, 2)
    for step in range(7):
        for number, worker in enumerate(simulator.workers):
            module: Any = worker.module
            module.train()
            worker.optimizers[0].zero_grad()
            shard_by_shard(module, 2, number, step)
            worker.optimizers[0].step()
        simulator.after_step()
    results = found["neurons"]
    for state in results:
        assert_equal_states(state, results[0], exactly=True)
        assert_equal_states(state, clone_state(simulator.full_model()))


class Synchronised(Classifier):
    def on_fit_start(self) -> None:
        self.types = {type(norm) for norm in norms_of(self)}


def norms_of(module: nn.Module) -> list[_BatchNorm]:
    return [child for child in module.modules() if isinstance(child, _BatchNorm)]


def synchronised(rank: int, _: Path) -> tuple[set[type], list[_BatchNorm]]:
    """Without a step, which needs a GPU."""
    module, strategy = Synchronised("small"), make_strategy(**TWO)
    trainer = make_trainer(strategy, max_epochs=0, sync_batchnorm=True)
    strategy.resumer.set_state({"batch_statistics": True}, module)  # as after a training with batch_norm="batch"
    trainer.fit(module, stream(rank, 4))
    return module.types, norms_of(module)


def test_synchronised_batch_norm_is_as_before_when_a_fit_has_ended(found: Found) -> None:
    """It stayed in the user's module, which the next Trainer refused."""
    for types, norms in found["synchronised"]:
        assert types == {nn.SyncBatchNorm}
        assert len(norms) == 5
        for norm in norms:
            assert not isinstance(norm, nn.SyncBatchNorm)
            assert "forward" in vars(norm), "it evaluates by the statistics of each batch"


# Trainings in the same four processes.

EACH_STEP: dict[str, Any] = {"local_steps": 1, "check": "off"}

IN_TURN: dict[str, Callable[[int, Path], Any]] = {
    "accumulated": partial(trained, manual=False),
    "by hand": partial(trained, manual=True),
    "neurons": trained_ist,
    "synchronised": synchronised,
    "thaws": thaws,
    "stopped": stop_two_by_two,
    "as four workers": partial(resumed_as, name="4.ckpt", options={}),
    "as one worker": partial(resumed_as, name="4.ckpt", options={"devices_per_worker": 4}),
    "from snapshots, as four workers": partial(resumed_as, name="snapshots", options={}),
    "unused": partial(error_of, kind=WithUnused, **EACH_STEP),
    "unused and found": partial(error_of, kind=WithUnused, find_unused_parameters=True, **EACH_STEP),
    "drifts": partial(error_of, kind=Drifts),
    "fails": partial(error_of, kind=Fails),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """The results of all processes, by training."""
    folder = tmp_path_factory.mktemp("members")
    return run_in_turn({name: (train, (folder,)) for name, train in IN_TURN.items()}, 4)
