from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch

from resist_lightning.files import read_file, write_file
from resist_lightning.randomness import random_state, set_random_state


def draw() -> tuple[float, float, float, float]:
    return torch.rand(()).item(), random.random(), random.gauss(0, 1), float(np.random.rand())


def test_generators_go_on_from_a_state_that_was_written_to_a_file(tmp_path: Path) -> None:
    random.gauss(0, 1)  # which keeps one number for the next call
    write_file(random_state(), tmp_path / "state")
    expected = [draw() for _ in range(3)]

    set_random_state(read_file(tmp_path / "state"))

    assert [draw() for _ in range(3)] == expected
