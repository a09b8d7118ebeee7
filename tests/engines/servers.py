"""Tests under a server of an engine never skip: without it they fail, with the command that installs it."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence

import pytest


def missing(programs: Sequence[str] = (), packages: Sequence[str] = ()) -> list[str]:
    """The programs that are not on the PATH, and the Python packages that cannot be imported."""
    absent = [program for program in programs if shutil.which(program) is None]
    return absent + [package for package in packages if importlib.util.find_spec(package) is None]


def require(install: str, programs: Sequence[str] = (), packages: Sequence[str] = ()) -> None:
    """Fail the test, in one line, if a server is not installed.

    Args:
        install: the command that installs all of it.
        programs: names that must be on the PATH.
        packages: Python packages that must be importable.
    """
    absent = missing(programs, packages)
    if absent:
        pytest.fail(f"{', '.join(absent)} not found here. Install it: {install}", pytrace=False)
