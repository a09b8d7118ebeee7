"""``Trainer(strategy="auxnet")``: impossible settings are refused before any step, with a helpful message."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional

from resist_lightning import AuxNetStrategy, PartialModelError, StageSelectionError, WorkerLost
from tests.helpers.auxnet import fit_stages, make_stages, pictures
from tests.helpers.plain import Classifier, held_out
from tests.helpers.trainers import QUIET, Training, make_trainer, run_in_turn
from tests.helpers.training import assert_equal_states, clone_state

CUTS = {"cuts": ["0"]}  # of a chain: the boundary is an image of 6 channels

Found = dict[str, list[Any]]

# ------------------------------------------------------------------ before launch: in the process of the script


class Residual(nn.Module):
    """The usual network, with a forward chosen by a test."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        net = Classifier().net
        self.stem = net.stem
        self.sections = nn.Sequential(net.section1, net.section2, net.section3, net.section4)

    def forward(self, x: Tensor) -> Any:
        if self.how == "branches" and float(x.sum()) > 0:
            x = -x
        x = self.sections(self.stem(x)).mean((2, 3))
        return (x, x) if self.how == "tuple" else x


class TwoInputs(Residual):
    def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x + y)


class Tied(Classifier):
    """A module with a layer outside of the network that shares a weight with it."""

    def __init__(self) -> None:
        super().__init__()
        self.outside = nn.Linear(self.net.head.in_features, self.net.head.out_features)
        self.outside.weight = self.net.head.weight


