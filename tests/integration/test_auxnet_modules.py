"""``Trainer(strategy="auxnet")``: unusual modules that once hung, stopped, or let the workers diverge silently."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from resist_lightning import StageSelectionError
from tests.helpers.auxnet import LATE, SERIAL, fit_stages, in_order, make_stages, pictures
from tests.helpers.plain import BATCH_SIZE, CLASSES, Classifier
from tests.helpers.trainers import make_trainer, run_in_turn, run_trainers
from tests.integration.test_auxnet_traps import CUTS, Found, is_sound, small_module

# ------------------------------------------------------------------ manual optimization


class TwoBackwards(Classifier):
    """Two losses, with a backward pass each."""

    def __init__(self) -> None:
        super().__init__("chain")
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        output = self.net(batch[0])
        self.manual_backward(functional.cross_entropy(output, batch[1]), retain_graph=True)
        self.manual_backward(output.square().mean())
        optimizer.step()


def train_twice(worker: int) -> list[str]:
    """The errors of two trainings, one after the other."""
    errors = []
    for how in (LATE, SERIAL):
        with pytest.raises(RuntimeError) as raised:
            fit_stages(worker, TwoBackwards(), {**CUTS, **how})
        errors.append(str(raised.value))
    return errors


def test_a_second_backward_pass_is_told_on_all_workers_within_seconds() -> None:
    begin = time.monotonic()
    for late, serial in run_trainers(train_twice, 2, timeout=40):
        assert "Add the losses up, and call backward once" in late
        assert "Add the losses up, and call backward once" in serial
    assert time.monotonic() - begin < 30


class TwoOptimizers(Classifier):
    """Two optimizers, for every second parameter each; notes the number of parameters with state in them."""

    def __init__(self) -> None:
        super().__init__("chain")
        self.automatic_optimization = False
        self.strange: list[int] = []
        self.known: list[int] = []

    def configure_optimizers(self) -> Any:
        parameters = list(self.parameters())
        return [torch.optim.SGD(parameters[::2], 0.05, momentum=0.9), torch.optim.AdamW(parameters[1::2], 1e-3)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        states = [optimizer.state for optimizer in optimizers]
        self.strange += [sum(p.is_meta for p in state) for state in states]
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in optimizers:
            optimizer.step()
        self.known = [len(state) for state in states]


def two_optimizers(worker: int, path: str) -> tuple[list[int], list[int]]:
    module = TwoOptimizers()
    fit_stages(worker, module, CUTS, max_epochs=2, ckpt_path=path)
    return module.strange, module.known


def test_state_of_parameters_that_are_absent_is_dropped_in_every_optimizer(tmp_path: Path) -> None:
    """Such state comes from a checkpoint of plain Lightning."""
    alone = make_trainer("auto", max_epochs=1)
    alone.fit(TwoOptimizers(), in_order(pictures()))
    alone.save_checkpoint(tmp_path / "alone.ckpt")

    found = run_trainers(two_optimizers, 2, str(tmp_path / "alone.ckpt"))

    assert all(strange and not any(strange) for strange, _ in found)
    count = len(list(TwoOptimizers().parameters()))
    assert sum(sum(known) for _, known in found) == count


# ------------------------------------------------------------------ one pixel, and one sample


class PoolsAtOnce(Classifier):
    """A network with one pixel at the boundary."""

    def __init__(self) -> None:
        super().__init__()
        stem = (nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.net = nn.Sequential(*stem, nn.Conv2d(6, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8, CLASSES))


def one_left(worker: int, _: Path) -> list[tuple[bool, int]]:
    found = []
    for method in ("delayed", "penalty", "al-net", "penalty-store"):
        module = PoolsAtOnce()
        options = {"cuts": ["2"], "method": method}
        trainer = fit_stages(worker, module, options, pictures(samples=BATCH_SIZE + 1), max_epochs=3)
        found.append((is_sound(module), trainer.global_step))
    return found


def test_a_last_batch_may_be_smaller_and_have_one_sample(found: Found) -> None:
    assert found["one sample"] == [[(True, 6)] * 4] * 2


# ------------------------------------------------------------------ a module that is compiled


def compiled(worker: int, _: Path) -> tuple[int, bool]:
    module = small_module()
    made: Any = torch.compile(module, backend="eager")
    trainer = make_trainer(make_stages(**CUTS), max_epochs=1, use_distributed_sampler=True)
    trainer.fit(made, pictures())
    return trainer.global_step, is_sound(module)


def test_a_module_that_is_compiled_trains(found: Found) -> None:
    assert found["compiled"] == [(5, True)] * 2


# ------------------------------------------------------------------ numbers that follow a schedule


class Gate(nn.Module):
    """Adds a share of a layer, with dropout; no residual block that is recognised."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.layer, self.alpha = nn.Linear(width, width), 0.0

    def forward(self, x: Tensor) -> Tensor:
        x = functional.dropout(x, 0.1, self.training)
        return x + self.alpha * torch.tanh(self.layer(x))


