"""``Trainer(strategy="ist")``: the weights of the plain loop and of the simulator, reports and errors."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from resist_lightning import LayerSelectionError, NeuronConfig, NotFinite
from resist_lightning.callbacks import SUMMARY_FILE, RoundMonitor
from resist_lightning.methods.ist.layout import NeuronLayout
from resist_lightning.state.optimizer_state import OptimizerStates
from tests.helpers.plain import Classifier, evaluate, held_out, stream
from tests.helpers.trainers import (
    fit,
    make_strategy,
    run_trainers,
    run_trainers_and_by_hand,
    run_trainers_to_the_end,
    traces,
    train_by_hand,
    train_in_one_process,
)
from tests.helpers.training import assert_equal_states, clone_state

State = dict[str, Tensor]


@dataclass(frozen=True)
class Fit:
    """A training: number of workers, settings, and number of steps in epochs of a given length."""

    workers: int
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 11
    epoch: int = 4
    optimizer: str = "sgd"

    @property
    def config(self) -> NeuronConfig:
        return NeuronConfig(**{"local_steps": 3, **self.options})

    def module(self) -> Classifier:
        return Classifier("chain", optimizer=self.optimizer)


FITS = {
    "two workers, rounds over the borders of epochs": Fit(2),
    "three workers, momentum travels with AdamW": Fit(3, {"momentum": "travel", "seed": 5}, steps=7, optimizer="adamw"),
    "an end on the border of a round, running statistics, a choice of layers": Fit(
        2, {"batch_norm": "running", "momentum": "keep", "layers": ["net.5", "net.8"]}, steps=12
    ),
}


class Watcher(L.Callback):
    """Notes the worker's numbers of neurons in each batch, and checks that gradients have their parameters' shapes."""

    def __init__(self) -> None:
        self.widths: list[tuple[int, ...]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        for parameter in module.parameters():
            assert parameter.grad is not None
            assert parameter.grad.shape == parameter.shape

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self.widths.append(tuple(module.net[index].weight.shape[0] for index in (0, 5, 8)))


def by_trainer(worker: int, case: Fit) -> dict[str, Any]:
    module, watcher = case.module(), Watcher()
    identities = [id(parameter) for parameter in module.parameters()]
    strategy = make_strategy("ist", **case.options)
    trainer = fit(worker, module, case.epoch, strategy, max_epochs=-1, max_steps=case.steps, callbacks=[watcher])
    return {
        "state": clone_state(module),
        "widths": watcher.widths,
        "traces": traces(module),
        "same objects": identities == [id(parameter) for parameter in module.parameters()],
        "printed": [str(module.net[index]) for index in (0, 1, 5, 6, 8, 10)],
        "group left": dist.is_initialized(),
        "steps": trainer.global_step,
    }


def by_hand(worker: int, case: Fit) -> State:
    module = case.module()
    train_by_hand(worker, module, case.config, case.steps)
    return clone_state(module)


def all_by_trainer(worker: int, cases: dict[str, Fit], folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {name: by_trainer(worker, case) for name, case in cases.items()}
    if folder:
        found |= {"monitored": monitored(worker, folder), "spoilt": train_spoilt(worker, "drop")}
    return found


def all_by_hand(worker: int, cases: dict[str, Fit], _: str) -> dict[str, State]:
    return {name: by_hand(worker, case) for name, case in cases.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("monitored")


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict[int, tuple[list[dict[str, Any]], list[dict[str, State]]]]:
    """By number of workers, the results of each worker by case, and those of the plain loop."""
    found = {}
    for workers in (2, 3):
        cases = {name: case for name, case in FITS.items() if case.workers == workers}
        folder = str(folder) if workers == 2 else ""
        found[workers] = run_trainers_and_by_hand(all_by_trainer, all_by_hand, workers, cases, folder)
    return found


@pytest.mark.parametrize("name", FITS)
def test_the_trainer_trains_what_the_plain_loop_trains(trained: Any, name: str) -> None:
    """So every local step counts, also over the borders of epochs (check 6 of section 8)."""
    case = FITS[name]

    results, expected = ([found[name] for found in by_worker] for by_worker in trained[case.workers])

    simulated = train_in_one_process(case.module(), case.config, case.workers, case.steps).full_model().state_dict()
    assert_equal_states(results[0]["state"], simulated)
    layout, plain = NeuronLayout(case.module(), case.config, case.workers), case.module()
    for worker, result in enumerate(results):
        assert_equal_states(result["state"], expected[0], exactly=True)
        names = ("net.0.weight", "net.5.weight", "net.8.weight")
        widths = tuple(layout.held_shape(name, worker, 0)[0] if name in layout.shapes else 6 for name in names)
        assert result["widths"] == [widths] * case.steps
        assert result["steps"] == case.steps
        assert result["same objects"]
        assert not result["group left"]
        assert result["traces"] == []
        assert result["printed"] == [str(plain.net[index]) for index in (0, 1, 5, 6, 8, 10)]


def fit_alone(worker: int, batches: int) -> State:
    module = Classifier("chain")
    fit(worker, module, batches, make_strategy("ist", local_steps=4))
    return clone_state(module)


def test_one_worker_is_plain_lightning_whose_momentum_restarts() -> None:
    """Check 1 of section 8, bit for bit."""
    (state,) = run_trainers(fit_alone, 1, 10)
    plain = Classifier("chain")
    optimizer = plain.configure_optimizers()
    for step, batch in enumerate(stream(0, 10)):
        if step % 4 == 0:
            optimizer.state.clear()
        optimizer.zero_grad()
        plain.training_step(batch, step).backward()
        optimizer.step()
    assert_equal_states(state, clone_state(plain), exactly=True)


# ------------------------------------------------------------------ reports and errors


def monitored(worker: int, folder: str) -> tuple[dict[str, float], dict[str, float], State]:
    module = Classifier("chain")
    trainer = fit(
        *(worker, module, 8, make_strategy("ist", momentum="travel")),
        callbacks=[RoundMonitor()],
        default_root_dir=folder,
        val_dataloaders=held_out(worker),
    )
    # RoundMonitor logs the round, too.
    validated = {key: value for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
    logged = {key.removeprefix("val/"): float(value) for key, value in validated.items()}
    return logged, evaluate(module, 2), clone_state(module)


def test_the_summary_has_the_numbers_of_the_closed_form_and_the_model_evaluates_as_logged(
    trained: Any, folder: Path
) -> None:
    results = [found["monitored"] for found in trained[2][0]]

    for logged, evaluated, state in results:
        assert logged == pytest.approx(evaluated, abs=1e-6)
        assert_equal_states(state, results[0][2], exactly=True)
    module = Classifier("chain")
    layout = NeuronLayout(module, NeuronConfig(local_steps=3, momentum="travel"), 2)
    states = OptimizerStates([module.configure_optimizers()])
    sent = [layout.hand_over_bytes(round, states) for round in (0, 1)]
    summary = json.loads((folder / SUMMARY_FILE).read_text())
    assert summary["strategy"] == "ist"
    assert (summary["workers"], summary["rounds"], summary["local_steps"]) == (2, 3, 8)
    assert summary["blocks"] == ["net.0", "net.5", "net.8"]
    assert summary["held_parameters"] == layout.held_parameters(2)
    assert summary["full_parameters"] == sum(parameter.numel() for parameter in module.parameters())
    for kind in ("hand_over", "state"):
        assert summary["sent_bytes"][kind] == [sum(round[worker][kind] for round in sent) for worker in range(2)]
        assert min(summary["sent_bytes"][kind]) > 0
    assert summary["partitions"] == [layout.held(round) for round in range(3)]


class Spoilt(Classifier):
    """A module whose loss is NaN on worker 1 in the second round."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * torch.nan if batch_idx == 4 and self.trainer.global_rank == 1 else loss


