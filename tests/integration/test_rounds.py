"""Counting of local steps, and positions of syncs (contract 11), against separately written plain loops."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional

from resist_lightning.methods.resist.network import select_blocks
from tests.helpers.plain import Classifier, batch_of, held_out, make_net
from tests.helpers.trainers import fit, loop_by_hand, run_trainers_and_by_hand
from tests.helpers.training import assert_equal_states, clone_state


class Notes(L.Callback):
    """Notes the round and the local step at the end of every batch."""

    def __init__(self) -> None:
        self.clock: list[tuple[int, int]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        engine = trainer.strategy.engine
        self.clock.append((engine.clock.round, engine.clock.step))


def assert_all_equal(results: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    for result in results:
        assert_equal_states(result, expected[0], exactly=True)


def by_trainers(worker: int) -> dict[str, Any]:
    trainings: tuple[Callable[[int], Any], ...] = (accumulate, play, overflow, scale, chat, schedule, train_in_epochs)
    return {training.__name__: training(worker) for training in trainings}


def by_hand(worker: int) -> dict[str, Any]:
    return {
        "accumulate": accumulate_by_hand(worker),
        "play": play_by_hand(worker),
        "overflow": overflow_by_hand(worker),
        "scale": train_unscaled_by_hand(worker),
        "schedule": schedule_by_hand(worker),
    }


@pytest.fixture(scope="module")
def trained() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Each worker's results of all trainings in this file, by the Trainer and by hand."""
    return run_trainers_and_by_hand(by_trainers, by_hand, 2)


def results_of(trained: Any, name: str) -> tuple[list[Any], list[Any]]:
    """Each worker's result of a training, by the Trainer and by hand."""
    results, expected = trained
    return [found[name] for found in results], [found[name] for found in expected if name in found]


# Gradient accumulation: epochs of five batches, two batches a step, so that steps fall on batches 2, 4 and 5.


def accumulate(worker: int) -> tuple[dict[str, Tensor], list[tuple[int, int]]]:
    module, notes = Classifier("small"), Notes()
    fit(worker, module, 5, accumulate_grad_batches=2, max_epochs=2, callbacks=[notes], gradient_clip_val=0.5)
    return clone_state(module), notes.clock


def accumulate_by_hand(worker: int) -> dict[str, Tensor]:
    module = Classifier("small")
    optimizer = module.configure_optimizers()

    def train_step(numbers: tuple[int, ...]) -> None:
        optimizer.zero_grad()
        for number in numbers:
            (module.training_step(batch_of(worker, number), 0) / 2).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        optimizer.step()

    return loop_by_hand(module, [optimizer], [(0, 1), (2, 3), (4,), (5, 6), (7, 8), (9,)], train_step)


def test_with_gradient_accumulation_a_round_counts_optimizer_steps(trained: Any) -> None:
    results, expected_states = results_of(trained, "accumulate")

    assert_all_equal([state for state, _ in results], expected_states)
    # The sync of round 0, complete with batch 5, comes with the next batch.
    expected = [(0, 0), (0, 1), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 1), (1, 2), (1, 3)]
    assert [clock for _, clock in results] == [expected] * 2


# Manual optimization: two networks, two optimizers, one of which steps twice in every batch.


class TwoPlayers(L.LightningModule):
    """Two networks that train against each other, like a GAN, with Lightning's optimizers or raw ones."""

    def __init__(self, raw: bool = False) -> None:
        super().__init__()
        self.raw = raw
        self.automatic_optimization = False
        self.player = make_net("small", seed=1)
        self.rival = make_net("small", seed=2)
        self.changed: list[int] = []

    def losses(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        mine, theirs = self.player(batch[0]), self.rival(batch[0])
        return functional.cross_entropy(mine, batch[1]), functional.mse_loss(theirs, mine.detach())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        present = [parameter.is_meta for parameter in self.parameters()]
        first, second = self.optimizers(use_pl_optimizer=not self.raw)
        for optimizer, number in ((first, 0), (second, 1), (second, 1)):
            others = [p for group in (second, first)[number].param_groups for p in group["params"] if not p.is_meta]
            before = [parameter.detach().clone() for parameter in others]
            optimizer.zero_grad()
            self.manual_backward(self.losses(batch)[number])
            optimizer.step()
            self.changed += [i for i, pair in enumerate(zip(others, before, strict=True)) if not torch.equal(*pair)]
            self.changed += [-1] if present != [parameter.is_meta for parameter in self.parameters()] else []

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.SGD(self.player.parameters(), 0.05, momentum=0.9),
            torch.optim.SGD(self.rival.parameters(), 0.02, momentum=0.9),
        ]


