"""Fixtures for tests that also train in this process, not only in workers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers.trainers import run_trainers


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread, as in workers: on such small tensors two threads on a busy machine are ten times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def saved_by_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A folder with a checkpoint of two workers in mid-round, and the weights at the end of that run."""
    from tests.integration.test_checkpoint_files import save

    folder = tmp_path_factory.mktemp("saved")
    return folder, run_trainers(save, 2, str(folder / "a.ckpt"))[0]


@pytest.fixture
def saved(saved_by_two: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> Path:
    """A copy of the checkpoint, which the test may damage."""
    shutil.copytree(saved_by_two[0], tmp_path, dirs_exist_ok=True)
    return tmp_path / "a.ckpt"


@pytest.fixture
def unbroken(saved_by_two: tuple[Path, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The weights of the run that wrote the checkpoint."""
    return saved_by_two[1]
