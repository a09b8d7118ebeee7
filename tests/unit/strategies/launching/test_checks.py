"""Refusals before any process starts (checked by the fixture ``no_processes``)."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.accelerators import CPUAccelerator, MPSAccelerator
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning, StochasticWeightAveraging, Timer
from lightning.pytorch.trainer.connectors import accelerator_connector
from lightning.pytorch.tuner import Tuner
from omegaconf import OmegaConf
from torch import nn

from resist_lightning import (
    AuxNetStrategy,
    BlockSelectionError,
    ISTStrategy,
    LocalSGDStrategy,
    ResISTStrategy,
)
from resist_lightning.strategies.launching.checks import (
    check_callbacks,
    refuse_launch,
)
from tests.helpers.plain import Classifier, stream

MakeTrainer = Callable[..., L.Trainer]
LAUNCHERS = ["popen", "spawn", "fork"]


def tied() -> Classifier:
    module = Classifier()
    module.net.section3[2].conv1 = module.net.section3[1].conv1
    return module


def synchronised() -> Classifier:
    module = Classifier()
    module.net = nn.SyncBatchNorm.convert_sync_batchnorm(module.net)
    return module


def without_blocks() -> Classifier:
    module = Classifier()
    module.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    return module


def lazy() -> Classifier:
    module = Classifier()
    module.net.head = nn.LazyLinear(4)
    return module


BAD_FITS: dict[str, tuple[dict[str, Any], Callable[[], Classifier], type[Exception], str]] = {
    "min_blocks": (
        {"min_blocks": 9}, Classifier, ValueError,
        r"min_blocks=9 is impossible with 4 partitionable block\(s\).* between 0 and 4\. Lower min_blocks",
    ),
    "a glob": (
        {"blocks": "layer7.*"}, Classifier, BlockSelectionError,
        r"blocks='layer7\.\*' matches nothing\. Blocks that can be partitioned: net\.section1\.0, net\.section3\.1-4",
    ),
    "a predicate": (
        {"blocks": lambda name, module: False}, Classifier, BlockSelectionError,
        r"predicate .* chose nothing\. Blocks that can be partitioned",
    ),
    "a block that changes the shape": (
        {"blocks": ["section3.0"]}, Classifier, BlockSelectionError, r"'net\.section3\.0' changes the shape",
    ),
    "no blocks": ({}, without_blocks, BlockSelectionError, r"that keeps the shape .*was recognised.*'ist' deals"),
    "tied weights": ({"blocks": "section3.*"}, tied, BlockSelectionError, r"tied weights\).* give each block tensors"),
    "no end": (
        {"finish_rounds": 2}, Classifier, ValueError, r"max_epochs=-1 without max_steps.*finish_rounds and growth",
    ),
    "overlap of workers of two processes": (
        {"overlap": 1, "devices_per_worker": 2}, Classifier, ValueError,
        r"overlap=1 with devices_per_worker=2: .* Set devices_per_worker=1, or overlap=0",
    ),
    "lazy": ({}, lazy, ValueError, r"^net\.head\.weight, net\.head\.bias: no shape yet.* Call the module once"),
    "SyncBatchNorm": ({}, synchronised, ValueError, r"net\.section1\.0\.bn1 is a SyncBatchNorm.* Use BatchNorm"),
}  # fmt: skip


@pytest.mark.parametrize("start_method", LAUNCHERS)
@pytest.mark.parametrize("name", BAD_FITS)
def test_a_fit_that_cannot_work_is_refused(name: str, start_method: Any, trainer_with: MakeTrainer) -> None:
    options, make_module, error, message = BAD_FITS[name]

    endless = {"max_epochs": -1} if name == "no end" else {}
    with pytest.raises(error, match=message):
        trainer_with(ResISTStrategy(**options, start_method=start_method), **endless).fit(make_module(), stream(0, 2))


class InSetup(Classifier):
    """Builds its network in ``setup``, as in Lightning's documentation."""

    def __init__(self) -> None:
        super().__init__()
        del self.net

    def setup(self, stage: str) -> None:
        raise AssertionError("it is for the workers")