def play(worker: int) -> list[tuple[dict[str, Tensor], list[tuple[int, int]], list[int]]]:
    found = []
    for raw in (False, True):
        module, notes = TwoPlayers(raw), Notes()
        fit(worker, module, 5, callbacks=[notes])
        found.append((clone_state(module), notes.clock, module.changed))
    return found


def play_by_hand(worker: int) -> dict[str, Tensor]:
    module = TwoPlayers()
    first, second = module.configure_optimizers()

    def train_step(step: int) -> None:
        for optimizer, number in ((first, 0), (second, 1), (second, 1)):
            optimizer.zero_grad()
            module.losses(batch_of(worker, step))[number].backward()
            optimizer.step()

    return loop_by_hand(module, [first, second], range(5), train_step)


def test_with_two_optimizers_a_batch_is_one_local_step_and_nothing_changes_within_it(trained: Any) -> None:
    by_worker, expected_states = results_of(trained, "play")

    results = list(itertools.chain(*by_worker))
    assert_all_equal([state for state, *_ in results], expected_states)
    expected = [(number // 3, number % 3 + 1) for number in range(5)]
    assert [clock for _, clock, _ in results] == [expected] * 4
    assert [changed for *_, changed in results] == [[]] * 4


# Mixed precision: the loss of worker 1 overflows in its second batch, so its scaler skips a step and halves its scale.


class Overflowing(Classifier):
    def __init__(self) -> None:
        super().__init__("small")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        worker, number = batch_idx
        loss = super().training_step(batch, number)
        return loss * float("inf") if (worker, number) == (1, 1) else loss


class OverflowingUnderLightning(Overflowing):
    def __init__(self, worker: int) -> None:
        super().__init__()
        self.worker = worker
        self.scales: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.scales.append(self.trainer.precision_plugin.scaler.get_scale())
        return super().training_step(batch, (self.worker, batch_idx))


SCALE = 1024.0


def scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=1000)


def overflow(worker: int) -> tuple[dict[str, Tensor], list[float]]:
    module = OverflowingUnderLightning(worker)
    plugin = MixedPrecision("16-mixed", "cpu", scaler())
    plugin.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)  # only the scaler is of interest
    fit(worker, module, 5, plugins=[plugin])
    return clone_state(module), module.scales


def overflow_by_hand(worker: int) -> dict[str, Tensor]:
    module = Overflowing()
    optimizer, scales = module.configure_optimizers(), scaler()

    def train_step(step: int) -> None:
        optimizer.zero_grad()
        scales.scale(module.training_step(batch_of(worker, step), (worker, step))).backward()
        scales.step(optimizer)
        scales.update(512.0 if step == 2 else None)  # agreed on at the first sync

    return loop_by_hand(module, [optimizer], range(5), train_step)


def test_a_step_that_a_grad_scaler_skips_counts_and_the_scales_are_agreed_at_the_sync(trained: Any) -> None:
    results, expected = results_of(trained, "overflow")

    assert_all_equal([state for state, _ in results], expected)
    assert [scales for _, scales in results] == [[1024.0] * 3 + [512.0] * 2, [1024.0] * 2 + [512.0] * 3]


# A gradient scaler, clipping, and an optimizer whose parameters are all absent on one worker in some rounds.

LARGEST = 0.01  # of an entry of a clipped gradient


class OneForABlock(Classifier):
    def __init__(self) -> None:
        super().__init__("small")
        self.automatic_optimization = False

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        (block, *_) = select_blocks(self.net)
        own = list(block.module.parameters())
        others = [parameter for parameter in self.parameters() if all(parameter is not p for p in own)]
        return [torch.optim.SGD(parameters, 0.05, momentum=0.9) for parameters in (own, others)]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in self.optimizers():
            self.clip_gradients(optimizer, SCALE * LARGEST, "value")
            optimizer.step()
            optimizer.zero_grad()


def scale(worker: int) -> dict[str, Tensor]:
    module = OneForABlock()
    plugin = MixedPrecision("16-mixed", "cpu", scaler())
    plugin.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)
    fit(worker, module, 5, plugins=[plugin])
    return clone_state(module)


