"""A study of only one method, or one that was stopped after its first training, still shows its results."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from experiments.harness.record import as_lines, read_record
from experiments.harness.tables import FOLDERS, Content, chosen, distinct

COMPARED = [
    folder for folder in FOLDERS if hasattr(importlib.import_module(f"experiments.{folder.name}.tables"), "STUDIES")
]


def contents_of_cases(folder: Path) -> list[tuple[Path, Content]]:
    """The result files of a study with a case in each row."""
    found = [(path, read_record(path)) for path in sorted(folder.glob("results/**/*.jsonl"))]
    return [(path, content) for path, content in found if "case" in next(iter(content.get("rows", [])), {})]


def of_module(folder: Path, name: str) -> Any:
    return importlib.import_module(f"experiments.{folder.name}.{name}")


@pytest.mark.parametrize("folder", COMPARED, ids=lambda folder: folder.name)
def test_tables_of_one_method_or_of_the_first_row(folder: Path) -> None:
    studies = of_module(folder, "tables").STUDIES
    for path, content in contents_of_cases(folder):
        rows = content["rows"]
        keys = {"method", "workers", "seed", "lr"} & set(rows[0]["case"])
        parts = [chosen(rows, **{key: value}) for key in keys for value in distinct(rows, key)]
        for part in [*parts, rows[:1]]:
            for make in studies.get(path.stem, ()):
                assert make({**content, "rows": part})


@pytest.mark.parametrize("name", ["accuracy", "auxnet", "ist"])
def test_pictures_of_the_first_row(name: str, tmp_path: Path) -> None:
    folder = next(folder for folder in COMPARED if folder.name == name)
    for path, content in contents_of_cases(folder):
        out = tmp_path / path.parent.relative_to(folder)
        out.mkdir(parents=True, exist_ok=True)
        (out / path.name).write_text(as_lines({**content, "rows": content["rows"][:1]}))

        drawn = of_module(folder, "figure").draw_all(out)

        assert all(picture.exists() for picture in drawn)
        (out / path.name).unlink()
