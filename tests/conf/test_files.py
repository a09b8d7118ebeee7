"""Every file in conf/ composes, passes the check and instantiates, also with a user's own network and data."""

from __future__ import annotations

import inspect
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hydra import initialize_config_dir
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf

from experiments.app import schema
from experiments.app.build import (
    CONF,
    build_data,
    build_module,
    build_strategy,
    check_evaluate,
    check_follow,
    check_train,
)
from experiments.app.classifier import LitClassifier
from experiments.app.launch import _jobs, check_command_line
from experiments.data.module import ArrayData
from experiments.train import build_trainer
from tests.conf.conftest import Compose
from tests.helpers.programs import ROOT, run_module

# Files in common/ are parts of other files, not options.
FILES = sorted(
    path.relative_to(CONF).with_suffix("").as_posix() for path in CONF.rglob("*.yaml") if path.parent.name != "common"
)
GROUPS = {
    "strategy", "model", "data", "trainer", "callbacks", "logger", "experiment", "debug", "hparams_search",
}  # fmt: skip
NEEDED = {
    "data/image_folder": ["data.folder=images"],
    "data/speech_commands": ["model=mlp", "strategy=ist"],
    "data/speech_shaped": ["model=mlp", "strategy=ist"],
    "experiment/cifar10_jpeg": ["data.folder=images"],
    "strategy/ist": ["model=mlp"],
    "model/mlp": ["strategy=ist"],
}
NARROW = {"mlp": "model.width=16", "preact_resnet": "model.width_multiplier=0.05"}


def options(group: str) -> list[str]:
    found = [name.partition("/")[2] for name in FILES if name.startswith(f"{group}/")]
    assert found, f"conf/{group} has no files"
    return found


def overrides(group: str, option: str) -> list[str]:
    one_worker = ["trainer.devices=1"] if (group, option) == ("strategy", "single") else []
    return [f"{group}={option}", *one_worker, *NEEDED.get(f"{group}/{option}", [])]


# Options of these groups have no effect on one another: a configuration has the first of each, the next the second.
BESIDE = ("data", "trainer", "callbacks", "logger")


def row_with(group: str, option: str) -> list[str]:
    """The overrides of the configuration of `BESIDE` that has this option."""
    number = options(group).index(option)
    others = [(name, options(name)[number]) for name in BESIDE if number < len(options(name))]
    return [word for each in others for word in overrides(*each)]


def test_these_are_all_groups_and_the_tests_below_see_them() -> None:
    assert {name.partition("/")[0] for name in FILES if "/" in name} == GROUPS
    assert max(BESIDE, key=lambda group: len(options(group))) == "data"
    assert {*BESIDE, "strategy", "model", "experiment", "debug", "hparams_search"} == GROUPS
    assert {name for name in FILES if "/" not in name} == {"train", "evaluate", "follow"}


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith(("strategy/", "model/", "experiment/"))])
def test_every_option_composes_and_passes_the_check(name: str, composed: Compose) -> None:
    group, _, option = name.partition("/")
    check_train(composed(*overrides(group, option), "trainer.accelerator=cpu"))


@pytest.mark.parametrize("option", options("data"))
def test_options_beside_one_another_compose_and_pass_the_check(option: str, composed: Compose) -> None:
    check_train(composed(*row_with("data", option), "trainer.accelerator=cpu"))


@pytest.mark.parametrize("option", options("strategy"))
def test_every_strategy_instantiates_into_a_trainer(option: str, composed: Compose) -> None:
    cfg = composed(*overrides("strategy", option), "trainer.accelerator=cpu")
    trainer = build_trainer(cfg)
    assert trainer.num_devices == cfg.trainer.devices
    target = cfg.strategy._target_
    if option != "single":
        assert type(trainer.strategy) is get_object(target)
    monitored = any(type(callback).__name__ == "RoundMonitor" for callback in trainer.callbacks)
    assert monitored == (option in ("resist", "ist", "auxnet", "local_sgd"))


