"""A checkpoint is a model (contract 8): it evaluates to what was reported, in a process that lacks this package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn

from tests.helpers.plain import Classifier, batch_of, evaluate, held_out, stream
from tests.helpers.small import Bottlenecks, Small
from tests.helpers.trainers import make_strategy, make_trainer, run_trainers
from tests.helpers.training import assert_equal_states, clone_state

WORKERS = 2
VARIANTS: dict[str, dict[str, Any]] = {
    "the first round warms up": {"strategy": {"warmup_rounds": 1}},
    "torchvision, running statistics, merged blocks": {
        "class": Bottlenecks,
        "strategy": {"batch_norm": "running", "min_blocks": 3},
    },
    "local SGD": {"kind": "chain", "strategy": {"face": "local_sgd"}},
    "IST, momentum travels": {"kind": "chain", "strategy": {"face": "ist", "momentum": "travel"}},
}
STEPS = 7
Metrics = dict[str, float]


class Reporter(L.Callback):
    """Notes the metrics of every validation by step."""

    def __init__(self) -> None:
        self.metrics: dict[int, Metrics] = {}
        self.places: set[tuple[bool, str]] = set()

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.metrics[trainer.global_step] = metrics_of(trainer.callback_metrics)

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note where the checkpoint's tensors are: in training only the writing process copies the full model."""
        self.places |= {
            (trainer.training or trainer.validating, value.device.type) for value in checkpoint["state_dict"].values()
        }


def metrics_of(logged: Any) -> Metrics:
    return {key.removeprefix("val/"): float(value) for key, value in logged.items() if key.startswith("val/")}


def train_and_save(worker: int, folder: str, variant: dict[str, Any]) -> dict[str, Metrics]:
    """Save in every way; returns the metrics reported for each file."""
    module, reporter = variant.get("class", Classifier)(variant.get("kind", "preact")), Reporter()
    at_validation = ModelCheckpoint(f"{folder}/val", monitor="val/loss", save_top_k=-1, filename="{step}")
    between = ModelCheckpoint(f"{folder}/between", every_n_train_steps=5, save_top_k=-1, filename="{step}")
    trainer = make_trainer(
        make_strategy(**variant.get("strategy", {})),
        max_epochs=1,
        enable_checkpointing=True,
        callbacks=[reporter, at_validation, between],
        val_check_interval=3,
    )
    trainer.fit(module, stream(worker, STEPS), held_out(worker))
    reported = {f"{folder}/val/step={step}.ckpt": metrics for step, metrics in reporter.metrics.items()}
    assert reporter.places == {(True, "meta" if worker else "cpu")}
    assert set(reporter.metrics) == {3, 6}  # rounds have three steps: the first is complete, and not synced yet
    trainer.save_checkpoint(f"{folder}/end.ckpt")
    reported[f"{folder}/end.ckpt"] = metrics_of(trainer.validate(module, held_out(worker), verbose=False)[0])
    path = f"{folder}/between/step=5.ckpt"
    reported[path] = metrics_of(trainer.validate(module, held_out(worker), path, verbose=False)[0])
    return reported


def train_variants(worker: int, folder: str) -> list[dict[str, Metrics]]:
    """Train all variants in the same processes, as starting these has a cost."""
    return [train_and_save(worker, f"{folder}/{name.replace(' ', '-')}", variant) for name, variant in VARIANTS.items()]


def test_checkpoints_evaluate_as_reported_without_this_package(tmp_path: Path, root: Path) -> None:
    ours, theirs = run_trainers(train_variants, WORKERS, str(tmp_path))
    assert ours == theirs
    reported: dict[str, Metrics] = {}
    checkpoints: list[str] = []
    for variant, mine in zip(VARIANTS.values(), ours, strict=True):
        assert len(mine) == 4
        reported |= mine
        checkpoints += [f"{variant.get('class', Classifier).__name__}:{path}" for path in mine]
    assert len({metrics["loss"] for metrics in reported.values()}) > len(VARIANTS) * 2, (
        f"they hardly differ: {reported}"
    )

    run = subprocess.run(
        [sys.executable, "-m", "tests.helpers.evaluate_plain", str(WORKERS), *checkpoints],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=90,
        start_new_session=True,
        check=False,
    )

    assert run.returncode == 0, run.stderr
    evaluated = json.loads(run.stdout.splitlines()[-1])
    assert evaluated.keys() == reported.keys()
    for path, metrics in reported.items():
        assert evaluated[path] == pytest.approx(metrics, abs=1e-6), path