class Gated(Classifier):
    """Opens its gates in the third epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), Gate(), Gate(), nn.Linear(6, CLASSES))

    def on_train_epoch_start(self) -> None:
        for gate in self.net[2:4]:
            gate.alpha = float(self.current_epoch > 1)


def opened(worker: int, _: Path) -> tuple[str, int]:
    module = Gated()
    with pytest.raises(StageSelectionError) as error:
        fit_stages(worker, module, {"cuts": ["2"]}, validation=pictures(), max_epochs=4)
    return str(error.value), module.global_step


def test_a_number_that_follows_a_schedule_is_told_when_it_changes(found: Found) -> None:
    """Stages trained to the end with the number from the start; validations, which change the mode, are no change."""
    for error, steps in found["a schedule"]:
        assert "reads net.2.alpha, which was 0.0 when the network was cut into stages and is 1.0 now" in error
        assert steps == 10


# ------------------------------------------------------------------ random numbers of stages and of the rest


class Mixed(Classifier):
    """Draws in the first stage, in a layer outside of the network, and in its step; notes losses and that layer."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            layers = (nn.Linear(192, 8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
            self.net = nn.Sequential(nn.Flatten(), *layers)
            self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(8, CLASSES))
        self.notes: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        mixed = 0.7 * images + 0.3 * images[torch.randperm(len(images))]
        loss = functional.cross_entropy(self.head(self.net(mixed)), labels)
        self.notes += [loss.item(), self.head[1].weight.norm().item()]
        return loss


def mixing(worker: int, _: Path) -> list[float]:
    found = []
    for method in ("delayed", "penalty"):
        module = Mixed()
        torch.manual_seed(6)
        options = {"network": "net", "cuts": ["3"], "method": method, "check_every_n_steps": 99}
        fit_stages(worker, module, options, max_epochs=2)
        found += module.notes
    return found


def test_what_stages_draw_leaves_the_other_random_numbers_equal_on_all_workers(found: Found) -> None:
    """Stages with dropout moved the generators unequally: mixed inputs and layers outside differed in silence."""
    mine, theirs = found["random numbers"]
    assert mine == theirs
    assert len(set(mine[:20])) == 20
    assert len(mine) == 40


# ------------------------------------------------------------------ inputs that the step changes


class Flattens(Classifier):
    """Gives the network another shape than a batch has."""

    def __init__(self, example: Tensor | None) -> None:
        super().__init__()
        self.example_input_array = example
        self.net = nn.Sequential(nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, CLASSES))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step((batch[0].flatten(1), batch[1]), batch_idx)


def flattening(worker: int, _: Path) -> tuple[str, int]:
    with pytest.raises(StageSelectionError) as error:
        fit_stages(worker, Flattens(None))
    return str(error.value), fit_stages(worker, Flattens(torch.zeros(1, 192))).global_step


def test_an_input_that_the_step_changes_is_shown_by_the_modules_example(found: Found) -> None:
    for error, steps in found["inputs"]:
        assert "for a network input of torch.float32 and shape (8, 3, 8, 8)" in error
        assert "where training_step changes it first, set example_input_array" in error
        assert steps == 5


# ------------------------------------------------------------------ trainings in the same two processes

IN_TURN = {
    "one sample": one_left,
    "compiled": compiled,
    "a schedule": opened,
    "random numbers": mixing,
    "inputs": flattening,
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """The results of both workers, by training."""
    folder = tmp_path_factory.mktemp("modules")
    return run_in_turn({name: (train, (folder,)) for name, train in IN_TURN.items()}, 2)