@pytest.mark.parametrize("option", options("model"))
def test_every_model_instantiates_for_its_data(option: str, composed: Compose) -> None:
    cfg = composed(*overrides("model", option))
    module = build_module(cfg, build_data(cfg.data))
    assert module.eval()(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize("option", options("data"))
def test_every_data_module_instantiates_with_the_values_of_its_file(option: str, composed: Compose) -> None:
    cfg = composed(*row_with("data", option), "data.batch_size=7", "data.eval_batch_size=9")
    data = instantiate(cfg.data, _convert_="all")
    assert isinstance(data, ArrayData)
    assert (data.loading.batch_size, data.loading.eval_batch_size) == (7, 9)


@pytest.mark.parametrize("option", options("callbacks"))
def test_every_callback_instantiates(option: str, composed: Compose) -> None:
    cfg = composed(*row_with("callbacks", option))
    made = {type(instantiate(node)).__name__ for node in cfg.callbacks.values()}
    expected = {"RichProgressBar", "ModelCheckpoint", "LearningRateMonitor", "Clock", "RoundMonitor"}
    assert made == expected | {"early_stopping": {"EarlyStopping"}, "followed": {"EndMarker"}}.get(option, set())


@pytest.mark.parametrize("option", options("logger"))
def test_every_logger_instantiates_into_the_run_folder(option: str, composed: Compose, tmp_path: Path) -> None:
    made = [instantiate(node) for node in composed(*row_with("logger", option)).logger.values()]
    expected = {"csv": 1, "tensorboard": 1, "default": 2, "none": 0}[option]
    assert len(made) == expected
    assert all(Path(logger.log_dir).is_relative_to(tmp_path) for logger in made)


@pytest.mark.parametrize("option", [*options("experiment"), None])
def test_every_experiment_builds_its_module_and_trainer(option: str | None, composed: Compose) -> None:
    chosen = overrides("experiment", option) if option else []
    model = composed(*chosen).model._target_.rpartition(".")[2]
    cfg = composed(*chosen, "trainer.accelerator=cpu", NARROW[model])
    data = build_data(without_folder(cfg))
    assert build_trainer(cfg).max_epochs == cfg.trainer.max_epochs
    assert build_module(cfg, data).hparams["lr"] == cfg.optimizer.lr


def without_folder(cfg: Any) -> Any:
    """The data section; a folder that this machine does not have is replaced by random images."""
    fake = OmegaConf.load(CONF / "data" / "fake.yaml")
    return fake if cfg.data._target_.endswith(("ImageFolder", "SpeechCommands")) else cfg.data


STRATEGIES = {
    "demo": ["resist", "local_sgd", "ddp", "single"],  # the last two need no network that can be divided
    "auxnet_digits": ["auxnet", "resist", "local_sgd"],
    "ist_digits": ["ist", "local_sgd"],
}


@pytest.mark.parametrize(("experiment", "strategy"), [(name, one) for name in STRATEGIES for one in STRATEGIES[name]])
def test_an_experiment_on_digits_runs_with_every_strategy_that_can_divide_its_network(
    experiment: str, strategy: str, composed: Compose
) -> None:
    devices = 1 if strategy == "single" else 2
    check_train(composed(f"experiment={experiment}", f"strategy={strategy}", f"trainer.devices={devices}"))


@pytest.mark.parametrize("option", options("debug"))
def test_every_debug_option_changes_the_trainer(option: str, composed: Compose) -> None:
    changed, usual = (composed(*words, "trainer.accelerator=cpu") for words in ([f"debug={option}"], []))
    assert changed.trainer != usual.trainer
    check_train(changed)
    build_trainer(changed)


@pytest.mark.parametrize("option", options("hparams_search"))
def test_every_search_is_a_grid_of_good_jobs(option: str, composed: Compose) -> None:
    with_sweep = [f"hparams_search={option}"]
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        jobs = list(_jobs("train", with_sweep, multirun=False))
    assert len(jobs) > 1
    assert all(sweep for _, sweep in jobs)
    assert len({tuple(job) for job, _ in jobs}) == len(jobs)
    for job, _ in jobs:
        check_train(composed(*job, "trainer.accelerator=cpu"), sweep=True)


def test_the_evaluations_compose(composed: Compose) -> None:
    check_evaluate(composed("ckpt_path=last.ckpt", config_name="evaluate"))
    check_follow(composed("folder=checkpoints", config_name="follow"))


def test_the_schema_of_the_trainer_and_the_optimizer_are_arguments_that_exist() -> None:
    for expected, target in ((schema.Trainer, L.Trainer), (schema.Optimizer, LitClassifier)):
        known = {item.name for item in fields(expected)} - {"_target_"}
        assert known <= set(inspect.signature(target).parameters)
    assert build_strategy(OmegaConf.load(CONF / "strategy" / "single.yaml")) == "auto"


MINE = """
import lightning as L, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Net(nn.Sequential):
    def __init__(self, width: int, num_classes: int):
        if width < 2:
            raise ValueError(f"width={width} must be at least 2")
        super().__init__(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, num_classes))

class Data(L.LightningDataModule):
    num_classes = 3
    def __init__(self, count: int = 40):
        super().__init__()
        self.examples = TensorDataset(torch.randn(count, 6), torch.arange(count) % 3)
    def train_dataloader(self):
        return DataLoader(self.examples, 5)
    val_dataloader = test_dataloader = train_dataloader
"""


def test_a_network_and_data_of_the_users_own_train_from_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    own = ["model._target_=mine.Net", "data._target_=mine.Data", "strategy=ist", "trainer.accelerator=cpu"]
    quick = ["trainer.max_epochs=1", "logger=csv", "threads=1", "callbacks.progress_bar=null"]
    few = ["strategy.local_steps=2", "model.width=8", "+data.count=60", "strategy.start_method=fork"]
    run_module(
        "experiments.train", *own, *quick, *few, f"hydra.run.dir={tmp_path}/run", PYTHONPATH=f"{ROOT}:{tmp_path}"
    )
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["strategy"], results["local_steps"]) == ("ist", 6)
    assert results["parameters"]["full"] == 6 * 8 + 8 + 8 * 3 + 3

    monkeypatch.syspath_prepend(tmp_path)
    for option, message in (
        ("+model.width=1", "error: model.width=1 must be at least 2"),
        ("+model.depht=1", "error: model.depht=1: unknown key; model has width"),
    ):
        with pytest.raises(SystemExit):
            check_command_line("train", check_train, [*own, option])
        assert capsys.readouterr().err.startswith(message)

    # The arguments for Hydra, which refuses a key that no file has, unless it is added.
    monkeypatch.setattr(sys, "argv", ["train.py", *own, "-m", "model.width=8,12", "+data.count=60"])
    check_command_line("train", check_train)
    assert sys.argv == ["train.py", "-m", *own, "++model.width=8,12", "+data.count=60"]
