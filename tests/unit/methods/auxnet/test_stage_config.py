"""What the settings of AuxNet may be, and which steps are serial."""

from __future__ import annotations

from typing import Any

import pytest

from resist_lightning import StageConfig


@pytest.mark.parametrize(
    ("options", "serial"),
    [
        ({"warmup_steps": 0}, []),
        ({"warmup_steps": 3}, [0, 1, 2]),
        ({"warmup_steps": 3, "serial_every": 4}, [0, 1, 2, 3, 7, 11]),
        ({"warmup_steps": 0, "serial_every": 5}, [0, 5, 10]),
        ({"warmup_steps": 2, "serial_every": 1}, list(range(12))),
    ],
)
def test_serial_steps_are_those_of_the_warm_up_and_corrections_behind_it(
    options: dict[str, int], serial: list[int]
) -> None:
    config = StageConfig(**options)  # type: ignore[arg-type]
    assert [step for step in range(12) if config.serial(step)] == serial


def test_corrections_do_not_keep_multipliers_from_their_updates() -> None:
    """A multiplier is updated in parallel steps only, so the two must not fall together for ever."""
    config = StageConfig(method="al-net", serial_every=10)
    updates = [step for step in range(300) if (step + 1) % config.multiplier_every == 0 and not config.serial(step)]
    assert len(updates) == 10


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "admm"}, "method='admm' is not known; choose one of 'penalty', 'al-net'"),
        ({"beta": 0.0}, "beta=0.0 must be a finite number above 0"),
        ({"beta": float("nan")}, "beta=nan must be a finite number"),
        ({"beta_growth": 0.9}, "beta_growth=0.9 must be at least 1"),
        ({"lambda_step": 1.5}, r"lambda_step=1.5 must lie in \(0, 1\]"),
        ({"multiplier_every": 0}, "multiplier_every=0 must be a whole number of at least 1"),
        ({"warmup_steps": -1}, "warmup_steps=-1 must be a whole number of at least 0"),
        ({"serial_every": -1}, "serial_every=-1 must be a whole number of at least 0.*0 means never"),
        ({"serial_every": 2.5}, "serial_every=2.5 must be a whole number"),
        ({"aux_width": 0}, "aux_width=0 must be a whole number of at least 1"),
        ({"aux_learning_rate": float("inf")}, "aux_learning_rate=inf must be a finite number"),
        ({"cuts": "layer2"}, "cuts='layer2' must be a list of names"),
        ({"momentum": "reset"}, "momentum='reset' is not known"),
        ({"non_finite": "drop"}, "non_finite='drop' is not known"),
    ],
)
def test_an_impossible_value_is_named_with_its_limit(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        StageConfig(**options)
