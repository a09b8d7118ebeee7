"""The command line of every study, on a study that does nothing: options, refusals, exit codes."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from experiments.harness import cli
from experiments.harness.settings import Failure, option
from tests.helpers.programs import ROOT, refusal

STUDIES = ("accuracy", "memory")


@dataclass(kw_only=True)
class Options(cli.Command):
    out: str = option("runs/toy", "folder of the result files")
    folder: str = option(hint="name it, folder=FOLDER", smoke="here")
    seeds: int = option(3, "3 for a spread", least=1, most=100, smoke=1)
    rate: float | None = option(0.1, above=0, below=1)
    tasks: list[str] = option(["digits", "speech"], "so that samples are equal", choices=("digits", "speech"))
    widths: list[int] = option([16, 32], least=4, smoke=[8])
    joined: list[str] = option([], empty=True)


def read(*arguments: str) -> tuple[list[str], Options]:
    return cli.read(arguments, Options, STUDIES)


def run(program: Any, *arguments: str) -> int:
    return cli.run(program, Options, "how to call it", STUDIES, ["size=smoke", *arguments])


# Not advise.py, whose model Hydra composes first.
PROGRAMS = [
    path for path in sorted((ROOT / "experiments").glob("*/*.py")) if "class Options(cli.Command)" in path.read_text()
]


def name_of(program: Path) -> str:
    return ".".join(program.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("program", PROGRAMS, ids=name_of)
def test_every_experiment_takes_its_own_options_in_every_size(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # which experiments.gpu sets
    schema = importlib.import_module(name_of(program)).Options
    options = {item.name: item.metadata["sizes"] for item in dataclasses.fields(schema)}
    user_gives = {"out": tmp_path, "folder": tmp_path, "run": tmp_path, "name": "any"}
    given = [f"{name}={value}" for name, value in user_gives.items() if name in options]
    for size in {"full", *(size for sizes in options.values() for size in sizes)}:
        _, found = cli.read([f"size={size}", *given], schema)
        assert found.size == size


def test_a_size_changes_several_options_and_what_is_given_counts() -> None:
    names, options = read("size=smoke", "memory", "widths=[4,5]", "rate=null")
    assert names == ["memory"]
    assert (options.seeds, options.folder, options.widths, options.rate) == (1, "here", [4, 5], None)
    names, options = read("folder=there")
    assert names == list(STUDIES)
    assert (options.seeds, options.rate, options.tasks) == (3, 0.1, ["digits", "speech"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("size=huge", "size=huge: must be one of full, smoke"),
        ("acuracy", "acuracy: no such study; choose from accuracy, memory, or write key=value"),
        ("size=full", "folder is missing: name it, folder=FOLDER"),
        ("seed=3", "seed=3: unknown key; the configuration has size, out, folder, seeds"),
        ("seed=3", "did you mean seeds?"),
        ("seeds=0", "seeds=0: must be a whole number, at least 1, at most 100 (3 for a spread)"),
        ("seeds=many", "seeds=many: must be a whole number"),
        ("rate=1", "rate=1: must be a number or null, above 0, below 1"),
        ("tasks=[cifar]", "tasks=['cifar']: 'cifar' must be one of digits, speech (so that samples are equal)"),
        ("tasks=[]", "tasks=[]: must be a list of one or more entries, each must be one of digits"),
        ("tasks=digits", "tasks=digits: must be a list"),
        ("widths=[4,4]", "widths=[4, 4]: an entry appears twice"),
        ("widths=[3]", "widths=[3]: 3 must be a whole number, at least 4"),
        ("seeds=[", "cannot be read"),
        (f"out={ROOT}/README.md/x", "is a file, not a folder"),
        ("out=results", "a smoke run must not be stored among the results"),
    ],
)
def test_bad_input_is_one_line_before_any_work(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("was run")

    assert message in refusal(lambda: run(never, *arguments.split()), tmp_path, capsys)


def test_how_a_study_ends_is_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    def program(names: Sequence[str], _: Options) -> int:
        if names == ["accuracy"]:
            raise Failure("a worker is gone")
        if names == ["memory"]:
            raise KeyboardInterrupt
        return 7

    assert run(program) == 7
    assert run(program, "accuracy") == 1
    assert capsys.readouterr().err == "error: a worker is gone\n"
    assert run(program, "memory") == cli.INTERRUPTED
    assert "resumes from what was measured" in capsys.readouterr().out
    assert run(program, "--help") == 0
    assert capsys.readouterr().out == "how to call it\n"
