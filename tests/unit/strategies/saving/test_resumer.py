from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from resist_lightning.strategies.options import StrategyOptions
from resist_lightning.strategies.saving.checkpoint_files import CHECKPOINT_KEY
from resist_lightning.strategies.saving.resumer import Resumer


def taken(fn: TrainerFn, global_step: int = 9) -> tuple[Resumer, L.LightningModule]:
    module = L.LightningModule()
    trainer: Any = SimpleNamespace(state=SimpleNamespace(fn=fn), lightning_module=module, global_step=global_step)
    resumer = Resumer(StrategyOptions())
    resumer.take({CHECKPOINT_KEY: {"step": 2, "files": ["a"], "modes": {"x.training": False}}}, trainer)
    return resumer, module


def test_a_training_resumes_with_all_and_after_a_test_with_the_full_model_alone() -> None:
    resumer, module = taken(TrainerFn.FITTING)
    assert sorted(resumer.state_of(module)) == ["files", "modes", "step"]
    resumer, module = taken(TrainerFn.TESTING)
    assert resumer.state_of(module) == {"step": 2}
    resumer, module = taken(TrainerFn.TESTING, global_step=0)  # the fit that follows has its first step
    assert resumer.state_of(module) == {"round": 0, "step": 0, "steps_before": 0}


def test_the_state_belongs_to_the_module_whose_weights_it_made() -> None:
    resumer, _ = taken(TrainerFn.FITTING)
    assert resumer.state_of(L.LightningModule()) == {}
    assert resumer.snapshot_folder is None
    assert not resumer.from_snapshot