def train_spoilt(worker: int, policy: str) -> bool:
    module = Spoilt("chain")
    fit(worker, module, 7, make_strategy("ist", non_finite=policy))
    return all(bool(tensor.isfinite().all()) for tensor in module.state_dict().values())


def test_nan_in_one_worker_ends_all_or_is_left_out(trained: Any) -> None:
    for outcome in run_trainers_to_the_end(train_spoilt, 2, "raise"):
        assert isinstance(outcome.error, NotFinite), outcome.traceback
        assert "after local step 3 of round 1: worker 1 in its neurons' part of net.0.weight" in str(outcome.error)
    assert [found["spoilt"] for found in trained[2][0]] == [True, True]


class TooNarrow(Classifier):
    def __init__(self) -> None:
        super().__init__("chain")
        self.net[8], self.net[10] = nn.Linear(12, 2), nn.Linear(2, 4)


def train_too_narrow(worker: int) -> None:
    fit(worker, TooNarrow(), 2, make_strategy("ist", min_share=0))


def test_a_layer_with_fewer_neurons_than_workers_is_refused_before_the_training() -> None:
    for outcome in run_trainers_to_the_end(train_too_narrow, 3):
        assert isinstance(outcome.error, LayerSelectionError)
        assert "layer 'net.8' has 2 neurons for 3 workers" in str(outcome.error)


def test_a_residual_network_is_referred_to_resist() -> None:
    (outcome,) = run_trainers_to_the_end(train_residual, 1)
    assert isinstance(outcome.error, LayerSelectionError)
    assert 'strategy="resist"' in str(outcome.error)


def train_residual(worker: int) -> None:
    fit(worker, Classifier("preact"), 2, make_strategy("ist", layers="*"))
