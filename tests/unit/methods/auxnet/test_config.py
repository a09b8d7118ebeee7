"""The limits of the settings of AuxNet, their names for comparison between workers, and which steps are serial."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from torch import nn

from resist_lightning import StageConfig


@pytest.mark.parametrize(
    ("options", "serial"),
    [
        ({"method": "penalty", "warmup_steps": 0}, []),
        ({"method": "penalty", "warmup_steps": 3}, [0, 1, 2]),
        ({"method": "penalty", "warmup_steps": 3, "serial_every": 4}, [0, 1, 2, 3, 7, 11]),
        ({"method": "penalty", "warmup_steps": 0, "serial_every": 5}, [0, 5, 10]),
        ({"method": "penalty", "warmup_steps": 2, "serial_every": 1}, list(range(12))),
        ({}, list(range(12))),
        ({"warmup_steps": 3}, [0, 1, 2]),
    ],
)
def test_serial_steps_are_those_of_the_warm_up_and_corrections_behind_it(
    options: dict[str, Any], serial: list[int]
) -> None:
    config = StageConfig(**options)
    assert [step for step in range(12) if config.serial(step)] == serial


def test_corrections_do_not_keep_multipliers_from_their_updates() -> None:
    """A multiplier is updated in parallel steps only, so the two must not always coincide."""
    config = StageConfig(method="al-net", serial_every=10)
    updates = [step for step in range(300) if (step + 1) % config.multiplier_every == 0 and not config.serial(step)]
    assert len(updates) == 10


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "admm"}, "method='admm' is not known; choose one of 'delayed', 'penalty', 'al-net'"),
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
        ({"delay": -1}, "delay=-1 must be a whole number of at least 0.*0 back-propagation"),
        (
            {"method": "penalty", "delay": 2},
            "method='penalty' delays nothing, so delay=2 would have no effect. Leave it out, or choose "
            "method='delayed'",
        ),
        # As in a program for an earlier version, whose default used guesses.
        (
            {"beta": 2.0, "serial_every": 4, "aux_width": 8},
            "'delayed', the default, guesses nothing, so beta=2.0, serial_every=4, aux_width=8 would have no effect"
            ".*method='penalty' is the paper's",
        ),
        ({"cuts": "layer2"}, "cuts='layer2' must be a list of names"),
        ({"momentum": "reset"}, "momentum='reset' is not known"),
        ({"non_finite": "drop"}, "non_finite='drop' is not known"),
    ],
)
def test_an_impossible_value_is_named_with_its_limit(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        StageConfig(**options)


def two_layers(image: tuple[int, ...], boundary: tuple[int, ...], between: Any = None) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, boundary[0]))


class Factory:
    """A factory of auxiliary networks without a name, unlike a function."""

    def __init__(self, width: int = 5) -> None:
        self.width = width

    def __call__(self, image: tuple[int, ...], boundary: tuple[int, ...], between: Any = None) -> nn.Module:
        return two_layers(image, boundary, between)


FACTORIES: dict[str, Any] = {
    "a function": lambda: two_layers,
    "a lambda": lambda: lambda *shapes: two_layers(*shapes, 1),
    "an object": Factory,
    "a method": lambda: Factory().__call__,
    "a part of an object": lambda: partial(Factory(), between=3),
    "a function as an argument": lambda: partial(two_layers, between=lambda: 3),
    "an object as an argument": lambda: partial(two_layers, between=[Factory()]),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_a_factory_has_one_name_wherever_it_lies_in_memory(name: str) -> None:
    one, other = FACTORIES[name](), FACTORIES[name]()  # both are kept, so that they have different addresses
    names = [StageConfig(method="penalty", aux_network=each).in_words() for each in (one, other)]

    assert names[0] == names[1]
    assert "0x" not in names[0]["aux_network"]


def test_factories_with_other_arguments_have_other_names() -> None:
    made = [partial(two_layers, between=3), partial(two_layers, between=4), two_layers, Factory(), None]
    names = {StageConfig(method="penalty", aux_network=each).in_words()["aux_network"] for each in made}
    assert len(names) == len(made)
