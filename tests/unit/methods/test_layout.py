"""Settings of every method for which a training is too short."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

from resist_lightning import Config, NeuronConfig, StageConfig
from resist_lightning.methods.auxnet.layout import StageLayout
from resist_lightning.methods.ist.layout import NeuronLayout
from resist_lightning.methods.layout import Layout
from resist_lightning.methods.resist.layout import BlockLayout
from resist_lightning.schedule.progress import Clock
from resist_lightning.schedule.round_length import PostLocal
from tests.helpers.nets import small_preact


def resist(**settings: object) -> Layout:
    return BlockLayout(small_preact(), Config(local_steps=10, min_blocks=1, **settings), 2)  # type: ignore[arg-type]


def ist(**settings: object) -> Layout:
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    return NeuronLayout(net, NeuronConfig(local_steps=10, **settings), 2)  # type: ignore[arg-type]


def auxnet(**settings: object) -> Layout:
    return StageLayout(small_preact(), StageConfig(local_steps=10, **settings), 2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "settings", "begin", "steps", "said"),
    [
        (resist, {}, Clock(10), 40, None),
        (resist, {"warmup_rounds": 4}, Clock(10), 41, None),
        (resist, {"warmup_rounds": 4}, Clock(10), 40, "warmup_rounds cover all 4 rounds"),
        (resist, {"warmup_rounds": 4}, Clock(10, 2, 5, 20), 15, "warmup_rounds cover all 4 rounds"),
        (resist, {"finish_rounds": 3}, Clock(10), 40, None),
        (resist, {"finish_rounds": 4}, Clock(10), 40, "finish_rounds cover all 4 rounds"),
        (
            resist,
            {"finish_rounds": 4, "warmup_rounds": 4},
            Clock(10),
            60,
            "warmup_rounds and finish_rounds cover all 6",
        ),
        # A run that is resumed in its finish had rounds with parts before.
        (resist, {"finish_rounds": 3}, Clock(10, 8, 0, 80), 20, None),
        (resist, {"warmup_rounds": 3}, Clock.by(PostLocal(50, 1, 50), lambda: None), 100, None),
        (resist, {"warmup_rounds": 12}, Clock.by(PostLocal(1, 50, 10), lambda: None), 110, "cover all 12 rounds"),
        (resist, {"fragments": 2}, Clock.by(PostLocal(10, 1, 10), lambda: None), 11, None),
        (resist, {"overlap": "auto"}, Clock(10), 30, "it is chosen after 3 rounds, and this training has 3"),
        (resist, {"overlap": "auto"}, Clock(10), 31, None),
        (resist, {"overlap": "auto"}, Clock.by(PostLocal(2, 50, 2), lambda: None), 102, "this training has 3, so"),
        (resist, {"overlap": "auto"}, Clock.by(PostLocal(50, 2, 50), lambda: None), 56, None),
        (resist, {"fragments": 2}, Clock(10), 19, "fragments=2: this training ends after 1 whole rounds"),
        (resist, {"fragments": 2}, Clock(10), 20, None),
        (ist, {"finish_rounds": 3}, Clock(10), 40, None),
        (ist, {"finish_rounds": 4}, Clock(10), 40, "finish_rounds cover all 4 rounds"),
        (ist, {"finish_rounds": 4}, Clock(10), 35, "every worker always holds all neurons"),
        (auxnet, {}, Clock(10), 200, "warmup_steps=200 cover all 200 steps"),
        (auxnet, {}, Clock(10), 201, None),
        (auxnet, {}, Clock(10, 19, 0, 190), 10, "all 200 steps"),
        (auxnet, {}, Clock(10, 19, 0, 190), 11, None),
        (auxnet, {"warmup_steps": 0}, Clock(10), 3, None),
    ],
)
def test_a_training_that_is_too_short_for_a_setting_is_told(
    make: Callable[..., Layout], settings: dict[str, object], begin: Clock, steps: int, said: str | None
) -> None:
    layout = make(**settings)
    layout.plan_end(begin, begin.total_steps + steps)
    texts = layout.without_effect(begin, steps)
    if said is None:
        assert texts == []
    else:
        (text,) = texts
        assert said in text


def test_local_sgd_divides_nothing_and_is_not_told_so() -> None:
    layout = BlockLayout(small_preact(), Config(local_steps=10, blocks=[]), 2)
    assert layout.without_effect(Clock(10), 40) == []
