"""``Trainer(strategy="auxnet")``: unchanged modules train, and their metrics are true on every worker."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.models import VisionTransformer
from torchvision.models.resnet import Bottleneck, ResNet

from tests.helpers.auxnet import CUTS, GUESSES, LATE, SERIAL, Metered, Notes, fit_plainly, fit_stages, pictures, told
from tests.helpers.plain import CLASSES, Classifier, held_out
from tests.helpers.trainers import run_cases, run_trainers, traces
from tests.helpers.training import assert_equal_states, clone_state

State = dict[str, Tensor]


class OfTorchvision(Metered):
    """A user's first choice: a ResNet of torchvision, here with a million weights."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.net = ResNet(Bottleneck, [1, 1, 1, 1], num_classes=CLASSES, width_per_group=4)


class TransformerOfTorchvision(Metered):
    """A vision transformer, whose boundary is a sequence with a class token."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            self.net = VisionTransformer(8, 4, 3, 2, 8, 16, num_classes=CLASSES)


class HeadOutside(Metered):
    """A residual backbone, and a layer outside that all workers compute and train alike."""

    def __init__(self) -> None:
        super().__init__("preact")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            self.head = nn.Sequential(nn.BatchNorm1d(CLASSES), nn.Linear(CLASSES, CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(super().forward(images))


class Itself(Metered):
    """A module that is the network, with a loss of its own: class weights, and a temperature that trains."""

    def __init__(self) -> None:
        super().__init__()
        del self.net
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(6)
            self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in ((192, 8), (8, 8), (8, CLASSES)))
        self.criterion = nn.CrossEntropyLoss(weight=torch.arange(1.0, 1 + CLASSES))
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        hidden = images.flatten(1)
        for layer in self.layers:
            hidden = layer(torch.tanh(hidden))
        return hidden

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.criterion(self(batch[0]) / self.temperature, batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss


class FrozenStart(Metered):
    """A network whose first stage does not train."""

    def __init__(self) -> None:
        super().__init__()
        self.net[:5].requires_grad_(False)


class Scheduled(Metered):
    """With a learning rate that falls in every step."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Plateau(HeadOutside):
    """With dicts as batches, and a learning rate that falls after an epoch in which a metric has not fallen enough."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step((batch["image"], batch["label"]), batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0, mode="min")
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "loss_epoch"}}


def by_names(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    images, labels = zip(*samples, strict=True)
    weights = [torch.ones(2)] * len(samples)
    return {"weight": torch.stack(weights), "label": torch.stack(labels), "image": torch.stack(images)}


def named_pictures() -> Any:
    loader = pictures()
    return torch.utils.data.DataLoader(loader.dataset, loader.batch_size, shuffle=True, collate_fn=by_names)


@dataclass(frozen=True)
class Fit:
    """A training and its settings."""

    module: Callable[[], L.LightningModule] = Metered
    workers: int = 2
    strategy: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    loader: Callable[[], Any] = pictures
    steps: int = 10


CLIPPED: dict[str, Any] = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}

FITS = {
    "three workers, named batches, a head outside, a rate that falls by a metric, clipped": Fit(
        Plateau,
        workers=3,
        strategy={"cuts": ["section2", "section3.2"], "input": "image"},
        options={"limit_train_batches": 4, **CLIPPED},
        loader=named_pictures,
        steps=8,
    ),
    "a resnet of torchvision": Fit(
        OfTorchvision,
        strategy={"cuts": ["net.layer2"]},
        options={"max_epochs": 1, "limit_train_batches": 3},
        steps=3,
    ),
    "a vision transformer of torchvision, guesses by default": Fit(
        TransformerOfTorchvision, strategy={"method": "penalty"}, options={"max_epochs": 1}, steps=5
    ),
    "the module itself, with parts that its forward leaves to the loss": Fit(Itself, strategy={"cuts": ["layers.0"]}),
    "nothing trained in the first stage, gradients that add up, clipped": Fit(
        FrozenStart,
        strategy={"method": "penalty", "cuts": CUTS[2]},
        options={"accumulate_grad_batches": 2, **CLIPPED},
        steps=6,
    ),
    "a rate that falls with the steps, limited, in double precision": Fit(
        Scheduled,
        strategy={"method": "al-net"},
        options={"limit_train_batches": 3, "max_epochs": -1, "max_steps": 5, "precision": "64-true"},
        steps=5,
    ),
}


def by_stages(worker: int, case: Fit, strategy: dict[str, Any]) -> dict[str, Any]:
    module, notes = case.module(), Notes()
    options = {"max_epochs": 2, "callbacks": [notes], **case.options}
    trainer = fit_stages(worker, module, {**case.strategy, **strategy}, case.loader(), **options)
    return {
        "state": clone_state(module),
        "metrics": notes.metrics,
        "logged": {key: float(value) for key, value in trainer.callback_metrics.items()},
        "held": notes.held,
        "steps": trainer.global_step,
        "traces": traces(module),
        "group left": dist.is_initialized(),
        "rates": [group["lr"] for group in trainer.optimizers[0].param_groups],
    }


def plainly(worker: int, case: Fit) -> dict[str, Any]:
    module, notes = case.module(), Notes()
    options = {"max_epochs": 2, "callbacks": [notes], **case.options}
    trainer = fit_plainly(worker, module, case.loader(), **options)
    return {
        "state": clone_state(module),
        "metrics": notes.metrics,
        "logged": {key: float(value) for key, value in trainer.callback_metrics.items()},
        "rates": [group["lr"] for group in trainer.optimizers[0].param_groups],
    }


def both_ways(worker: int, case: Fit, _: str) -> tuple[dict[str, Any], dict[str, Any]]:
    waiting = by_stages(worker, case, {"warmup_steps": 99, "batch_norm": "running"})
    return waiting, by_stages(worker, case, {"warmup_steps": 1})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return run_cases(both_ways, FITS, tmp_path_factory.mktemp("fits"))


@pytest.mark.parametrize("name", FITS)
def test_modules_train_unchanged_and_what_they_log_is_true(name: str, trained: dict[str, list[Any]]) -> None:
    """Stages that wait for each other train as one process does; others end with one model and equal metrics."""
    case, results = FITS[name], trained[name]
    assert len(results) == case.workers
    plain = plainly(0, case)
    assert len(plain["metrics"]) >= case.steps
    for waiting, _ in results:
        assert_equal_states(waiting["state"], plain["state"])
        assert waiting["rates"] == pytest.approx(plain["rates"])
        for mine, theirs in zip(waiting["metrics"], plain["metrics"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)
        assert waiting["logged"] == pytest.approx(plain["logged"], rel=1e-4, abs=1e-5)
    for _, at_once in results:
        assert_trained_at_once(at_once, results[0][1], plain, case)
    names = [name for name, _ in case.module().named_parameters()]
    for worker_results in results:
        for result in worker_results:
            assert result["steps"] == case.steps
            assert result["traces"] == []
            assert not result["group left"]
            assert 0 < len(result["held"][0]) < len(names)
    assert {name for waiting, _ in results for name in waiting["held"][-1]} == set(names)


def assert_trained_at_once(result: dict[str, Any], first: dict[str, Any], plain: dict[str, Any], case: Fit) -> None:
    """Check that a result equals the first worker's, and differs from one process's after the one step of warm-up."""
    assert_equal_states(result["state"], first["state"], exactly=True)
    for what in ("metrics", "logged", "rates"):
        assert result[what] == first[what]
    assert result["metrics"][0] == pytest.approx(plain["metrics"][0], rel=1e-4, abs=1e-5)
    assert result["metrics"][-1]["loss_step"] != pytest.approx(plain["metrics"][-1]["loss_step"], rel=1e-3)
    for name, before in case.module().named_parameters():
        after = result["state"][name]
        assert after.isfinite().all()
        assert before.requires_grad != torch.equal(after, before.to(after)), name


def alone(worker: int) -> tuple[State, State]:
    module, plain = Metered(), Metered()
    fit_stages(worker, module, {"warmup_steps": 0})
    fit_plainly(worker, plain)
    return clone_state(module), clone_state(plain)


def test_one_worker_is_plain_lightning() -> None:
    """Check 1 of section 8, bit for bit."""
    ((state, plain),) = run_trainers(alone, 1)
    assert_equal_states(state, plain, exactly=True)


# ------------------------------------------------------------------ other uses


@dataclass(frozen=True)
class Validated:
    """A training that is repeated with validations in mid-epoch, every few batches."""

    strategy: dict[str, Any]
    accumulate: int = 3
    every: int = 4
    dropout: float = 0.2
    workers = 2


VALIDATED = {
    "late gradients that add up": Validated(LATE),
    "guesses, with gradients that add up": Validated(GUESSES),
    "stages that wait, with gradients that add up": Validated(SERIAL),
    # Guesses are stored by the samples' content, so without dropout.
    "stored guesses": Validated({"method": "al-store"}, accumulate=1, every=2, dropout=0.0),
}


def validate_within(worker: int, case: Validated, _: str) -> list[State]:
    states = []
    validations = {"val_check_interval": case.every, "num_sanity_val_steps": 1, "validation": held_out(worker)}
    for options in ({}, validations):
        module = Classifier("chain", dropout=case.dropout)
        L.seed_everything(3, verbose=False)
        strategy = {**case.strategy, "cuts": CUTS[2], "batch_norm": "running"}
        fit_stages(worker, module, strategy, max_epochs=2, accumulate_grad_batches=case.accumulate, **options)
        states.append(clone_state(module))
    return states


@pytest.fixture(scope="module")
def validated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[State]]]:
    return run_cases(validate_within, VALIDATED, tmp_path_factory.mktemp("validated"))


@pytest.mark.parametrize("name", VALIDATED)
def test_validation_in_mid_epoch_changes_nothing(name: str, validated: dict[str, list[list[State]]]) -> None:
    results = validated[name]
    for without, within in results:
        assert_equal_states(within, without, exactly=True)
        assert_equal_states(without, results[0][0], exactly=True)


class Unfreezes(L.Callback):
    """Trains the first layer from the second epoch on; not by BaseFinetuning, see docs/assumptions.md."""

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.current_epoch == 1:
            module.net[0].requires_grad_(True)
            trainer.optimizers[0].add_param_group({"params": module.net[0].parameters(), "lr": 0.02})


class FineTuned(Classifier):
    """With a frozen first layer that the optimizer does not have."""

    def __init__(self) -> None:
        super().__init__("chain")
        self.net[0].requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


def fine_tune(worker: int) -> list[State]:
    states = []
    for how in (SERIAL, LATE, GUESSES):
        module = FineTuned()
        strategy = {**how, "batch_norm": "running", "cuts": CUTS[2]}
        fit_stages(worker, module, strategy, callbacks=[Unfreezes()], max_epochs=2, limit_train_batches=3)
        states.append(clone_state(module))
    return states


def test_a_part_that_is_unfrozen_in_mid_training_trains() -> None:
    plain = FineTuned()
    fit_plainly(0, plain, callbacks=[Unfreezes()], max_epochs=2, limit_train_batches=3)
    begun = clone_state(FineTuned())
    for waiting, late, guessed in run_trainers(fine_tune, 2):
        assert_equal_states(waiting, clone_state(plain))
        for state in (late, guessed):
            assert not torch.equal(state["net.0.weight"], begun["net.0.weight"])


def clip(worker: int) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit_stages(worker, Classifier("chain"), gradient_clip_val=1.0, limit_train_batches=2)
    return told(caught, "clips each stage by the norm of its own gradients")


def test_clipping_by_norm_warns_that_no_worker_knows_the_norm_of_all() -> None:
    mine, theirs = run_trainers(clip, 2)
    assert len(mine) == 1
    assert theirs == []