@pytest.mark.parametrize("strategy", [ResISTStrategy, ISTStrategy, LocalSGDStrategy, AuxNetStrategy])
def test_a_network_that_setup_builds_is_left_to_the_workers(strategy: Any, trainer_with: MakeTrainer) -> None:
    """It was refused, because no block, or no layer, was found in the module before."""
    with pytest.raises(AssertionError, match="a process was started"):
        trainer_with(strategy(start_method="spawn")).fit(InSetup(), stream(0, 2))


def test_validations_by_the_clock_are_refused(trainer_with: MakeTrainer) -> None:
    if not hasattr(trainer_with(ResISTStrategy()), "_val_check_time_interval"):
        pytest.skip("an option of Lightning 2.6")
    trainer = trainer_with(ResISTStrategy(), val_check_interval="00:00:00:01")
    with pytest.raises(ValueError, match=r"each worker would validate by its own clock.* number of batches"):
        trainer.fit(Classifier(), stream(0, 2), stream(0, 2))


@pytest.mark.parametrize("start_method", ["spawn", "fork"])
def test_a_full_model_for_one_host_of_several_is_refused(start_method: Any, trainer_with: MakeTrainer) -> None:
    """The other host's main process ended with an AttributeError, behind the training."""
    at_first: dict[str, Any] = {"evaluate_on": "first", "full_model_on": "first"}
    trainer = trainer_with(ResISTStrategy(start_method=start_method, **at_first), num_nodes=2)
    with pytest.raises(ValueError, match=rf"full_model_on='first' with start_method='{start_method}' on 2 hosts"):
        trainer.fit(Classifier(), stream(0, 2))


@pytest.mark.parametrize(
    ("strategy", "reason"),
    [
        (ResISTStrategy, "contradicts local training"),
        (LocalSGDStrategy, "contradicts local training"),
        (AuxNetStrategy, "has nothing to synchronize"),
    ],
)
def test_synchronised_batch_norm_is_refused(strategy: Any, reason: str, trainer_with: MakeTrainer) -> None:
    with pytest.raises(ValueError, match=f"sync_batchnorm=True {reason}.* Leave it out"):
        trainer_with(strategy(), sync_batchnorm=True)


AVERAGING: dict[str, tuple[Any, list[Any], str]] = {
    "SWA": (LocalSGDStrategy, [lambda: StochasticWeightAveraging(1e-2)], "adds an epoch .* Use WeightAveraging"),
}
if hasattr(L.pytorch.callbacks, "WeightAveraging"):  # of Lightning 2.6
    from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging

    AVERAGING |= {
        "neurons": (ISTStrategy, [WeightAveraging], "under IST .* or average checkpoints after the training"),
        "two averages": (
            LocalSGDStrategy,
            [WeightAveraging, EMAWeightAveraging],
            "WeightAveraging and EMAWeightAveraging .* keep one",
        ),
        "workers left out": (
            partial(ResISTStrategy, non_finite="drop"),
            [EMAWeightAveraging],
            "Use non_finite='raise'",
        ),
        "syncs beside the training": (partial(LocalSGDStrategy, overlap="auto"), [WeightAveraging], "Use overlap=0"),
    }


@pytest.mark.parametrize("start_method", LAUNCHERS)
@pytest.mark.parametrize("name", AVERAGING)
def test_averages_that_cannot_be_served_are_refused(name: str, start_method: Any, trainer_with: MakeTrainer) -> None:
    strategy, callbacks, message = AVERAGING[name]
    trainer = trainer_with(strategy(start_method=start_method), callbacks=[make() for make in callbacks])

    with pytest.raises(ValueError, match=message):
        trainer.fit(Classifier(kind="chain" if name == "neurons" else "preact"), stream(0, 2))


