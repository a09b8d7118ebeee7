"""Notebooks of the documentation run, in a kernel as Jupyter starts it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "notebooks"


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[Any]]]:
    """The outputs of the cells of each notebook; both run in one kernel, which takes seconds to import torch."""
    names = ("training.ipynb", "your_network.ipynb")  # the one that forks comes first
    notebooks = {name: nbformat.read(FOLDER / name, as_version=4) for name in names}
    saved = {name: [_kinds(cell) for cell in notebook.cells] for name, notebook in notebooks.items()}
    together = notebooks[names[0]].copy()
    forget = nbformat.v4.new_code_cell("%reset -f")  # the second one has no names of the first
    together.cells = [*notebooks[names[0]].cells, forget, *notebooks[names[1]].cells]
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("OMP_NUM_THREADS")  # so that a notebook computes on all cores, as on a user's machine
        patched.setenv("PL_TRAINER_MAX_STEPS", "270")  # of 450
        folder = str(tmp_path_factory.mktemp("notebooks"))
        NotebookClient(together, timeout=100, resources={"metadata": {"path": folder}}).execute()
    for name, notebook in notebooks.items():  # of the kinds saved in the file, for the site
        assert [_kinds(cell) for cell in notebook.cells] == saved[name]
    return {name: [_data(cell) for cell in notebook.cells if _data(cell)] for name, notebook in notebooks.items()}


def _data(cell: Any) -> list[Any]:
    return [output for output in cell.get("outputs", []) if "data" in output]


def _kinds(cell: Any) -> list[list[str]]:
    return [sorted(output.data) for output in _data(cell)]


def test_a_network_is_trained_in_a_notebook(shown: dict[str, list[list[Any]]]) -> None:
    (accuracy,), (picture,) = shown["training.ipynb"]
    assert float(accuracy.data["text/plain"]) > 0.8  # 0.1 by chance
    assert picture.data["image/png"]


def test_a_network_is_drawn_in_a_notebook(shown: dict[str, list[list[Any]]]) -> None:
    drawn = shown["your_network.ipynb"]
    assert len(drawn) == 2
    for (cell,) in drawn:
        assert "data:image/png;base64," in cell.data["text/html"]