# Other ways to evaluate.


def stop_early_and_evaluate(worker: int, folder: str) -> dict[str, Any]:
    module = Small()
    stopping = EarlyStopping("val/loss", mode="max", min_delta=1e9, patience=1)  # no epoch but the first improves
    saving = ModelCheckpoint(folder, monitor="val/loss", mode="min")
    trainer = make_trainer(
        make_strategy(), max_epochs=9, enable_checkpointing=True, callbacks=[stopping, saving, Reporter()]
    )
    trainer.fit(module, stream(worker, 4), held_out(worker))
    at_end = clone_state(module)
    found = {
        "epochs": trainer.current_epoch,
        "reported": trainer.callbacks[1].metrics if isinstance(trainer.callbacks[1], Reporter) else None,
        "validated": metrics_of(trainer.validate(module, held_out(worker), verbose=False)[0]),
        "state": at_end,
        "best": saving.best_model_path,
        "best score": float(saving.best_model_score),
    }
    found["tested"] = trainer.test(module, held_out(worker), ckpt_path="best", verbose=False)[0]
    found["of best"] = clone_state(module)
    found["predicted"] = trainer.predict(module, held_out(worker))
    found["saved"] = torch.load(saving.best_model_path, weights_only=True)["state_dict"]
    return found


def test_early_stopping_and_every_way_to_evaluate(tmp_path: Path) -> None:
    results = run_trainers(stop_early_and_evaluate, WORKERS, str(tmp_path))

    for worker, found in enumerate(results):
        assert found["epochs"] == 2
        assert found["reported"].keys() == {4, 8}
        assert found["validated"] == found["reported"][8]
        best = min(found["reported"].values(), key=lambda metrics: metrics["loss"])
        assert found["best score"] == best["loss"]
        assert found["tested"] == {"test/loss": best["loss"], "test/acc": best["acc"]}
        assert_equal_states(found["of best"], found["saved"], exactly=True)
        assert_equal_states(found["state"], results[0]["state"], exactly=True)
        plain = Small()
        plain.load_state_dict(found["saved"])
        expected = [plain.eval()(batch_of(100 + worker, step)[0]) for step in range(2)]
        assert len(found["predicted"]) == 2
        for predicted, logits in zip(found["predicted"], expected, strict=True):
            torch.testing.assert_close(predicted, logits)


# Evaluation without training.


def evaluate_only(worker: int) -> tuple[Metrics, Metrics, dict[str, Tensor]]:
    module = Small(seed=1 + worker)  # worker 0's weights are used
    trainer = make_trainer(make_strategy())
    validated = metrics_of(trainer.validate(module, held_out(worker), verbose=False)[0])
    tested = make_trainer(make_strategy()).test(module, held_out(worker), verbose=False)[0]
    return validated, {key.removeprefix("test/"): value for key, value in tested.items()}, clone_state(module)


def test_validate_and_test_without_fit() -> None:
    module = Small(seed=1)
    expected = evaluate(module, WORKERS)
    for validated, tested, state in run_trainers(evaluate_only, WORKERS):
        assert validated == pytest.approx(expected, abs=1e-6)
        assert tested == validated
        assert_equal_states(state, clone_state(module), exactly=True)


# A block whose branch is no linear function of any tensor.


class Bent(Small):
    """The branches of its blocks end in an activation, so their scale folds into no weight."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.net.body:
            block.residual_branch_end = None
            block.out = nn.Sequential(block.out, nn.Tanh())


def save_unknown_blocks(worker: int, folder: str) -> None:
    module = Bent()
    trainer = make_trainer(make_strategy(blocks=["body.1", "body.2", "body.3"]), max_epochs=1)
    trainer.fit(module, stream(worker, 4))
    trainer.save_checkpoint(f"{folder}/unknown.ckpt")


def test_a_checkpoint_names_the_blocks_whose_scale_it_cannot_carry(tmp_path: Path) -> None:
    run_trainers(save_unknown_blocks, WORKERS, str(tmp_path))

    state = torch.load(tmp_path / "unknown.ckpt", weights_only=True)["resist_lightning"]
    assert state["hooked"] == ["net.body.1", "net.body.2", "net.body.3"]
    assert state["scale"] == 0.5
