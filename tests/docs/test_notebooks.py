"""Notebooks of the documentation run, in a kernel as Jupyter starts it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "notebooks"


def outputs(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """Run a notebook; returns its cells' outputs, which must be of the kinds saved in the file, for the site."""
    monkeypatch.delenv("OMP_NUM_THREADS")  # so that the notebook computes on all cores, as on a user's machine
    notebook = nbformat.read(FOLDER / name, as_version=4)
    saved = [[sorted(output.data) for output in cell.get("outputs", [])] for cell in notebook.cells]
    NotebookClient(notebook, timeout=100, resources={"metadata": {"path": str(folder)}}).execute()
    shown = [[output for output in cell.get("outputs", []) if "data" in output] for cell in notebook.cells]
    assert [[sorted(output.data) for output in cell] for cell in shown] == saved
    return [cell for cell in shown if cell]


def test_a_network_is_drawn_in_a_notebook(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn = outputs("your_network.ipynb", tmp_path, monkeypatch)
    assert len(drawn) == 2
    for (cell,) in drawn:
        assert "data:image/png;base64," in cell.data["text/html"]


def test_a_network_is_trained_in_a_notebook(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (accuracy,), (picture,) = outputs("training.ipynb", tmp_path, monkeypatch)
    assert float(accuracy.data["text/plain"]) > 0.8  # 0.1 by chance
    assert picture.data["image/png"]
