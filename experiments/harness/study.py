"""Result files, one per study: a row for each case, written as soon as it is there."""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from experiments.harness.record import read_record, write_record
from experiments.harness.settings import ConfigError


class HasKey(Protocol):
    """A case: one training or measurement."""

    @property
    def key(self) -> dict[str, Any]:
        """What tells it from other cases, as plain data."""


@dataclass
class Study:
    """The result file of one study.

    Args:
        path: the file; it need not exist.
        settings: what all its rows have in common.
        rows: what was measured so far.
    """

    path: Path
    settings: Mapping[str, Any]
    rows: list[dict[str, Any]]

    @classmethod
    def at(cls, path: Path, ours: Mapping[str, Any], *, fresh: bool) -> Study:
        """Read what is there.

        Args:
            path: the file.
            ours: the settings that its rows must have in common.
            fresh: whether to forget what is there.

        Raises:
            ConfigError: the file holds results of other settings.
        """
        if fresh or not path.exists():
            return cls(path, ours, [])
        try:
            content = read_record(path)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read ({error}); remove it, or take fresh=true") from error
        theirs = content["settings"]
        for key in ours:
            if theirs.get(key) != ours[key]:
                raise ConfigError(
                    f"{key}={ours[key]}: {path} was measured with {key}={theirs.get(key)}; set that, "
                    "or fresh=true to measure anew, or out=FOLDER for another place"
                )
        return cls(path, ours, content["rows"])

    def row_of(self, case: HasKey) -> dict[str, Any] | None:
        """What was measured for ``case``, or None."""
        return next((row for row in self.rows if row["case"] == case.key), None)

    def add(self, case: HasKey, found: Mapping[str, Any]) -> None:
        """Add a row and write the file; whoever reads it sees it whole."""
        self.rows.append({"case": case.key, **found})
        draft = self.path.with_suffix(".draft")
        try:
            with redirect_stdout(io.StringIO()):
                write_record(draft, {"settings": dict(self.settings), "rows": self.rows})
            draft.replace(self.path)
        except OSError as error:
            raise ConfigError(f"out={self.path.parent}: cannot be written ({error}); give another folder") from error
        finally:
            draft.unlink(missing_ok=True)
