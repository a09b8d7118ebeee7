from __future__ import annotations

import importlib
import multiprocessing
from collections.abc import Iterator
from multiprocessing import spawn

import pytest

from resist_lightning.strategies.launching.processes import _start_method_of_python


@pytest.fixture
def in_a_process_of_joblib() -> Iterator[None]:
    importlib.import_module("joblib.externals.loky")  # registers the method
    usual = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("loky", force=True)
    yield
    multiprocessing.set_start_method(usual, force=True)


@pytest.mark.usefixtures("in_a_process_of_joblib")
def test_workers_are_told_a_start_method_that_python_knows() -> None:
    """Under Hydra's launcher by joblib, spawned workers ended with "cannot find context for 'loky'"."""
    with _start_method_of_python("spawn"):
        assert spawn.get_preparation_data("worker")["start_method"] == "spawn"
    assert multiprocessing.get_start_method() == "loky"


def test_a_known_start_method_stays() -> None:
    usual = multiprocessing.get_start_method(allow_none=True)
    with _start_method_of_python("spawn"):
        assert multiprocessing.get_start_method(allow_none=True) == usual