def train_unscaled_by_hand(worker: int) -> dict[str, Tensor]:
    module = OneForABlock()
    optimizers = module.configure_optimizers()

    def train_step(step: int) -> None:
        Classifier.training_step(module, batch_of(worker, step), step).backward()
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter.grad.clamp_(-LARGEST, LARGEST)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return loop_by_hand(module, optimizers, range(5), train_step)


def test_a_grad_scaler_and_clipping_pass_over_an_optimizer_whose_parameters_are_absent(trained: Any) -> None:
    """Torch refuses to clip no gradients by value."""
    results, expected = results_of(trained, "scale")
    assert_all_equal(results, expected)  # scales are powers of two


# Messages within a step, seen by the strategy or not.


class Chatting(Classifier):
    def __init__(self) -> None:
        super().__init__("small")
        self.shapes: list[tuple[int, ...]] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if batch_idx < 2:
            self.shapes.append(tuple(self.all_gather(loss).shape))
        elif batch_idx < 4:
            loss = self.all_gather(loss, sync_grads=True).mean()
        else:
            torch.distributed.all_reduce(loss.detach().clone())
        return loss


def chat(worker: int) -> tuple[list[str], list[tuple[int, ...]]]:
    module = Chatting()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(worker, module, 7)
    words = ("self.all_gather in training", "self.all_gather(sync_grads=True)", "something sends messages")
    return [word for word in words for warning in told if str(warning.message).startswith(word)], module.shapes


def test_messages_within_a_step_are_named_once(trained: Any) -> None:
    (told, shapes), (_, others) = results_of(trained, "chat")[0]
    assert told == ["self.all_gather in training", "self.all_gather(sync_grads=True)", "something sends messages"]
    assert shapes == others == [(2,), (2,)]


# Learning rates: halved every two steps, and a tenth after every epoch on a plateau.


class Scheduled(Classifier):
    def __init__(self) -> None:
        super().__init__("small")
        self.rates: list[float] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.rates.append(self.optimizers().param_groups[0]["lr"])

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        by_step = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        # No loss improves by so much: the rate falls after every epoch but the first.
        on_plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=0.1, patience=0, threshold=1e9, threshold_mode="abs"
        )
        return [optimizer], [
            {"scheduler": by_step, "interval": "step"},
            {"scheduler": on_plateau, "monitor": "val/loss"},
        ]


RATES = [0.05 * 0.5 ** (step // 2) * 0.1 ** max(step // 4 - 1, 0) for step in range(12)]


def schedule(worker: int) -> tuple[dict[str, Tensor], list[float]]:
    module = Scheduled()
    fit(worker, module, 4, max_epochs=3, val_dataloaders=held_out(worker))
    return clone_state(module), module.rates


def schedule_by_hand(worker: int) -> dict[str, Tensor]:
    module = Classifier("small")
    optimizer = module.configure_optimizers()

    def train_step(rate: tuple[int, float]) -> None:
        step, optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        module.training_step(batch_of(worker, step), step).backward()
        optimizer.step()

    return loop_by_hand(module, [optimizer], enumerate(RATES), train_step)


def test_learning_rate_schedules_go_on_across_syncs(trained: Any) -> None:
    results, expected = results_of(trained, "schedule")

    for _, rates in results:
        assert rates == RATES
    assert_all_equal([state for state, _ in results], expected)


# Epochs: a border of an epoch is no border of a round.


def train_in_epochs(worker: int) -> list[tuple[dict[str, Tensor], list[tuple[int, int]]]]:
    results = []
    for length in (20, 1):
        module, notes = Classifier("small"), Notes()
        fit(worker, module, length, max_epochs=-1, max_steps=8, callbacks=[notes])
        results.append((clone_state(module), notes.clock))
    return results


def test_rounds_run_across_the_borders_of_epochs(trained: Any) -> None:
    """Epochs of four batches are in ``test_fit``."""
    results = results_of(trained, "train_in_epochs")[0]

    in_one_epoch, clock = results[0][0]
    assert clock == [(number // 3, number % 3 + 1) for number in range(8)]
    for state, same_clock in [*results[0], *results[1]]:
        assert_equal_states(state, in_one_epoch, exactly=True)
        assert same_clock == clock
