"""Checkpoints on disk: the full model in one file, and beside it, in a folder, what each worker alone has.

::

    epoch=3.ckpt                                           the model and a few numbers: all that plain Lightning needs
    epoch=3.ckpt.workers/round=7-step=3-0-of-2.5f00aa21.pt   written by worker 0, with its checksum
                         round=7-step=3-1-of-2.9c4711d0.pt   written by worker 1

The workers' files are written first, under names that no other checkpoint has; then the model's file, which names them,
takes the place of the one before. Whoever is killed on the way leaves the checkpoint before it whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from resist_lightning.errors import CheckpointError, CheckpointNotWritten
from resist_lightning.files import explain, read_sealed, write_file, write_sealed
from resist_lightning.resumption import STATE_VERSION
from resist_lightning.verbs import Collective

CHECKPOINT_KEY = "resist_lightning"
"""Where a checkpoint keeps what its ``state_dict`` does not say; plain Lightning ignores it."""

_NO_NUMBER = 5  # EIO, for an error of the file system that has no number


class AtomicIO(TorchCheckpointIO):
    """Lightning's, but a local file is replaced in one go; Lightning's own may copy it from another disk."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        if storage_options is None and _is_local(path):
            write_file(checkpoint, Path(path))
        else:
            super().save_checkpoint(checkpoint, path, storage_options)


def save_together(
    checkpoint: dict[str, Any],
    own: dict[str, Any] | None,
    path: _PATH,
    write: Callable[[], None],
    collective: Collective,
) -> None:
    """Write a checkpoint. Collective: every worker must call this, in the same order.

    Args:
        checkpoint: what ``write`` will write; gets the names of the workers' files.
        own: what this worker alone has, or None on all workers to write the model only.
        path: of the model's file.
        write: writes the model's file; called on worker 0.
        collective: the workers.

    Raises:
        CheckpointNotWritten: on all workers, if one could not write; the checkpoint before it stays as it was.
    """
    folder, mine = _folder(path), None
    if own is not None and not _is_local(path):
        own = None
        rank_zero_warn(
            f"{path} is no local path: the checkpoint carries the full model only, not what each worker has."
        )
    if own is not None:
        stem, number, error = _stem(checkpoint, collective), 0, 0
        there = {file.name for file in folder.glob("*.pt")}
        try:
            mine = write_sealed(own, folder, stem)
            number = int(_seal(mine), 16)
            mine = None if mine.name in there else mine  # of the checkpoint before, which stays if this one fails
        except OSError as failure:
            error = failure.errno or _NO_NUMBER
        rows = collective.gather_numbers([error, number])
        _raise_together([int(row[0]) for row in rows], folder, mine)
        checkpoint[CHECKPOINT_KEY]["files"] = [
            f"{_stem(checkpoint, collective, worker)}.{int(row[1]):08x}.pt" for worker, row in enumerate(rows)
        ]
    error = 0
    if collective.worker == 0:
        try:
            write()
        except OSError as failure:
            error = failure.errno or _NO_NUMBER
    errors = [int(row[0]) for row in collective.gather_numbers([error])]
    _raise_together(errors, Path(path), mine)
    _remove_files(folder, collective.worker, keep=checkpoint.get(CHECKPOINT_KEY, {}).get("files", []))


def remove(path: _PATH, worker: int) -> None:
    """Remove what a worker has written beside a checkpoint."""
    if _is_local(path):
        _remove_files(_folder(path), worker, keep=[])


def read_own(state: dict[str, Any], path: _PATH, worker: int) -> dict[str, Any] | None:
    """What a worker alone had when a checkpoint was written, or None if its file is gone.

    Args:
        state: the checkpoint's part under :data:`CHECKPOINT_KEY`.
        path: from which it was loaded; a link to it will do.
        worker: whose.

    Raises:
        CheckpointError: if the file is damaged.
    """
    files = state.get("files", [])
    if worker >= len(files):
        return None
    for folder in (_folder(path), _folder(os.path.realpath(path))):
        file = folder / files[worker]
        if file.exists():
            try:
                found: dict[str, Any] = read_sealed(file)
            except CheckpointError as error:
                raise CheckpointError(
                    f"{error} Remove the folder {folder} to go on from the full model alone, in which the workers' "
                    "steps since the last sync are averaged."
                ) from error
            return found
    return None


def load_checkpoint(load: Callable[[], Any], path: _PATH) -> dict[str, Any]:
    """Load the model's file.

    Raises:
        FileNotFoundError: if there is none.
        CheckpointError: if it is no checkpoint of Lightning, is damaged, or was written by a newer version.
    """
    try:
        checkpoint = load()
    except FileNotFoundError:
        raise
    except Exception as error:
        if not _is_local(path):
            raise
        raise CheckpointError(explain(Path(path), error)) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        what = "a bare state_dict" if _is_state_dict(checkpoint) else f"a {type(checkpoint).__name__}"
        raise CheckpointError(
            f"{path} holds {what} and no checkpoint of Lightning. Load weights by `module.load_state_dict(torch.load("
            f"path))` before `fit`; `ckpt_path` needs a file that the Trainer has written."
        )
    version = checkpoint.get(CHECKPOINT_KEY, {}).get("version", 0)
    if version > STATE_VERSION:
        raise CheckpointError(
            f"{path} was written by a newer resist-lightning (format {version}; this one reads up to {STATE_VERSION}). "
            f"Update the package, or remove the key {CHECKPOINT_KEY!r} to use the weights alone."
        )
    return checkpoint


def _raise_together(errors: list[int], path: Path, mine: Path | None) -> None:
    failed = [worker for worker, error in enumerate(errors) if error]
    if not failed:
        return
    if mine is not None:
        mine.unlink(missing_ok=True)
        with suppress(OSError):
            mine.parent.rmdir()
    said = "; ".join(f"worker {worker}: {os.strerror(errors[worker])}" for worker in failed)
    raise CheckpointNotWritten(
        f"{path} could not be written ({said}). What stood there before is unchanged. Make room, or choose another "
        "folder; with on_save_error='warn' the training goes on without it."
    )


def _remove_files(folder: Path, worker: int, keep: list[str]) -> None:
    names: list[str] = []
    with suppress(FileNotFoundError):  # not there, or another worker has just removed it
        names = os.listdir(folder)
    for name in names:
        if name.endswith((".pt", ".part")) and name not in keep and (worker == 0 or f"-{worker}-of-" in name):
            (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # another worker's are still there
        folder.rmdir()


def _folder(path: _PATH) -> Path:
    return Path(f"{path}.workers")


def _stem(checkpoint: dict[str, Any], collective: Collective, worker: int | None = None) -> str:
    state = checkpoint[CHECKPOINT_KEY]
    number = collective.worker if worker is None else worker
    return f"round={state['round']}-step={state['step']}-{number}-of-{collective.workers}"


def _seal(path: Path) -> str:
    return path.name.split(".")[-2]


def _is_local(path: _PATH) -> bool:
    return "file" in get_filesystem(path).protocol


def _is_state_dict(found: object) -> bool:
    return isinstance(found, dict) and bool(found) and all(hasattr(value, "shape") for value in found.values())
