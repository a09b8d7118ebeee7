"""The page of versions: a run replaces its row, and the oldest and the newest supported torch have one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.matrix import LIGHTNING, PAGE, PART, ROOT, TORCH, Row, main, python_for, read, requirements, written

ROW = Row("3.10.13", "2.10.0+cpu", "2.5.0", 700, 3, 0, 81, "2026-11-28", "")


def test_a_page_is_read_as_it_was_written() -> None:
    rows = [ROW, replace(ROW, torch="2.9.1", failed=2, failures="`test_a::test_b`, `test_c::test_d`")]
    page = written(reversed(rows))
    assert read(page) == rows  # in numeric order: 2.10 is newer than 2.9
    assert page.startswith("# Versions")


def test_the_key_is_the_combination() -> None:
    assert replace(ROW, torch="2.10.1", python="3.10.2", passed=1).key == ROW.key
    others = [replace(ROW, torch="2.11.0"), replace(ROW, lightning="2.5.1"), replace(ROW, python="3.11.13")]
    assert len({row.key for row in [ROW, *others]}) == 4


def test_the_oldest_torch_gets_the_oldest_python() -> None:
    pythons = [Path("a"), Path("b"), Path("c"), Path("d")]
    chosen = [python_for(torch, pythons) for torch in TORCH]
    assert chosen == sorted(chosen)
    assert (chosen[0], chosen[-1]) == (pythons[0], pythons[-1])
    assert set(chosen) == set(pythons)
    assert python_for(TORCH[2], pythons[:1]) == pythons[0]


def test_an_unknown_torch_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"1\.13 is no version of torch here: 2\.10, "):
        main(["1.13"])


def test_its_ends_are_those_of_pyproject_and_were_run() -> None:
    needed = {each.name: each.specifier for each in map(Requirement, requirements())}
    oldest = {name: min(Version(each.version) for each in needed[name]) for name in ("torch", "lightning")}
    assert oldest == {"torch": Version(TORCH[0]), "lightning": Version(LIGHTNING[0])}
    tried = {(".".join(row.torch.split(".")[:2]), row.lightning[:3]) for row in read(PAGE.read_text())}
    assert {(torch, lightning[:3]) for torch in (TORCH[0], TORCH[-1]) for lightning in LIGHTNING} <= tried


def test_the_part_is_there() -> None:
    for name in PART:
        assert (ROOT / name).exists()
