"""Fixtures for all tests: leaks fail a test, and random draws and hypothesis's examples are the same everywhere."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from tests.helpers.jobs import Files
from tests.helpers.leaks import MARK, no_leaks

ROOT = Path(__file__).resolve().parents[1]

os.environ[MARK] = str(os.getpid())

# One thread per process, as several share a core. Lightning would choose more, and threads change the last bit.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# A shell's background jobs ignore Ctrl-C, and so would all processes that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No deadline: the machine may be busy. No database and always the same examples: CI finds what we find.
hypothesis.settings.register_profile("suite", deadline=None, database=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("suite")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Files:
    """Assigns tests to the processes of ``-n``."""
    return Files(config, log)


@pytest.fixture(autouse=True)
def leaves_nothing_behind() -> Iterator[None]:
    """Fail the test that leaves an environment variable, a process group, a process, a thread or a file."""
    with no_leaks(ROOT):
        yield


@pytest.fixture(autouse=True)
def the_same_chance() -> None:
    """Seed torch, so that a test draws the same numbers in any order of the tests."""
    torch.manual_seed(0)


@pytest.fixture
def root() -> Path:
    """The root of the repository."""
    return ROOT
