"""Users' hooks of the validation: their writes stay, and swapped weights come back (contract 16)."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.optim import SGD

from tests.helpers.plain import Classifier, held_out, stream
from tests.helpers.trainers import make_strategy, make_trainer, run_trainers
from tests.helpers.training import assert_equal_states, clone_state

KINDS = {"resist": "small", "local_sgd": "chain", "ist": "chain"}
STEPS = 7  # validations after 2, 4 and 6; rounds end with 3 and 6
EPOCH = 4


def train_all(worker: int, folder: str) -> dict[str, dict[str, Any]]:
    return {"swapped": train_in_all_ways(worker), "counted": count(worker, folder)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    """Each worker's results of all trainings in this file, by method."""
    return run_trainers(train_all, 2, str(tmp_path_factory.mktemp("trained")))


class Swapping(SGD):
    """``eval()`` shows the running mean of the weights, ``train()`` puts the trained ones back, exactly."""

    showing = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for parameter in self.held():
            mean = self.state[parameter].setdefault("mean", parameter.detach().clone())
            mean.lerp_(parameter, 0.2)
        return loss

    def held(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]

    def eval(self) -> None:
        self.swap(showing=True)

    def train(self) -> None:
        self.swap(showing=False)

    @torch.no_grad()
    def swap(self, *, showing: bool) -> None:
        if self.showing == showing:
            return
        self.showing = showing
        for parameter, state in self.state.items():
            if "mean" in state:
                shown = state["mean"].clone()
                state["mean"].copy_(parameter)
                parameter.copy_(shown)


class Scored(Classifier):
    """Notes the weights in validations."""

    def __init__(self, face: str, swaps: str = "") -> None:
        super().__init__(kind=KINDS[face])
        self.swaps = swaps
        self.trained: list[Tensor] = []
        self.shown: list[Tensor] = []
        self.seen: list[Tensor] = []

    def weights(self) -> Tensor:
        """Weights of the last layer, which all workers hold."""
        return list(self.net.parameters())[-1].detach().clone()

    def configure_optimizers(self) -> Any:
        return Swapping(self.parameters(), 0.05) if self.swaps else SGD(self.parameters(), 0.05)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if batch_idx == 0:
            self.seen.append(self.weights())

    def on_validation_start(self) -> None:
        self.trained.append(self.weights())
        self.swap("start", "eval")
        self.shown.append(self.weights())

    def on_validation_epoch_start(self) -> None:
        self.swap("epoch", "eval")

    def on_validation_epoch_end(self) -> None:
        self.swap("epoch", "train")

    def on_validation_end(self) -> None:
        self.swap("start", "train")

    def swap(self, where: str, method: str) -> None:
        if self.swaps.startswith(where):
            optimizer: Any = self.optimizers()
            getattr(optimizer if "wrapped" in self.swaps else optimizer.optimizer, method)()


class Average(L.Callback):
    """An exponential average of the worker's parameters, shown in validations. A sync restarts it."""

    def __init__(self) -> None:
        self.average: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        for name, parameter in module.named_parameters():
            if not parameter.is_meta:
                old = self.average.get(name)
                new = parameter.detach().clone()
                self.average[name] = new if old is None or old.shape != new.shape else old.lerp(new, 0.2)

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        named = {name: parameter for name, parameter in module.named_parameters() if not parameter.is_meta}
        self.kept = {name: parameter.detach().clone() for name, parameter in named.items()}
        for name, parameter in named.items():
            if name in self.average:
                parameter.data.copy_(self.average[name])

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        for name, parameter in module.named_parameters():
            if name in self.kept:
                parameter.data.copy_(self.kept[name])


SWAPS = {
    "a module's hooks": "start",
    "a module's hooks, by Lightning's optimizer": "start, wrapped",
    "hooks inside the validation": "epoch",
    "hooks inside the validation, by Lightning's optimizer": "epoch, wrapped",
    "a callback's hooks": "",
}
WAYS = {
    "resist": ("a module's hooks", "hooks inside the validation, by Lightning's optimizer", "a callback's hooks"),
    "local_sgd": ("a module's hooks, by Lightning's optimizer", "hooks inside the validation"),
    "ist": ("a module's hooks", "hooks inside the validation, by Lightning's optimizer", "a callback's hooks"),
}


def train(
    worker: int, face: str, how: str, validate: bool = True
) -> tuple[dict[str, Tensor], list[Tensor], list[Tensor]]:
    module = Scored(face, SWAPS[how])
    trainer = make_trainer(
        make_strategy(face, **({"batch_norm": "running"} if face != "local_sgd" else {})),
        max_epochs=1,
        callbacks=[] if SWAPS[how] else [Average()],
        val_check_interval=2 if validate else 1.0,
        limit_val_batches=1.0 if validate else 0,
    )
    trainer.fit(module, stream(worker, STEPS), held_out(worker))
    if validate and "start" in SWAPS[how]:
        assert not all(map(torch.equal, module.trained, module.shown))
    return clone_state(module), module.shown, module.seen


