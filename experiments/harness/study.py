"""Result files, one per study: a row for each case, written as soon as it is there."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from experiments.harness.record import read_record, write_record
from experiments.harness.settings import ConfigError
from experiments.harness.workers import each


@dataclass(frozen=True)
class Case:
    """A training or measurement: a dataclass of plain values, which are its key in the result file."""

    @property
    def key(self) -> dict[str, Any]:
        """The values that distinguish it from other cases."""
        return asdict(self)

    @property
    def name(self) -> str:
        """The values other than the defaults, for progress lines."""
        usual = {item.name: item.default for item in fields(self)}
        return " ".join(f"{key}={value}" for key, value in self.key.items() if value != usual[key])


@dataclass
class Study:
    """The result file of one study."""

    path: Path  # the file; it need not exist
    settings: Mapping[str, Any]  # common to all its rows
    rows: list[dict[str, Any]]  # measured so far
    machine: Mapping[str, str | None] = field(default_factory=dict)  # additional entries on the machine

    @classmethod
    def at(cls, path: Path, ours: Mapping[str, Any], *, fresh: bool) -> Study:
        """Read the existing file, unless it is to be forgotten."""
        if fresh or not path.exists():
            return cls(path, ours, [])
        try:
            content = read_record(path)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read ({error}); remove it, or set fresh=true") from error
        # Rows of other settings would stand in one table with ours.
        theirs = content["settings"]
        for key in ours:
            if theirs.get(key) != ours[key]:
                raise ConfigError(
                    f"{key}={ours[key]}: {path} was measured with {key}={theirs.get(key)}; set that, or fresh=true to "
                    "measure again, or out=FOLDER for another place"
                )
        return cls(path, ours, content["rows"])

    def row_of(self, case: Case) -> dict[str, Any] | None:
        """The row measured for ``case``, or None."""
        return next((row for row in self.rows if row["case"] == case.key), None)

    def missing(self, wanted: Sequence[Any]) -> list[Any]:
        """The cases that have no row yet."""
        return [case for case in wanted if self.row_of(case) is None]

    def add(self, case: Case, found: Mapping[str, Any]) -> None:
        """Add a row and write the file."""
        self.rows.append({"case": case.key, **found})
        # Written beside and renamed: a reader never sees half a file, and a kill leaves none.
        draft = self.path.with_suffix(".draft")
        try:
            with redirect_stdout(io.StringIO()):  # it names the file, which is a draft
                write_record(draft, {"settings": dict(self.settings), "rows": self.rows}, **self.machine)
            draft.replace(self.path)
        except OSError as error:
            raise ConfigError(f"out={self.path.parent}: cannot be written ({error}); choose another folder") from error
        finally:
            draft.unlink(missing_ok=True)

    def fill(
        self, wanted: Sequence[Any], work: Callable[[Any], dict[str, Any]], told: Callable[[Any], str], jobs: int = 1
    ) -> None:
        """Measure the missing cases, ``jobs`` at a time; ``told`` puts a result in words."""
        missing = self.missing(wanted)
        for number, (case, found) in enumerate(each(missing, work, jobs), start=1):
            self.add(case, found)
            print(f"{self.path.stem} {number}/{len(missing)} {case.name}: {told(found)}", flush=True)
