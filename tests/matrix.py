"""Runs a short part of the tests with other versions of Python, torch and Lightning: ``make matrix``.

For each version of torch an environment is made, used with each version of Lightning, and removed; each takes 6 GB and
some ten minutes. The table in ``docs/versions.md`` keeps the last result of each combination. Arguments name versions
of torch, such as ``2.10 2.15``; without one all are run. The oldest torch gets the oldest installed Python, the
newest torch the newest, and those between what lies between.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path
from xml.etree import ElementTree as ET

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "versions.md"

TORCH = ("2.10", "2.11", "2.12", "2.13", "2.14", "2.15")
LIGHTNING = ("2.5.0", "2.6.*")
"""The oldest version that pyproject.toml accepts, and the newest."""

PART = (
    *("tests/unit/checkpoint", "tests/unit/checks", "tests/unit/comm", "tests/unit/engine", "tests/unit/faults"),
    *("tests/unit/methods/resist", "tests/unit/state", "tests/unit/strategies", "tests/unit/callbacks"),
    "tests/integration/test_fit.py",
)
"""The tests closest to torch and Lightning, and trainings of two processes."""

FREE_GB = 10
LIMIT_SECONDS = 1200

HEAD = """# Versions that were tried

Written by `make matrix` (`tests/matrix.py`), a row for the last run of each combination: the tests of the modules
that call torch and Lightning, and trainings of two processes. The supported versions, and how they change, are in
[CONTRIBUTING](../CONTRIBUTING.md#versions-and-support).

"""


@dataclass(frozen=True)
class Row:
    """The result of a combination."""

    python: str
    torch: str
    lightning: str
    passed: int
    skipped: int
    failed: int
    seconds: int
    day: str
    failures: str

    @property
    def key(self) -> tuple[tuple[int, ...], ...]:
        """The key of a row, which a later run replaces: minor versions, but Lightning's exact one."""
        return (_numbers(self.torch)[:2], _numbers(self.lightning), _numbers(self.python)[:2])


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version.partition("+")[0])))


def written(rows: Iterable[Row]) -> str:
    """The page, with the newest torch first."""
    names = [field.name for field in fields(Row)]
    lines = [names, ["---"] * len(names)]
    for row in sorted(rows, key=lambda row: row.key, reverse=True):
        lines.append([str(getattr(row, name)) for name in names])
    return HEAD + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def read(page: str) -> list[Row]:
    """The rows of a page."""
    table = [line.strip("| \n").split(" | ") for line in page.splitlines() if line.startswith("|")]
    rows = []
    for cells in table[2:]:
        # The last cell, of failures, may be empty.
        padded = cells + [""] * (len(fields(Row)) - len(cells))
        given = {field.name: cell for field, cell in zip(fields(Row), padded, strict=True)}
        counts = {name: int(given.pop(name)) for name in ("passed", "skipped", "failed", "seconds")}
        rows.append(Row(**given, **counts))
    return rows


def installed_pythons() -> list[Path]:
    """Usable interpreters, oldest version first, one for each minor version."""
    found: dict[tuple[int, ...], Path] = {}
    # Before PATH, where pyenv's shims may only print that a version is not selected.
    folders = [*sorted(Path.home().glob(".pyenv/versions/*/bin")), *os.environ["PATH"].split(os.pathsep)]
    for minor in range(10, 15):
        for folder in folders:
            path = Path(folder, f"python3.{minor}")
            if path.exists():
                found.setdefault((3, minor), path)
    return [found[key] for key in sorted(found)]


def python_for(torch: str, pythons: Sequence[Path]) -> Path:
    """The interpreter for a version of torch: spread evenly, from the oldest to the newest."""
    place = TORCH.index(torch) / (len(TORCH) - 1)
    return pythons[round(place * (len(pythons) - 1))]


def requirements() -> list[str]:
    """The requirements of the package and its tests in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return [*project["dependencies"], *extras["experiments"], *extras["test"]]


def pip(python: Path, *wanted: str) -> None:
    """Install into an environment."""
    command = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir", "--disable-pip-version-check", *wanted]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


def versions(python: Path) -> tuple[str, str, str]:
    """The versions of Python, torch and Lightning in an environment."""
    program = (
        "import json, platform; from importlib.metadata import version as v; "
        "print(json.dumps([platform.python_version(), v('torch'), v('lightning')]))"
    )
    found = json.loads(subprocess.run([python, "-c", program], check=True, capture_output=True, text=True).stdout)
    return found[0], found[1], found[2]


def run_part(python: Path, folder: Path) -> Row:
    """Run the tests in an environment."""
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    start = time.monotonic()
    # The environment's programs (mypy, torchrun) are found before others.
    variables = {**os.environ, "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [python, "-m", "pytest", *options, *PART],
        cwd=ROOT,
        env=variables,
        check=False,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    seconds = round(time.monotonic() - start)
    if done.returncode not in (0, 1):  # the test run was not completed
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    cases = list(ET.parse(report).getroot().iter("testcase"))
    failing = sorted(
        {_name(case) for case in cases if case.find("failure") is not None or case.find("error") is not None}
    )
    skipped = sum(case.find("skipped") is not None for case in cases)
    names = ", ".join(failing)
    passed = len(cases) - skipped - len(failing)
    return Row(*versions(python), passed, skipped, len(failing), seconds, str(date.today()), names)


def _name(case: ET.Element) -> str:
    name = case.get("name", "").partition("[")[0]
    return f"`{case.get('classname', '').rpartition('.')[2]}::{name}`"


def run_torch(torch: str, python: Path) -> Iterable[Row]:
    """The results with one version of torch; its environment is gone afterwards."""
    free = shutil.disk_usage(tempfile.gettempdir()).free / 1e9
    if free < FREE_GB:
        raise OSError(
            f"{free:.0f} GB are free in {tempfile.gettempdir()}, and an environment needs {FREE_GB}: set TMPDIR."
        )
    with tempfile.TemporaryDirectory(prefix="matrix_") as name:
        folder = Path(name)
        subprocess.run([python, "-m", "venv", folder / "env"], check=True)
        inside = folder / "env" / "bin" / "python"
        for lightning in LIGHTNING:
            pip(inside, f"torch=={torch}.*", f"lightning=={lightning}", *requirements())
            yield run_part(inside, folder)


def main(arguments: Sequence[str]) -> None:
    """Run the given versions of torch, or all; fail if a test does."""
    unknown = set(arguments) - set(TORCH)
    if unknown:
        sys.exit(f"error: {', '.join(sorted(unknown))} is no version of torch here: {', '.join(TORCH)}.")
    # Background jobs of a shell ignore Ctrl-C, and so do their children: tests of signals would fail.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    pythons = installed_pythons()
    failed = 0
    for torch in arguments or TORCH:
        for row in run_torch(torch, python_for(torch, pythons)):
            failed += row.failed
            rows = {old.key: old for old in read(PAGE.read_text() if PAGE.exists() else HEAD)}
            PAGE.write_text(written({**rows, row.key: row}.values()))
            sys.stdout.write(written([row])[len(HEAD) :])
            sys.stdout.flush()
    sys.exit(failed > 0)


if __name__ == "__main__":
    main(sys.argv[1:])
