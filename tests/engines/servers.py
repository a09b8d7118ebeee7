"""Tests under a server of an engine never skip: where it is missing they fail, with the command that installs it."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence

import pytest


def missing(programs: Sequence[str] = (), packages: Sequence[str] = ()) -> list[str]:
    """Which programs are not on the PATH, and which Python packages cannot be imported."""
    absent = [program for program in programs if shutil.which(program) is None]
    return absent + [package for package in packages if importlib.util.find_spec(package) is None]


def require(install: str, programs: Sequence[str] = (), packages: Sequence[str] = ()) -> None:
    """Fail the test, in one line, where a server is not installed.

    Args:
        install: the command that installs all of it.
        programs: that must be on the PATH.
        packages: of Python, which must be importable.
    """
    absent = missing(programs, packages)
    if absent:
        pytest.fail(f"{', '.join(absent)} not found here. Install it: {install}", pytrace=False)
