"""Rules that import-linter cannot express: files that communicate, and lengths of files and functions."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "resist_lightning"
FILES = sorted(PACKAGE.rglob("*.py"))
TALKING = ("alone", "torch_collective", "member_collective", "members", "group", "replicas")
TALKS = {PACKAGE / "comm" / f"{name}.py" for name in TALKING}

LINES_OF_A_FILE = 300
LINES_OF_A_FUNCTION = 60


def reaches_distributed(tree: ast.AST) -> list[str]:
    """Every way to torch.distributed: imported, imported from, from torch, or as an attribute of torch."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if is_distributed(alias.name)]
        elif isinstance(node, ast.ImportFrom):
            found += [
                f"{node.module}.{alias.name}"
                for alias in node.names
                if is_distributed(node.module or "") or is_distributed(f"{node.module}.{alias.name}")
            ]
        elif isinstance(node, ast.Attribute) and is_distributed(ast.unparse(node)):
            found.append(ast.unparse(node))
    return found


def is_distributed(name: str) -> bool:
    return f"{name}.".startswith("torch.distributed.")


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch.distributed", 1),
        ("import torch.distributed as dist", 1),
        ("import os, torch.distributed.rpc as rpc", 1),
        ("from torch import distributed as dist, nn", 1),
        ("from torch.distributed import ReduceOp, all_reduce", 2),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from torch.distributed import Work", 1),
        ("import torch\ndef f():\n    torch.distributed.barrier()", 2),
        ("import torch\nfrom torch import nn\nfrom torch.distributions import Normal\ntorch.mean", 0),
    ],
)
def test_the_search_itself(source, found):
    hits = reaches_distributed(ast.parse(source))
    assert len(hits) == found


def test_the_package_is_where_we_look():
    assert len(FILES) > 15
    assert set(FILES) >= TALKS


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_collective_talks(path):
    hits = reaches_distributed(ast.parse(path.read_text()))
    assert (hits != []) == (path in TALKS), f"{path.name} reaches {hits}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_are_small(path):
    text = path.read_text()
    lines = text.count("\n")
    long = {
        node.name: length
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or 0) - node.lineno + 1) > LINES_OF_A_FUNCTION
    }
    assert lines <= LINES_OF_A_FILE, (
        f"{path.name} has {lines} lines, the limit is {LINES_OF_A_FILE}: divide it by concept"
    )
    assert not long, f"{path.name} has functions of more than {LINES_OF_A_FUNCTION} lines: {long}"
