"""The package imports exactly the dependencies in pyproject.toml; CITATION.cff has the same version."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path for folder in ("resist_lightning", "hydra_plugins") for path in (ROOT / folder).rglob("*.py"))
EXTRAS = {"resist_lightning/strategies/ray.py": "ray"}  # modules that the package does not import, and their extra
WHEN_IT_DRAWS = {"matplotlib"}  # imported within functions, with an error that says how to install it


def project() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return table


def declared() -> set[str]:
    """Top-level modules of the dependencies, named like their distributions."""
    return {Requirement(text).name.replace("-", "_") for text in project()["dependencies"]}


def imports(tree: ast.AST, *, in_functions: bool) -> Iterator[str]:
    """Top-level names that a file imports from outside: when it is imported, or also when its functions are called."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            if in_functions:
                yield from imports(node, in_functions=True)
        elif in_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports(node, in_functions=in_functions)


def of_package(*, in_functions: bool) -> set[str]:
    always = [path for path in FILES if path.relative_to(ROOT).as_posix() not in EXTRAS]
    found = {name for path in always for name in imports(ast.parse(path.read_text()), in_functions=in_functions)}
    return found - sys.stdlib_module_names - {"resist_lightning"}


@pytest.mark.parametrize(
    ("source", "at_import", "in_all"),
    [
        ("import numpy.random, torch", {"numpy", "torch"}, {"numpy", "torch"}),
        ("try:\n    import hydra\nexcept ImportError:\n    hydra = None", {"hydra"}, {"hydra"}),
        ("def f():\n    from matplotlib.figure import Figure", set(), {"matplotlib"}),
        ("class A:\n    import rich\n    def f(self):\n        import yaml", {"rich"}, {"rich", "yaml"}),
        ("if TYPE_CHECKING:\n    import pandas", set(), {"pandas"}),
    ],
)
def test_the_search_itself(source: str, at_import: set[str], in_all: set[str]) -> None:
    tree = ast.parse(source)
    assert set(imports(tree, in_functions=False)) == at_import
    assert set(imports(tree, in_functions=True)) == in_all


def test_dependencies_are_what_the_package_imports() -> None:
    assert of_package(in_functions=False) == declared()
    assert of_package(in_functions=True) - declared() == WHEN_IT_DRAWS


@pytest.mark.parametrize(("file", "extra"), EXTRAS.items())
def test_a_module_for_those_who_have_an_extra_is_imported_by_no_other(file: str, extra: str) -> None:
    needs = set(imports(ast.parse((ROOT / file).read_text()), in_functions=True)) - sys.stdlib_module_names
    assert needs - declared() - {"resist_lightning"} == {extra}
    assert [Requirement(text).name for text in project()["optional-dependencies"][extra]] == [extra]
    module = file.removesuffix(".py").replace("/", ".")
    everywhere = "\n".join(path.read_text() for path in FILES)
    assert not re.search(rf"^\s*(from|import) {re.escape(module)}\b", everywhere, re.MULTILINE)


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == project()["version"]
    assert citation["license"] == project()["license"]
    assert {"2107.00961", "1910.02120", "2112.05387"} == {
        re.sub(".*/", "", reference["url"]) for reference in citation["references"]
    }
