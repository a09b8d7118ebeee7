"""Bad input gets a clear error before any work."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.optim import SGD, AdamW

from resist_lightning import QSR, Config, PostLocal

WEIGHTS = [torch.nn.Parameter(torch.zeros(2))]


def test_defaults_are_the_paper_s():
    config = Config()
    assert (config.local_steps, config.min_blocks, config.seed) == (50, None, 0)
    assert (config.blocks, config.warmup_rounds, config.test_scale) == (None, 0, None)
    assert config.for_optimizers([SGD(WEIGHTS, 0.1)]).momentum == "reset"


@pytest.mark.parametrize(
    ("chosen", "optimizers", "policy"),
    [
        (None, [AdamW(WEIGHTS)], "keep"),
        (None, [SGD(WEIGHTS, 0.1), AdamW(WEIGHTS)], "keep"),
        (None, [SGD(WEIGHTS, 0.1), SGD(WEIGHTS, 0.2)], "reset"),
        ("reset", [AdamW(WEIGHTS)], "reset"),
        ("travel", [SGD(WEIGHTS, 0.1)], "travel"),
    ],
)
def test_second_moments_are_kept_unless_a_policy_was_chosen(chosen, optimizers, policy):
    config = Config(momentum=chosen, local_steps=7)
    assert config.for_optimizers(optimizers) == dataclasses.replace(config, momentum=policy)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("local_steps", 0, "local_steps=0 .*at least 1"),
        ("local_steps", -5, "local_steps=-5"),
        ("local_steps", 2.5, r"local_steps=2\.5 .*whole number"),
        ("local_steps", True, "local_steps=True .*whole number"),
        ("local_steps", "10", "local_steps='10' .*whole number"),
        ("local_steps", None, "local_steps=None"),
        ("local_steps", {"base": 4}, "local_steps={'base': 4} .*or QSR or PostLocal"),
        ("min_blocks", -1, "min_blocks=-1 .*at least 0"),
        ("min_blocks", 1.0, r"min_blocks=1\.0 .*whole number"),
        ("blocks_per_worker", "fair", "blocks_per_worker='fair' .*'equal', 'auto', or a list"),
        ("blocks_per_worker", [], r"blocks_per_worker=\[\]"),
        ("blocks_per_worker", [2, -1], "at least 0"),
        ("blocks_per_worker", [2, 1.5], "whole numbers"),
        ("blocks_per_worker", [2, True], "whole numbers"),
        ("blocks_per_worker", 3, "blocks_per_worker=3"),
        ("seed", -1, "seed=-1 .*at least 0"),
        ("seed", None, "seed=None"),
        ("warmup_rounds", -1, "warmup_rounds=-1 .*at least 0"),
        ("growth", [], r"growth=\[\] must be a list of shares"),
        ("growth", 0.5, r"growth=0\.5 must be a list"),
        ("growth", [0.5, True], "must be a list of shares"),
        ("growth", [0, 1], r"growth=\[0, 1\]: shares must lie in \(0, 1\] and not fall"),
        ("growth", [0.5, 0.25], "not fall"),
        ("growth", [0.5, 1.5], r"lie in \(0, 1\]"),
        ("growth", [0.5, float("nan")], r"lie in \(0, 1\]"),
        ("finish_rounds", -1, "finish_rounds=-1 .*at least 0"),
        ("recalibration_batches", 0, "recalibration_batches=0 .*at least 1"),
        ("momentum", "restart", "momentum='restart' .*'reset', 'keep', 'travel'"),
        ("batch_norm", "sync", "batch_norm='sync' .*'recalibrate', 'running', 'batch'"),
        ("check", "some", "check='some' .*'sampled', 'full', 'off'"),
        ("non_finite", "ignore", "non_finite='ignore' .*'raise', 'drop'"),
        ("wire", "int5", "wire='int5' .*'fp32', 'bf16', 'int8', 'int6', 'int4'"),
        ("outer", "sgd", "outer='sgd' .*'none', 'nesterov'"),
        ("outer_rate", 0, "outer_rate=0 .*above 0"),
        ("outer_rate", float("inf"), "outer_rate=inf .*finite number above 0"),
        ("outer_rate", True, "outer_rate=True"),
        ("outer_rate", 0.5, r"outer_rate=0\.5 has no effect with outer='none'; set outer='nesterov'"),
        ("outer_momentum", 1.0, r"outer_momentum=1\.0 .*at least 0 and below 1"),
        ("outer_momentum", float("nan"), "outer_momentum=nan"),
        ("outer_momentum", "0.9", "outer_momentum='0.9'"),
        ("outer_momentum", 0, "outer_momentum=0 has no effect"),
        ("overlap", 1.5, "overlap=1.5 .*whole number of at least 0"),
        ("overlap", True, "overlap=True"),
        ("overlap", "half", "overlap='half' .*whole number of at least 0 .*'auto'"),
        ("overlap", 50, "overlap=50 with local_steps=50: .*the shortest round has 50. Choose an overlap below that"),
        ("test_scale", 0.0, r"test_scale=0\.0 .*\(0, 1\]"),
        ("test_scale", 1.5, r"test_scale=1\.5"),
        ("test_scale", -0.5, r"test_scale=-0\.5"),
        ("test_scale", float("nan"), "test_scale=nan"),
    ],
)
def test_an_impossible_value_is_named_with_its_limit(option, value, message):
    with pytest.raises(ValueError, match=message):
        Config(**{option: value})


@pytest.mark.parametrize(
    "options",
    [
        {"local_steps": 1},
        {"local_steps": QSR(4, 0.1)},
        {"local_steps": PostLocal(1, 4, 100)},
        {"seed": 0},
        {"seed": 2**40},
        {"min_blocks": 0},
        {"blocks_per_worker": "auto"},
        {"blocks_per_worker": (4, 0)},
        {"test_scale": 1.0},
        {"overlap": 49},
        {"overlap": "auto", "local_steps": 2},
        {"overlap": 3, "local_steps": PostLocal(9, 4, 100), "wire": "int8", "outer": "nesterov", "growth": (0.5, 1)},
        {"test_scale": 1e-3},
        {"outer": "nesterov", "outer_rate": 1, "outer_momentum": 0},
        {"outer": "nesterov", "outer_rate": 1e-3, "outer_momentum": 0.999},
        {"growth": (0.25, 0.25, 1), "warmup_rounds": 1},
        {"outer": "none", "outer_rate": 0.7, "outer_momentum": None},
        {"momentum": "travel", "batch_norm": "batch", "warmup_rounds": 3, "finish_rounds": 2},
    ],
)
def test_values_at_the_limits_are_taken(options):
    assert {name: getattr(Config(**options), name) for name in options} == options


@pytest.mark.parametrize(
    ("rate", "momenta"),
    [
        (0.7, {1: 0.3, 2: 0.65, 4: 0.825, 8: 0.9, 1000: 0.9}),
        (1.0, {1: 0.0, 2: 0.5}),
        (3, {1: 0.0, 2: 0.0, 4: 0.25}),
    ],
)
def test_the_outer_momentum_follows_the_number_of_workers(rate, momenta):
    config = Config(outer="nesterov", outer_rate=rate)
    assert {workers: config.outer_momentum_of(workers) for workers in momenta} == pytest.approx(momenta)
    assert "rate 0.7 and momentum 0.65" in Config(outer="nesterov").rounds_in_words(2)
    assert Config(outer="nesterov", outer_rate=rate, outer_momentum=0.2).outer_momentum_of(8) == 0.2


@pytest.mark.parametrize(
    ("other", "way_out"),
    [
        ({"local_steps": PostLocal(9, 3, 100)}, "shortest round has 3"),
        ({"local_steps": QSR(3, 0.1)}, "shortest round has 3"),
        ({"momentum": "travel"}, "momentum='travel' yet: use 'keep' or 'reset', or overlap=0"),
        ({"non_finite": "drop"}, "non_finite='drop' yet: use 'raise', or overlap=0"),
        ({"blocks_per_worker": "auto"}, "blocks_per_worker='auto' yet: use a list with a count for each worker"),
    ],
)
def test_an_overlap_names_what_it_cannot_work_with(other, way_out):
    with pytest.raises(ValueError, match=f"overlap=3 .*{way_out}"):
        Config(overlap=3, **other)
    if "local_steps" not in other:
        with pytest.raises(ValueError, match=f"overlap='auto' .*{way_out}"):
            Config(overlap="auto", **other)


def test_rounds_of_one_step_have_none_beside_which_a_sync_could_run():
    for rule in (1, PostLocal(1, 9, 100)):
        with pytest.raises(ValueError, match=r"overlap='auto' with local_steps=.*the shortest round has 1\. Choose"):
            Config(overlap="auto", local_steps=rule)


@pytest.mark.parametrize("other", [{"min_blocks": 2}, {"test_scale": 0.5}, {"blocks_per_worker": [2, 3]}])
def test_growth_stands_for_other_settings(other):
    with pytest.raises(ValueError, match=r"growth=\[0\.5, 1\] and .* set the same thing; leave one of them out"):
        Config(growth=[0.5, 1], **other)


def test_the_last_rounds_are_not_known_where_they_follow_the_rate():
    with pytest.raises(
        ValueError, match=r"finish_rounds=2 with local_steps=QSR.* Set local_steps to a number or PostLocal"
    ):
        Config(local_steps=QSR(4, 0.1), finish_rounds=2)
    with pytest.raises(ValueError, match=r"growth=\(0\.5, 1\) with local_steps=QSR"):
        Config(local_steps=QSR(4, 0.1), growth=(0.5, 1))


def test_settings_cannot_change_during_a_run():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().local_steps = 3


def test_a_misspelt_option_is_an_error():
    with pytest.raises(TypeError, match="local_step"):
        Config(local_step=3)
