"""A folder of checkpoints that a training writes, as an evaluator sees it: each file once, held while it is read.

::

    FOLDER/step=300.ckpt, step=600.ckpt       by the training, which may replace and remove them at any time
           training_ended.json                by the callback EndMarker, when `fit` is complete
           evaluations/evaluations.jsonl      by the evaluator, a line for each model
                       best.ckpt
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resist_lightning.checkpoint.atomic import write_text
from resist_lightning.checkpoint.snapshots import SnapshotFolder

END_MARKER = "training_ended.json"
SUFFIX = ".ckpt"
_ROWS, _BEST, _HELD = "evaluations.jsonl", "best.ckpt", ".evaluating.ckpt"


@dataclass(frozen=True)
class Version:
    """A version of a file; a file that replaces it is another version.

    Args:
        path: of the file.
        inode: its number in the file system.
        size: in bytes.
        modified: nanoseconds.
    """

    path: Path
    inode: int
    size: int
    modified: int


class FollowedFolder:
    """A folder that a training writes checkpoints to, and the folder of the evaluator's files.

    Args:
        path: of the training's checkpoints.
        out: for the evaluator's files.

    Raises:
        ValueError: if ``path`` is no folder, or has snapshots, which are no full models.
    """

    def __init__(self, path: Path, out: Path) -> None:
        if not path.is_dir():
            raise ValueError(
                f"folder={path} is not a folder. Give the dirpath of the training's ModelCheckpoint; if the evaluator "
                f"is to start before the training, make it first: mkdir -p {path}"
            )
        if SnapshotFolder(path).newest_first():
            raise ValueError(
                f"folder={path} has snapshots, in which no file is the full model. Give the dirpath of the training's "
                "ModelCheckpoint."
            )
        self.path = path
        self.best = out / _BEST
        self._rows, self._held = out / _ROWS, out / _HELD
        self._done: set[Version] = set()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, no other evaluator writes to the same folder, which is made.

        Where the file system has no locks, as on some networks, nothing is checked.

        Raises:
            ValueError: if another one does so now.
        """
        out = self._rows.parent
        out.mkdir(parents=True, exist_ok=True)
        with ExitStack() as until_the_end:
            with suppress(ImportError):  # on Windows
                _lock(out, until_the_end)
            yield

    @property
    def ended(self) -> bool:
        """Whether the training has marked its end."""
        return (self.path / END_MARKER).exists()

    def unseen(self) -> list[Version]:
        """The checkpoints for which :meth:`done` was not called: the best one, then the others, oldest first.

        The best one has no row if an evaluator failed between :meth:`keep_best` and :meth:`write_rows`.
        """
        found = []
        for path in (*self.path.glob(f"*{SUFFIX}"), self.best):
            with suppress(FileNotFoundError):  # removed since, a link to what was, or there is none
                if path.is_file() and not path.name.startswith("."):
                    found.append(_version(path))
        return sorted(set(found) - self._done, key=lambda file: (file.path != self.best, file.modified, file.path.name))

    def done(self, file: Version) -> None:
        """Leave this version out of :meth:`unseen`."""
        self._done.add(file)

    def hold(self, file: Version) -> Path | None:
        """Give the file a second name, which stays when the training removes or replaces it; None if it is gone."""
        self.release()
        self._held.parent.mkdir(parents=True, exist_ok=True)  # somebody may have removed it meanwhile
        source = os.path.realpath(file.path)
        try:
            os.link(source, self._held)
        except FileNotFoundError:
            return None
        except OSError:  # `out` is on another disk, or one without links
            try:
                shutil.copyfile(source, self._held)
            except FileNotFoundError:
                return None
        return self._held

    def keep_best(self) -> None:
        """Replace the best file by the held one."""
        os.replace(self._held, self.best)
        self.done(_version(self.best))

    def release(self) -> None:
        """Remove the second name."""
        self._held.unlink(missing_ok=True)

    def read_rows(self) -> list[dict[str, Any]]:
        """The rows that :meth:`write_rows` wrote last; empty if there are none."""
        if not self._rows.exists():
            return []
        return [json.loads(line) for line in self._rows.read_text().splitlines()]

    def write_rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Replace all rows, atomically."""
        write_text("".join(json.dumps(row) + "\n" for row in rows), self._rows)


def _lock(out: Path, until: ExitStack) -> None:
    """Lock a folder; the lock ends with this process, too."""
    import fcntl

    folder = os.open(out, os.O_RDONLY)
    until.callback(os.close, folder)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"another evaluator writes its results to {out} now, and the two would mix their files. End it, or set "
            "out=FOLDER to a folder of its own."
        ) from None
    except OSError:
        pass  # no locks here


def _version(path: Path) -> Version:
    status = path.stat()
    return Version(path, status.st_ino, status.st_size, status.st_mtime_ns)


def mark_end(folder: Path, step: int) -> None:
    """Mark the training in this folder as complete, for evaluators."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / END_MARKER).write_text(json.dumps({"global_step": step}) + "\n")


def remove_end(folder: Path) -> None:
    """Remove the mark, as the training goes on."""
    (folder / END_MARKER).unlink(missing_ok=True)