class Odd(Classifier):
    """A module with a given network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


def fit_script(
    module: L.LightningModule, workers: int = 2, strategy: dict[str, Any] | None = None, **more: Any
) -> None:
    """Fit as a main process that would start workers; an error must come before that."""
    made = make_stages(**{"start_method": "fork", **(strategy or {})})
    options = {**QUIET, "strategy": made, "devices": workers, "max_epochs": 1, **more}
    L.Trainer(**options).fit(module, pictures())


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "more workers than stages": (
        Classifier,
        {"workers": 9},
        "9 workers need 8 cut point.*has 7.*Use at most 8 workers",
    ),
    "several inputs": (lambda: Odd(TwoInputs("")), {}, "takes x, y, but stages pass on a single tensor"),
    "no trace": (lambda: Odd(Residual("branches")), {}, "cannot be"),
    "several outputs": (lambda: Odd(Residual("tuple")), {}, "returns"),
    "an unknown cut": (Classifier, {"strategy": {"cuts": ["section9"]}}, "section9"),
    "as many cuts as workers": (Classifier, {"strategy": {"cuts": ["section1", "section2"]}}, "there are 2 workers"),
    "an unknown network": (Classifier, {"strategy": {"network": "nets"}}, "nets"),
    "half precision": (Classifier, {"plugins": [MixedPrecision("16-mixed", "cuda")]}, "Use 'bf16-mixed'"),
    "batch norm over the workers": (
        lambda: Odd(nn.SyncBatchNorm.convert_sync_batchnorm(Classifier().net)),
        {},
        "SyncBatchNorm",
    ),
    "a weight of a layer outside": (Tied, {}, "are one tensor, inside and outside of the network"),
    "averaged weights": (Classifier, {"callbacks": [StochasticWeightAveraging(1e-2)]}, "StochasticWeightAveraging"),
    "sync_batchnorm": (Classifier, {"sync_batchnorm": True}, "sync_batchnorm=True has nothing to synchronize"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_before_any_process_starts(name: str) -> None:
    module, options, expected = REFUSED[name]
    with pytest.raises(ValueError, match=expected) as raised:
        fit_script(module(), **options)
    assert len(str(raised.value)) > 60


def test_other_backends_than_gloo_are_refused() -> None:
    with pytest.raises(ValueError, match="only 'gloo' lets later ones overtake them"):
        AuxNetStrategy(process_group_backend="nccl")


# ------------------------------------------------------------------ before the first step


def no_such_input(worker: int, which: Any) -> str:
    with pytest.raises(ValueError, match="input=") as raised:
        fit_stages(worker, Classifier("chain"), {"input": which})
    return str(raised.value)


INPUTS: dict[Any, str] = {"image": "of 2 elements", 5: "of 2 elements", 1: "int64"}


@pytest.mark.parametrize("which", INPUTS)
def test_a_wrong_name_of_the_input_is_told_with_what_the_batch_has(which: Any, found: Found) -> None:
    for said in found[f"input {which}"]:
        assert INPUTS[which] in said


class WrongShape(nn.Module):
    """An auxiliary network with an output of the wrong shape for its boundary."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Small(nn.Module):
    """A user's auxiliary network."""

    def __init__(self, image: tuple[int, ...], boundary: tuple[int, ...]) -> None:
        super().__init__()
        self.scale = image[1] // boundary[1]
        self.layer = nn.Conv2d(image[0], boundary[0], 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(functional.avg_pool2d(x, self.scale))


def wrong_shape(image: tuple[int, ...], boundary: tuple[int, ...]) -> nn.Module:
    return WrongShape()


def with_factory(worker: int, factory: Any) -> tuple[list[str], bool]:
    kinds: list[str] = []

    class Sees(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            guesses = trainer.strategy.engine.sync.stage_worker.guesses
            kinds[:] = [type(child).__name__ for child in guesses.network.modules()] if guesses is not None else []

    module = Classifier("chain")
    fit_stages(worker, module, {**CUTS, "aux_network": factory, "method": "al-net"}, callbacks=[Sees()])
    return kinds, all(bool(tensor.isfinite().all()) for tensor in module.state_dict().values())


def test_users_may_bring_their_own_auxiliary_network(found: Found) -> None:
    """With method penalty: test_auxnet_traps."""
    (first, sound), (second, _) = found["own auxiliary network"]
    assert first == []
    assert "Small" in second
    assert sound


def with_wrong_shape(worker: int) -> BaseException:
    with pytest.raises((ValueError, WorkerLost)) as raised:  # worker 0 learns of it from worker 1
        with_factory(worker, wrong_shape)
    return raised.value


def test_an_auxiliary_network_of_another_shape_is_refused(found: Found) -> None:
    _, second = found["auxiliary network of another shape"]
    assert isinstance(second, ValueError), second
    assert "the boundary needs (12, 8, 8)" in str(second)  # λ and u, of six channels each


# ------------------------------------------------------------------ in the first step


class CallsTwice(Classifier):
    """Calls the network twice, like consistency losses."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return functional.mse_loss(self.net(batch[0]), self.net(batch[0]))


class EvaluatesInStep(Classifier):
    """Asks one stage for an output of the whole network."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with torch.no_grad():
            self.net(batch[0])
        return super().training_step(batch, batch_idx)


class EvalModeInStep(Classifier):
    """The same, by evaluation mode."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.net.eval()
        return super().training_step(batch, batch_idx)


class LooksBeforeStep(Classifier):
    """Calls the network in a hook, as in training: the stage would take the call for a batch of its own."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.net(batch[0])


class CallsParts(Classifier):
    """Calls the network's parts, not the network."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        features = batch[0]
        for layer in self.net.children():
            features = layer(features)
        return features.square().mean()


ODD: dict[type[Classifier], tuple[type[Exception], str]] = {
    CallsTwice: (RuntimeError, "Call the network once per training_step"),
    EvaluatesInStep: (PartialModelError, "Evaluate in validation hooks"),
    CallsParts: (PartialModelError, "Call net as a whole in training, not its parts"),
    EvalModeInStep: (PartialModelError, "Evaluate in validation hooks"),
    LooksBeforeStep: (PartialModelError, "outside training_step"),
}


def train_odd(worker: int, module: type[Classifier]) -> str:
    with pytest.raises(ODD[module][0]) as raised:
        fit_stages(worker, module("chain"), {**CUTS, "warmup_steps": 0})
    return str(raised.value)


@pytest.mark.parametrize("module", ODD)
def test_what_a_training_step_must_not_do_is_told_on_all_workers(module: type[Classifier], found: Found) -> None:
    for said in found[module.__name__]:
        assert ODD[module][1] in said


# ------------------------------------------------------------------ after a refusal


def refused_then_right(worker: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    module = Classifier("chain")
    with pytest.raises(StageSelectionError):
        fit_stages(worker, module, {"cuts": ["11"]})
    fit_stages(worker, module, {**CUTS, "warmup_steps": 0, "batch_norm": "running"}, validation=held_out(worker))
    fresh = Classifier("chain")
    fit_stages(worker, fresh, {**CUTS, "warmup_steps": 0, "batch_norm": "running"})
    return clone_state(module), clone_state(fresh)


def test_after_a_refusal_the_module_is_as_it_was(found: Found) -> None:
    for state, fresh in found["after a refusal"]:
        assert_equal_states(state, fresh, exactly=True)


def test_the_names_are_known_to_the_trainer() -> None:
    for name, start_method in {
        "auxnet": "popen",
        "auxnet_spawn": "spawn",
        "auxnet_fork": "fork",
        "auxnet_notebook": "fork",
    }.items():
        strategy = make_trainer(name, devices=2).strategy
        assert isinstance(strategy, AuxNetStrategy)
        assert strategy._start_method == start_method


# ------------------------------------------------------------------ trainings in the same two processes

IN_TURN: dict[str, Training] = {
    **{f"input {which}": (no_such_input, (which,)) for which in INPUTS},
    "own auxiliary network": (with_factory, (Small,)),
    "auxiliary network of another shape": (with_wrong_shape, ()),
    **{module.__name__: (train_odd, (module,)) for module in ODD},
    "after a refusal": (refused_then_right, ()),
}


@pytest.fixture(scope="module")
def found() -> Found:
    """The results of both workers, by training."""
    return run_in_turn(IN_TURN, 2)