def train_in_all_ways(worker: int) -> dict[str, dict[str, Any]]:
    """For each method the results without validations, where nothing is ever shown, and with them, in each way."""
    found: dict[str, dict[str, Any]] = {}
    for face, ways in WAYS.items():
        found[face] = {how: train(worker, face, how) for how in ways}
        found[face]["plain"] = train(worker, face, "a callback's hooks", validate=False)
    return found


@pytest.mark.parametrize("face", WAYS)
def test_swapped_weights_are_averaged_and_come_back(trained: Any, face: str) -> None:
    """Training is bit for bit as without validations, in which all workers see the mean of their swapped weights."""
    first, second = (found["swapped"][face] for found in trained)
    for how in WAYS[face]:
        for found in (first, second):
            assert_equal_states(found[how][0], found["plain"][0], exactly=True)
        (_, shown, seen), (_, shown_too, seen_too) = first[how], second[how]
        assert len(seen) == 3
        assert all(map(torch.equal, seen, seen_too))
        if "inside" not in how:
            for mine, theirs, mean in zip(shown, shown_too, seen, strict=True):
                torch.testing.assert_close((mine + theirs) / 2, mean)
    outside, inside = (first[how] for how in WAYS[face][:2])
    assert all(map(torch.equal, inside[2], outside[2]))


# Buffers


class Counting(Classifier):
    """Counts in buffers during validations."""

    def __init__(self, face: str = "resist") -> None:
        super().__init__(kind=KINDS[face])
        self.face = face
        self.register_buffer("best", torch.zeros(()))
        self.register_buffer("seen_images", torch.zeros((), dtype=torch.long))
        self.register_buffer("matrix", torch.zeros(2, 2), persistent=False)
        self.register_buffer("threshold", torch.tensor(0.5))
        self.threshold_of_epochs = torch.nn.Parameter(torch.zeros(()), requires_grad=False)
        self.counter.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.history: list[list[float]] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.seen_images += len(batch[1])
        self.matrix.data[0, 1] += 1.0
        self.counter.count += 1

    def on_validation_epoch_end(self) -> None:
        self.best.fill_(max(float(self.best), 0.5 + 0.25 * self.current_epoch))
        self.threshold = torch.tensor(0.75)
        self.threshold_of_epochs.add_(1)

    def on_train_epoch_end(self) -> None:
        self.history.append(self.written())

    @property
    def counter(self) -> Any:
        """A module that only one worker has if blocks are partitioned."""
        return self.net.section3[2] if hasattr(self.net, "section3") else self.net

    def written(self) -> list[float]:
        count = self.counter.count
        return [
            *(float(self.best), float(self.seen_images), float(self.matrix[0, 1]), float(self.threshold)),
            *(float(self.threshold_of_epochs), -1.0 if count.is_meta else float(count)),
        ]


class AtTheEnd(L.Callback):
    """Resets a batch-norm statistic, a write of which must not stay."""

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        if isinstance(module, Counting):
            next(child for child in module.modules() if hasattr(child, "running_mean")).running_mean.fill_(7.0)


def count(worker: int, folder: str) -> dict[str, dict[str, Any]]:
    return {face: count_by(worker, face, f"{folder}/{face}") for face in KINDS}


def count_by(worker: int, face: str, folder: str) -> dict[str, Any]:
    module, saving = Counting(face), ModelCheckpoint(folder, "middle", every_n_epochs=2)
    options = {"max_epochs": 3, "callbacks": [AtTheEnd(), saving], "enable_checkpointing": True}
    make_trainer(make_strategy(face), **options).fit(module, stream(worker, EPOCH), held_out(worker))
    watched, plain = clone_state(module), Counting(face)
    make_trainer(make_strategy(face), max_epochs=3, limit_val_batches=0).fit(plain, stream(worker, EPOCH))
    resumed = Counting(face)
    options |= {"callbacks": [AtTheEnd()], "enable_checkpointing": False}
    make_trainer(make_strategy(face), **options).fit(
        resumed, stream(worker, EPOCH, start=2 * EPOCH), held_out(worker), ckpt_path=f"{folder}/middle.ckpt"
    )
    return {
        "history": module.history,
        "end": module.written(),
        "resumed": resumed.written(),
        "watched": watched,
        "plain": clone_state(plain),
        "resumed state": clone_state(resumed),
    }


@pytest.mark.parametrize("face", KINDS)
def test_buffers_that_a_validation_writes_stay_written_and_nothing_else_does(trained: Any, face: str) -> None:
    """As in one process, with two batches of eight images in each of three validations; also from checkpoints."""
    expected = [[0.5 + 0.25 * epoch, 16.0 * (epoch + 1), 2.0 * (epoch + 1), 0.75, epoch + 1.0] for epoch in range(3)]
    for found in (each["counted"][face] for each in trained):
        assert [row[:5] for row in found["history"]] == expected
        for epoch, row in enumerate(found["history"]):
            assert row[5] in (2.0 * (epoch + 1), -1.0)  # -1 if another worker holds the block
        assert found["end"] == found["resumed"] == [*expected[-1], 6.0]
        weights = {
            name: value for name, value in found["plain"].items() if name.startswith("net") and "count" not in name
        }
        assert_equal_states({name: found["watched"][name] for name in weights}, weights, exactly=True)
        assert_equal_states(found["resumed state"], found["watched"], exactly=True)
