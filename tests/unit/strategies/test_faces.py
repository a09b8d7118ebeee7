"""Arguments of ``ResISTStrategy`` and ``LocalSGDStrategy``, and their refusals."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.trainer.states import RunningStage

from resist_lightning import AuxNetStrategy, ISTStrategy, LocalSGDStrategy, ResISTStrategy
from resist_lightning.strategies import base

BAD = {
    "local_steps": [
        (0, "at least 1 (1 averages after every step; or QSR or PostLocal)"),
        (-3, "at least 1"),
        (2.5, "whole number"),
    ],
    "min_blocks": [(-1, "at least 0 (0 allows workers without any block)"), (1.0, "whole number")],
    "blocks_per_worker": [("fair", "'equal', 'auto', or a list"), ([1, -1], "one for each worker")],
    "blocks": [([], "use strategy='local_sgd'"), ("", "use strategy='local_sgd'")],
    "seed": [(-1, "at least 0 (0 is a seed)"), (None, "whole number")],
    "momentum": [("nesterov", "choose one of 'reset', 'keep', 'travel'")],
    "batch_norm": [("sync", "choose one of 'recalibrate', 'running', 'batch'")],
    "warmup_rounds": [(-1, "at least 0 (0 means no warm-up)")],
    "growth": [([], "must be a list of shares"), ([2.5], "shares must lie in (0, 1]")],
    "finish_rounds": [(-1, "at least 0 (0 means no finish)")],
    "test_scale": [(0, "must lie in (0, 1]; None takes the share"), (1.5, "must lie in (0, 1]")],
    "wire": [("fp8", "choose one of 'fp32', 'bf16', 'int8', 'int6', 'int4'")],
    "outer": [("adam", "choose one of 'none', 'nesterov'")],
    "outer_rate": [(-0.7, "finite number above 0"), (0.5, "has no effect with outer='none'; set outer='nesterov'")],
    "outer_momentum": [(1.0, "of at least 0 and below 1"), ("most", "finite number")],
    "overlap": [(-1, "at least 0 (0: the training waits"), (50, "the shortest round has 50. Choose an overlap below")],
    "fragments": [(0, "at least 1 (1: each sync covers the whole network)"), (2.5, "whole number")],
    "evaluate_on": [("one", "choose one of 'all', 'first'"), (0, "choose one of")],
    "full_model_on": [("none", "choose one of 'all', 'first'"), ("first", "Set evaluate_on='first' too")],
    "data": [("foo", "choose one of 'shard', 'copy'")],
    "start_method": [("thread", "choose one of 'popen', 'spawn', 'fork', 'forkserver'")],
}
CASES = [(name, value, hint) for name, rows in BAD.items() for value, hint in rows]
OF_LOCAL_SGD = (
    *("local_steps", "momentum", "wire", "outer", "outer_rate", "outer_momentum", "overlap", "fragments"),
    *("evaluate_on", "full_model_on", "data"),
)


@pytest.mark.parametrize(("name", "value", "hint"), CASES)
def test_a_bad_value_is_refused_with_its_name_its_value_and_a_way_out(name: str, value: Any, hint: str) -> None:
    for face in (ResISTStrategy, LocalSGDStrategy) if name in OF_LOCAL_SGD else (ResISTStrategy,):
        with pytest.raises(ValueError, match=name) as caught:
            face(**{name: value})

        assert hint.replace(", 'travel'", "") in str(caught.value).replace(", 'travel'", "")
        assert name == "blocks" or repr(value) in str(caught.value)


@pytest.mark.parametrize("face", [ResISTStrategy, LocalSGDStrategy])
@pytest.mark.parametrize("option", ["local_step", "ddp_comm_hook", "model_averaging_period"])
def test_an_unknown_option_is_refused(face: Callable[..., Any], option: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
        face(**{option: 1})


@pytest.mark.parametrize(
    "option",
    [
        "min_blocks",
        "blocks_per_worker",
        "blocks",
        "seed",
        "batch_norm",
        "warmup_rounds",
        "finish_rounds",
        "growth",
        "test_scale",
    ],
)
def test_local_sgd_has_no_options_of_the_partition(option: str) -> None:
    with pytest.raises(TypeError, match=option):
        LocalSGDStrategy(**{option: 1})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("face", "option", "reason"),
    [
        (AuxNetStrategy, "evaluate_on", "AuxNetStrategy has no option 'evaluate_on': .*CheckpointEvaluator"),
        (AuxNetStrategy, "full_model_on", "has no option 'full_model_on': it assembles the whole network"),
        (AuxNetStrategy, "overlap", "has no option 'overlap': nothing is averaged"),
        (ISTStrategy, "overlap", "ISTStrategy has no option 'overlap': a slice that moves"),
    ],
)
def test_options_of_others_are_refused_with_the_reason(face: Callable[..., Any], option: str, reason: str) -> None:
    with pytest.raises(TypeError, match=reason):
        face(**{option: 1})


def test_options_have_names() -> None:
    with pytest.raises(TypeError, match="positional"):
        ResISTStrategy(50)  # type: ignore[misc]


def test_local_sgd_refuses_momentum_that_would_travel_with_blocks_it_does_not_have() -> None:
    with pytest.raises(ValueError, match=r"momentum='travel'"):
        LocalSGDStrategy(momentum="travel")  # type: ignore[arg-type]


def test_defaults_are_those_of_the_paper() -> None:
    config = ResISTStrategy().config
    assert (config.local_steps, config.min_blocks, config.blocks, config.seed) == (50, None, None, 0)
    assert (config.batch_norm, config.warmup_rounds, config.test_scale) == ("recalibrate", 0, None)
    assert config.momentum is LocalSGDStrategy().config.momentum is None  # by the optimizers
    assert LocalSGDStrategy().config.blocks == []
    assert ResISTStrategy().config.wire == LocalSGDStrategy().config.wire == "fp32"
    assert LocalSGDStrategy(wire="int8").config.wire == "int8"
    diloco = LocalSGDStrategy(outer="nesterov").config
    assert (diloco.outer, diloco.outer_rate, diloco.outer_momentum) == ("nesterov", 0.7, None)
    assert (config.outer, LocalSGDStrategy().config.outer) == ("none", "none")


def test_every_option_arrives() -> None:
    def third(name: str, module: Any) -> bool:
        return name == "layer3.1"

    options = {
        "local_steps": 7, "min_blocks": 2, "blocks_per_worker": [2, 3], "blocks": third, "seed": 3, "momentum": "keep",
        "batch_norm": "batch", "warmup_rounds": 4, "finish_rounds": 2, "test_scale": 0.25, "wire": "int6",
        "outer": "nesterov", "outer_rate": 0.5, "outer_momentum": 0.8, "overlap": 6, "fragments": 2,
        "evaluate_on": "first", "full_model_on": "first",
    }  # fmt: skip
    strategy = ResISTStrategy(
        **options, process_group_backend="gloo", timeout=timedelta(seconds=5), start_method="fork"
    )

    assert {name: getattr(strategy.config, name) for name in options} == options
    assert strategy.process_group_backend == "gloo"
    assert strategy._timeout == timedelta(seconds=5)
    assert strategy._start_method == "fork"


def test_every_option_of_ist_arrives() -> None:
    options = {
        "local_steps": 7, "layers": ["net.*"], "seed": 3, "momentum": "travel", "batch_norm": "batch", "check": "off",
        "non_finite": "drop", "evaluate_on": "first", "full_model_on": "first",
    }  # fmt: skip
    strategy = ISTStrategy(**options, data="copy", timeout=timedelta(seconds=5), start_method="fork")

    assert {name: getattr(strategy.config, name) for name in options} == options
    assert (strategy._data, strategy._timeout, strategy._start_method) == ("copy", timedelta(seconds=5), "fork")
    assert pickle.loads(pickle.dumps(strategy)).config == strategy.config
    usual = ISTStrategy().config
    assert (usual.local_steps, usual.layers, usual.seed, usual.momentum) == (20, None, 0, "reset")
    assert (usual.batch_norm, usual.check, usual.non_finite) == ("recalibrate", "sampled", "raise")
    with pytest.raises(ValueError, match="data='foo'"):
        ISTStrategy(data="foo")  # type: ignore[arg-type]


def test_a_strategy_can_be_sent_to_spawned_workers() -> None:
    copy = pickle.loads(pickle.dumps(ResISTStrategy(blocks=["layer3.*"], local_steps=7)))
    assert copy.config == ResISTStrategy(blocks=["layer3.*"], local_steps=7).config


def test_the_timeout_of_a_worker_that_waits_is_shorter_than_lightnings_half_hour() -> None:
    assert timedelta(minutes=1) <= ResISTStrategy()._timeout <= timedelta(minutes=15)  # type: ignore[operator]


CUDA = [torch.device("cuda", number) for number in (0, 1)]
CPU = [torch.device("cpu")] * 2


@pytest.mark.parametrize(
    ("devices", "given", "backend"),
    [(CPU, None, "gloo"), (CUDA, None, "nccl"), ([CUDA[0]] * 2, None, "gloo"), (CUDA, "gloo", "gloo")],
    ids=["CPU", "two GPUs", "one GPU twice", "as the user says"],
)
def test_the_backend_fits_the_devices(devices: list[torch.device], given: str | None, backend: str) -> None:
    strategy = ResISTStrategy(parallel_devices=devices, process_group_backend=given)
    strategy.cluster_environment = LightningEnvironment()

    assert strategy._get_process_group_backend() == backend


@pytest.mark.parametrize("data", ["shard", "copy"])
@pytest.mark.parametrize("training", [True, False])
def test_only_training_sees_all_of_the_data(
    data: Any, training: bool, trainer_with: Callable[..., L.Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the stage of the trainer: a hook of the sanity check may ask for the training loaders."""
    monkeypatch.setattr(base, "making_training_loaders", lambda session: training)
    seeds = set()
    for rank in range(2):
        trainer = trainer_with(ResISTStrategy(data=data, seed=5))
        trainer.strategy._lightning_module = L.LightningModule()
        trainer.strategy.lightning_module.trainer = trainer
        trainer.strategy.cluster_environment.set_global_rank(rank)
        trainer.state.stage = RunningStage.SANITY_CHECKING

        kwargs = trainer.strategy.distributed_sampler_kwargs

        if data == "copy" and training:
            assert (kwargs["num_replicas"], kwargs["rank"]) == (1, 0)
            seeds.add(kwargs["seed"])
        else:
            assert kwargs == {"num_replicas": 2, "rank": rank}
            seeds.add(rank)
        trainer.strategy.cluster_environment.set_global_rank(0)
    assert len(seeds) == 2
