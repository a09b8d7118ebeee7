"""The command: which cases are missing, measure them, show the tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.accuracy import check, tables
from experiments.accuracy.cases import STUDIES, Case
from experiments.accuracy.data import prepare
from experiments.accuracy.figure import draw_all
from experiments.accuracy.pool import measured
from experiments.accuracy.settings import RESULTS, Settings, read_command_line, recorded
from experiments.app.launch import readable_errors
from experiments.harness.settings import ConfigError
from experiments.harness.study import Study

INTERRUPTED = 130


def main(arguments: Sequence[str], usage: str) -> int:
    """Run the command line; returns the exit code."""
    if {"-h", "--help"} & set(arguments):
        print(usage)
        return 0
    with readable_errors():
        names, settings = read_command_line(arguments, known())
        try:
            run(names, settings)
        except KeyboardInterrupt:
            print("interrupted: what was measured is kept; the same command goes on from there")
            return INTERRUPTED
    return 0


def opened(name: str, settings: Settings) -> Study:
    """What was measured of a study so far.

    Raises:
        ConfigError: the file holds results of other settings.
    """
    return Study.at(Path(settings.out) / f"{name}.jsonl", recorded(settings), fresh=settings.fresh)


def known() -> list[str]:
    """Names of all studies; the dear one that only chooses a learning rate comes last."""
    names = list(STUDIES)
    return [names[0], "check", *names[1:]]


def run(names: Sequence[str], settings: Settings) -> None:
    """Measure what is missing of these studies, then show them and draw the pictures.

    Raises:
        ConfigError: data, or result files, that do not fit.
    """
    _check_place(settings)
    studies = {name: opened(name, settings) for name in names}
    wanted = {name: check.cases(settings) if name == "check" else STUDIES[name](settings) for name in names}
    _copy_known(studies, wanted, settings)
    if any(_missing(studies[name], wanted[name]) for name in names):
        prepare(settings)  # a bad folder is told before anything is trained
    for name in names:
        for case, found in _measure(name, _missing(studies[name], wanted[name]), settings):
            studies[name].add(case, found)
            print(f"{name}: {case.name}: {_in_words(found)}", flush=True)
            _copy_known(studies, wanted, settings)
    _show(names, Path(settings.out))


def _missing(study: Study, wanted: Sequence[Case]) -> list[Case]:
    return [case for case in wanted if study.row_of(case) is None]


def _measure(name: str, cases: list[Case], settings: Settings) -> Iterator[tuple[Case, dict[str, Any]]]:
    if name == "check":
        yield from check.compare(cases, settings)
    else:
        yield from measured(cases, settings)


def _in_words(found: dict[str, Any]) -> str:
    if "last" in found:
        return f"{found['last']:.2f} % in {found['seconds']:.0f} s"
    return f"largest difference {found['largest_difference']:.2g}"


def _copy_known(studies: dict[str, Study], wanted: dict[str, list[Case]], settings: Settings) -> None:
    """A case that several studies have is trained once."""
    trained = {name: study for name, study in studies.items() if name != "check"}
    others = [] if settings.fresh else [name for name in STUDIES if name not in studies]
    for name in others:
        try:
            trained[name] = opened(name, settings)
        except ConfigError:
            continue  # other settings: nothing to copy from there
    for name, study in studies.items():
        for case in _missing(study, wanted[name]) if name != "check" else []:
            row = next((row for other in trained.values() if (row := other.row_of(case))), None)
            if row:
                study.add(case, {key: value for key, value in row.items() if key != "case"})


def _check_place(settings: Settings) -> None:
    if settings.size == "smoke" and Path(settings.out).resolve() == RESULTS.resolve():
        raise ConfigError(f"out={settings.out}: a smoke run must not stand among the results; give out=FOLDER")
    if Path(settings.out).exists() and not Path(settings.out).is_dir():
        raise ConfigError(f"out={settings.out}: is a file; give a folder")


def _show(names: Sequence[str], folder: Path) -> None:
    for name in names:
        Console().print(f"\n[bold]{name}[/bold]")
        print(tables.table(name, folder))
    for path in draw_all(folder):
        print(f"wrote {path}")
