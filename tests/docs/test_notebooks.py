"""Notebooks of the documentation run, in a kernel as Jupyter starts it."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "notebooks" / "your_network.ipynb"


def test_a_network_is_drawn_and_trained_in_a_notebook(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")  # so that the notebook computes on all cores, as on a user's machine
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    saved = [cell.source for cell in notebook.cells]
    NotebookClient(notebook, timeout=100, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert [cell.source for cell in notebook.cells] == saved
    *_, drawn, _, accuracy = (cell.outputs for cell in notebook.cells if cell.cell_type == "code")
    assert "data:image/png;base64," in drawn[-1].data["text/html"]
    assert float(accuracy[-1].data["text/plain"]) > 0.8  # one in ten by chance
