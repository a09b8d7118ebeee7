"""An option is defined once, and each strategy that has it documents and checks it."""

from __future__ import annotations

import inspect
import pydoc
from datetime import timedelta
from typing import Any

import pytest

from resist_lightning import AuxNetStrategy, ISTStrategy, LocalSGDStrategy, ResISTStrategy
from resist_lightning.strategies.options import StrategyOptions

FACES = [ResISTStrategy, ISTStrategy, AuxNetStrategy, LocalSGDStrategy]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_save_error": "ignore"}, "on_save_error='ignore' is not known; choose one of 'raise', 'warn'"),
        ({"on_worker_loss": "wait"}, "on_worker_loss='wait' is not known; choose one of 'stop', 'shrink'"),
        ({"snapshot_every_n_rounds": 0}, "snapshot_every_n_rounds=0 must be a whole number of at least 1"),
        ({"snapshots": "memory://folder"}, "snapshots='memory://folder' must be a folder with a local path"),
        ({"on_worker_loss": "shrink"}, "name a folder that all workers can read, snapshots=FOLDER"),
        ({"silence": timedelta(seconds=1)}, "silence=0:00:01 must be at least 0:00:03"),
        # Seconds, and no limit at all (which DDP has): the workers ended with an AttributeError once they were started.
        ({"silence": 30}, r"silence=30 must be a datetime.timedelta above 0, as timedelta\(seconds=60\) is"),
        ({"timeout": 600}, "timeout=600 must be a datetime.timedelta above 0"),
        ({"timeout": None}, "timeout=None must be a datetime.timedelta above 0"),
        ({"timeout": timedelta()}, r"timeout=datetime.timedelta\(0\) must be a datetime.timedelta above 0"),
    ],
)
def test_bad_settings_name_the_value_and_the_way_out(options: dict[str, Any], message: str) -> None:
    for taker in (StrategyOptions, *FACES):
        with pytest.raises(ValueError, match=message):
            taker(**options)


@pytest.mark.parametrize("face", FACES)
def test_help_shows_every_option_with_its_type_its_default_and_a_text(face: type) -> None:
    shown = " ".join(pydoc.plain(pydoc.render_doc(face)).split())
    parameters = inspect.signature(face).parameters
    assert {"timeout", "snapshots", "check"} < set(parameters)
    for parameter in parameters.values():
        assert str(parameter) in shown, "name, type and default"
        assert parameter.default is not parameter.empty
        assert f"{parameter.name}: " in (face.__init__.__doc__ or "")
    assert "options" not in parameters
    assert ("recalibration_batches" in parameters) == ("batch_norm" in parameters)


@pytest.mark.parametrize("face", FACES)
def test_a_misspelt_option_is_a_type_error_of_the_class_that_was_called(face: type) -> None:
    with pytest.raises(TypeError, match=rf"{face.__name__}\.__init__.* unexpected keyword argument 'lokal_steps'"):
        face(lokal_steps=5)
    with pytest.raises(TypeError, match="positional"):
        face(5)


def test_the_text_of_a_strategy_goes_before_that_of_its_method() -> None:
    assert "``travel``" in (ResISTStrategy.__init__.__doc__ or "")
    assert "travel" not in (LocalSGDStrategy.__init__.__doc__ or "")