def warnings_of(callbacks: list[Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_callbacks(SimpleNamespace(callbacks=callbacks), LocalSGDStrategy().config)  # type: ignore[arg-type]
    return [str(warning.message) for warning in caught]


def test_callbacks_that_send_messages_in_every_batch_are_named() -> None:
    timed = ModelCheckpoint(train_time_interval=timedelta(minutes=1))
    named = warnings_of([Timer("00:01:00:00"), timed])
    assert [text.split()[0] for text in named] == ["Timer", "ModelCheckpoint"]
    assert all("Limit the training by steps or epochs instead" in text for text in named)
    assert warnings_of([ModelCheckpoint(), ModelCheckpoint(every_n_train_steps=1)]) == []


def test_pruning_by_a_workers_own_weights_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ModelPruning.*Prune the full model after"):
        warnings_of([ModelPruning("l1_unstructured")])


# Launchers that go wrong.


class External(LightningEnvironment):
    """Processes that exist already, as under torchrun."""

    creates_processes_externally = True


@pytest.mark.parametrize("start_method", ["spawn", "fork", "forkserver"])
def test_workers_are_not_started_a_second_time(start_method: Any) -> None:
    with pytest.raises(ValueError, match=f"start_method='{start_method}'.*External has started them already.*='popen'"):
        refuse_launch(External(), CPUAccelerator(), start_method)

    refuse_launch(External(), CPUAccelerator(), "popen")
    refuse_launch(LightningEnvironment(), CPUAccelerator(), start_method)


@pytest.mark.parametrize("name", ["resist_spawn", "local_sgd_fork", "resist_notebook"])
def test_under_torchrun_only_the_plain_name_works(
    name: str, monkeypatch: pytest.MonkeyPatch, trainer_with: MakeTrainer
) -> None:
    for key in ("RANK", "LOCAL_RANK", "GROUP_RANK"):
        monkeypatch.setenv(key, "0")
    for key in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(key, "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")

    with pytest.raises(ValueError, match=r"TorchElasticEnvironment has started them already"):
        trainer_with(name)

    assert trainer_with(name.split("_", maxsplit=1)[0].replace("local", "local_sgd")).world_size == 2


def test_mps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot share an MPS device; use accelerator='cpu'"):
        refuse_launch(LightningEnvironment(), MPSAccelerator(), "popen")


@pytest.mark.parametrize("name", ["resist", "local_sgd_spawn"])
def test_in_a_notebook_a_name_of_this_package_is_recommended(
    name: str, monkeypatch: pytest.MonkeyPatch, trainer_with: MakeTrainer
) -> None:
    """Lightning recommends ddp_notebook, which would train by DDP."""
    for module in ("resist_lightning.strategies.launching.checks", accelerator_connector.__name__):
        monkeypatch.setattr(f"{module}._IS_INTERACTIVE", True)
    with pytest.raises(ValueError, match=r"from a notebook .* such as 'resist_notebook', or start_method='fork'"):
        trainer_with(name)
    assert trainer_with(f"{name.removesuffix('_spawn')}_notebook").world_size == 2
    refuse_launch(External(), CPUAccelerator(), "popen")  # it starts nothing


@pytest.fixture
def hydra_job() -> Iterator[Callable[[RunMode], None]]:
    """Pretends that a Hydra application runs a job."""
    config = HydraConfig.instance()
    before = config.cfg

    def pretend(mode: RunMode) -> None:
        config.cfg = OmegaConf.create({"hydra": {"mode": mode}})

    yield pretend
    config.cfg = before


@pytest.mark.parametrize("name", ["resist", "local_sgd"])
def test_in_a_hydra_sweep_scripts_are_not_run_again(
    name: str, hydra_job: Callable[[RunMode], None], trainer_with: MakeTrainer
) -> None:
    hydra_job(RunMode.MULTIRUN)
    with pytest.raises(ValueError, match=r"each worker would run the whole sweep\. Use start_method='spawn'"):
        trainer_with(name)
    assert trainer_with(f"{name}_spawn").world_size == 2
    refuse_launch(External(), CPUAccelerator(), "popen")

    hydra_job(RunMode.RUN)
    assert trainer_with(name).world_size == 2


def test_hydra_is_not_imported_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "hydra.core.hydra_config")
    refuse_launch(LightningEnvironment(), CPUAccelerator(), "popen")
    assert "hydra.core.hydra_config" not in sys.modules


@pytest.mark.parametrize("start_method", ["spawn", "fork"])
def test_a_search_whose_result_would_be_lost_is_refused(start_method: Any, trainer_with: MakeTrainer) -> None:
    trainer = trainer_with(LocalSGDStrategy(start_method=start_method))
    with pytest.raises(ValueError, match=r"would be lost with them\. Choose a strategy that runs the script again"):
        Tuner(trainer).lr_find(Classifier("preact"), stream(0, 8), num_training=4)
