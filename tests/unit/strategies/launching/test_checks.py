"""Refusals before any process starts (checked by the fixture ``no_processes``)."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from lightning.pytorch.tuner import Tuner
from omegaconf import OmegaConf
from torch import nn

from resist_lightning import (
    AuxNetStrategy,
    BlockSelectionError,
    Config,
    ISTStrategy,
    LocalSGDStrategy,
    ResISTStrategy,
)
from resist_lightning.schedule.progress import Clock
from resist_lightning.schedule.round_length import QSR, PostLocal
from resist_lightning.strategies.launching.checks import (
    check_callbacks,
    refuse_launch,
    warn_of_batches_without_step,
    warn_of_early_end,
    warn_of_short_training,
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
    "tied weights": ({"blocks": "section3.*"}, tied, BlockSelectionError, r"tied weights\).* register the module once"),
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


@contextmanager
def warned_once(message: str | None) -> Iterator[None]:
    """Inside, there is one warning, which matches; none at all for None."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    texts = [str(each.message) for each in caught]
    assert len(texts) == (message is not None), texts
    assert re.search(message or "", "".join(texts))


def all_have_an_effect(clock: Clock, steps: int) -> list[str]:
    return []


@pytest.mark.parametrize(
    ("steps", "done", "warned"),
    [(48, 0, True), (50, 0, False), (90, 50, True), (80, 40, False)],
)
def test_a_training_that_is_shorter_than_a_round_is_told_before_it_starts(
    steps: float, done: int, warned: bool
) -> None:
    trainer: Any = SimpleNamespace(estimated_stepping_batches=steps, global_step=done)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_short_training(trainer, Clock(50, *divmod(done, 50)), all_have_an_effect)
    assert [f"{steps - done} local steps, and a round has local_steps=50" in str(w.message) for w in caught] == (
        [True] if warned else []
    )


def test_a_training_of_unknown_length_is_not_warned_of() -> None:
    trainer: Any = SimpleNamespace(estimated_stepping_batches=float("inf"), global_step=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rule in (50, PostLocal(1, 5, 100)):
            warn_of_short_training(trainer, Clock.by(rule, lambda: None), without_effect)


def without_effect(clock: Clock, steps: int) -> list[str]:
    return ["", f"nothing at {clock.total_steps} of {steps}"]


@pytest.mark.parametrize(("clock", "alone"), [(Clock(50, 1), True), (Clock(200), False)])
def test_settings_without_effect_are_told_one_by_one(clock: Clock, alone: bool) -> None:
    trainer: Any = SimpleNamespace(estimated_stepping_batches=150, global_step=0)
    with pytest.warns(match="nothing at 0 of 150") as caught:
        warn_of_short_training(trainer, clock, without_effect, alone=alone)
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("rule", "steps", "message"),
    [
        (QSR(4, 0.1), 200, "200 local steps, and a round has 10000 by local_steps=QSR.*by the warmup_steps of QSR"),
        (QSR(4, 0.1, warmup_steps=200), 200, "warmup_steps cover all 200 local steps"),
        (PostLocal(300, 5, 400), 200, r"200 local steps, and a round has 300 by local_steps=PostLocal\(first=300"),
        (PostLocal(5, 300, 200), 200, "switch_step lies after the end of this training of 200 local steps"),
        (PostLocal(5, 300, 100), 200, None),
        (QSR(4, 0.01), 200, None),
    ],
)
def test_rounds_of_changing_length_are_judged_by_the_first(rule: Any, steps: int, message: str | None) -> None:
    trainer: Any = SimpleNamespace(estimated_stepping_batches=steps, global_step=0)
    with warned_once(message):
        warn_of_short_training(trainer, Clock.by(rule, lambda: 0.001), all_have_an_effect)


# The length of a training is an estimate: a local step for every batch, or for every few.


def planned(total: int | None, steps: int, max_steps: int, by_hand: bool, accumulated: int = 1) -> tuple[Any, Any]:
    """A trainer that expects as many steps, or 96, and an engine whose rounds have three of the steps planned."""
    clock = Clock(3)
    for _ in range(steps):
        if clock.due:
            clock.next_round()
        clock.tick()
    module = SimpleNamespace(automatic_optimization=not by_hand)
    trainer = SimpleNamespace(
        estimated_stepping_batches=96 if total is None else total,
        max_steps=max_steps,
        accumulate_grad_batches=accumulated,
        lightning_module=module,
    )
    config = Config(local_steps=3, finish_rounds=0 if total is None else 1)
    return trainer, SimpleNamespace(config=config, clock=clock, layout=SimpleNamespace(total_steps=total))


@pytest.mark.parametrize(
    ("total", "max_steps", "by_hand", "accumulated", "batches", "way_out"),
    [
        (96, -1, True, 1, 1, r"for every batch.* in the last one: .* Set max_steps to the number of steps"),
        (96, -1, False, 1, 1, r"Use accumulate_grad_batches"),
        (24, 24, False, 1, 1, r"Use accumulate_grad_batches"),  # max_steps counts the calls of the hook then
        (24, -1, False, 4, 4, r"for every 4 batches.* in the last 4: .* Use accumulate_grad_batches"),
        (24, 24, True, 1, 1, None),
        (24, -1, False, 4, 3, None),
        (96, -1, True, 1, 0, None),
        (None, -1, True, 1, 1, None),
    ],
)
def test_batches_without_a_step_are_told_where_the_end_is_planned_by_batches(
    total: int | None, max_steps: int, by_hand: bool, accumulated: int, batches: int, way_out: str | None
) -> None:
    """The last rounds never came, in silence, where gradients were added up by hand."""
    trainer, engine = planned(total, 0, max_steps, by_hand, accumulated)
    with warned_once(f"finish_rounds=1 is planned for {total} .*{way_out}" if way_out else None):
        assert warn_of_batches_without_step(trainer, engine, batches) == (way_out is not None)


@pytest.mark.parametrize(
    ("total", "steps", "max_steps", "message"),
    [
        (96, 24, -1, r"planned for 96 local steps, .* ended after 24: of 32 rounds the last 24 did not come"),
        (24, 12, 24, r"planned for 24 local steps, .* ended after 12: of 8 rounds the last 4 did not come"),
        (96, 93, -1, r"of 32 rounds the last 1 did not come"),
        (None, 2, -1, r"2 local steps, and a round has local_steps=3: the workers will average only once"),
        (96, 94, -1, None),
        (96, 96, -1, None),
        (96, 4, 4, None),  # a search for the learning rate
        (None, 24, -1, None),
    ],
)
def test_rounds_that_were_planned_and_did_not_come_are_told_at_the_end(
    total: int | None, steps: int, max_steps: int, message: str | None
) -> None:
    trainer, engine = planned(total, steps, max_steps, by_hand=True)
    with warned_once(message):
        warn_of_early_end(trainer, engine)


@pytest.mark.parametrize("start_method", ["spawn", "fork"])
def test_a_search_whose_result_would_be_lost_is_refused(start_method: Any, trainer_with: MakeTrainer) -> None:
    trainer = trainer_with(LocalSGDStrategy(start_method=start_method))
    with pytest.raises(ValueError, match=r"would be lost with them\. Choose a strategy that runs the script again"):
        Tuner(trainer).lr_find(Classifier("preact"), stream(0, 8), num_training=4)
