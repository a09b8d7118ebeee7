"""Checkpoint files: the full model in one file, and beside it a folder with the state of each worker.

::

    epoch=3.ckpt                                           the model and a few numbers: all that plain Lightning needs
    epoch=3.ckpt.workers/round=7-step=3-0-of-2.5f00aa21.pt   written by worker 0, with its checksum
                         round=7-step=3-1-of-2.9c4711d0.pt   written by worker 1

The workers' files are written first, under names that no other checkpoint has; then the model's file, which names them,
replaces the one before. A process that is killed in between leaves the previous checkpoint whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from resist_lightning.checkpoint.files import read_sealed, write_sealed
from resist_lightning.comm.collective import Collective
from resist_lightning.errors import CheckpointError, CheckpointNotWritten, PartialModelError, process_name
from resist_lightning.strategies.saving.members import detached

CHECKPOINT_KEY = "resist_lightning"
"""Key of a checkpoint's state beside its ``state_dict``; plain Lightning ignores it."""

_NOTHING, _DISK, _OTHER = range(3)  # kinds of failures


def local_path(path: _PATH) -> Path | None:
    """The local path of ``path``, which may be a ``file://`` URL; None on any other file system."""
    system = get_filesystem(path)
    if not isinstance(system, LocalFileSystem):
        return None
    return Path(system._strip_protocol(str(path)))


def exists(path: _PATH) -> bool:
    """Whether there is such a file, on any file system."""
    return bool(get_filesystem(path).exists(str(path)))


def agree_on_path(path: _PATH, collective: Collective) -> str:
    """Worker 0's path of a checkpoint, which the workers may name differently.

    A metric that is not reduced over the workers, a clock or a rank in the name make names differ.

    Collective: every worker must call this, in the same order.
    """
    local = local_path(path)
    mine = str(path if local is None else local)
    theirs = [text.decode() for text in collective.gather_bytes(mine.encode())]  # of all processes
    different = sorted(set(theirs))
    if len(different) > 1:
        rank_zero_warn(
            f"the workers name this checkpoint differently ({', '.join(different)}): all files go to worker 0's, "
            f"{theirs[0]}. Use the same name on all workers, e.g. with a metric that is logged with sync_dist=True."
        )
    return theirs[0]


def save_together(
    checkpoint: dict[str, Any],
    own: dict[str, Any] | None,
    path: _PATH,
    write: Callable[[], None],
    collective: Collective,
) -> None:
    """Write a checkpoint. Collective: every worker must call this, in the same order.

    Args:
        checkpoint: content that ``write`` will write; gets the names of the workers' files.
        own: state of this worker, or None on all workers to write the model only.
        path: of the model's file, the same on all workers.
        write: writes the model's file; called on worker 0.
        collective: the workers.

    Raises:
        CheckpointNotWritten: on all workers, if one could not write its file; the checkpoint before it stays as it was.
        Exception: of any other kind on the worker where it happened; on the others a RuntimeError with its text.
    """
    local = local_path(path)
    new = _New()
    if own is not None and local is None:
        rank_zero_warn(
            f"{path} is not a local path: the checkpoint has only the full model, not each worker's own state."
        )
    elif own is not None and local is not None:
        # First, so that the model's file never names files that are not there.
        checkpoint[CHECKPOINT_KEY]["files"] = _write_own(checkpoint, own, folder_of(local), new, collective)
    failure: Exception | None = None
    if collective.rank == 0:
        try:
            write()
        except PartialModelError as error:
            failure = PartialModelError(f"{_pickled_network(checkpoint)} {error}")
        except Exception as error:  # noqa: BLE001 - the others wait
            failure = error
    _share(0, failure, str(path), new, collective)
    if local is not None and collective.rank > 0 and not local.exists():
        # This worker has a disk of its own; elsewhere worker 0 has removed files that no checkpoint names any more.
        remove_files(local, files_named_in(checkpoint), collective.worker)


def _write_own(
    checkpoint: dict[str, Any], own: dict[str, Any], folder: Path, new: _New, collective: Collective
) -> list[str]:
    """Write this worker's file; returns the names of all workers' files. Collective."""
    state = checkpoint[CHECKPOINT_KEY]
    stems = [
        f"round={state['round']}-step={state['step']}-{worker}-of-{collective.workers}"
        for worker in range(collective.workers)
    ]
    checksum = 0
    failure: Exception | None = None
    already_there = {file.name for file in folder.glob("*.pt")}
    new.folder = folder
    try:
        if collective.member == 0:  # which has the state of all members of its worker
            file = write_sealed(own, folder, stems[collective.worker])
            checksum = int(_checksum(file), 16)
            # The name has the checksum in it, so an existing file is the same, and belongs to the checkpoint before.
            if file.name not in already_there:
                new.file = file
    except Exception as error:  # noqa: BLE001 - the others wait
        failure = error
    shared = _share(checksum, failure, str(folder), new, collective)
    checksums = [of_members[0] for of_members in collective.by_worker(shared)]
    return [f"{stem}.{checksum:08x}.pt" for stem, checksum in zip(stems, checksums, strict=True)]


def _pickled_network(checkpoint: Mapping[str, Any]) -> str:
    """A sentence that names the part of a checkpoint with the network in it, of which a worker holds only a part."""
    values = checkpoint.get("hyper_parameters", {}).items()
    names = [name for name, value in values if isinstance(value, nn.Module)]
    if not names:
        return "Something in the checkpoint beside its state_dict (the state of a callback?) contains the network."
    return (
        f"The hyperparameters {', '.join(names)} are modules, and would be pickled with the network. Leave them out: "
        f"self.save_hyperparameters(ignore={names}); the weights are in the state_dict."
    )


def remove(path: _PATH, rank: int, members: int) -> None:
    """Remove the workers' files of a checkpoint, whose model file rank 0 removes."""
    local = local_path(path)
    if local is not None and rank == 0:
        remove_files(local)
    elif local is not None and not local.exists():  # on a disk of its own; else rank 0 removes all
        remove_files(local, worker=rank // members)


def remove_files(path: Path, keep: Collection[str] = (), worker: int | None = None, before: int | None = None) -> None:
    """Remove workers' files beside the checkpoint ``path``.

    Args:
        path: of the model's file.
        keep: names of files that stay.
        worker: whose files to remove; None for all workers'.
        before: remove only files written earlier, in nanoseconds by the files' own clock; None for all.
    """
    folder = folder_of(path)
    names: list[str] = []
    with suppress(FileNotFoundError, NotADirectoryError):  # not there, or another worker has just removed it
        names = os.listdir(folder)
    for name in names:
        ours = name.endswith((".pt", ".part")) and (worker is None or f"-{worker}-of-" in name)
        if not ours or name in keep:
            continue
        with suppress(FileNotFoundError):  # another worker has just removed it
            if before is None or (folder / name).stat().st_mtime_ns < before:
                (folder / name).unlink()
    with suppress(OSError):  # something else is still there
        folder.rmdir()


def files_named_in(checkpoint: Mapping[str, Any]) -> list[str]:
    """Names of the workers' files of a checkpoint, without any folder: the checkpoint may have been moved."""
    state = checkpoint.get(CHECKPOINT_KEY, {})
    return [Path(name).name for name in state.get("files", [])]


def read_own(state: dict[str, Any], path: _PATH, worker: int) -> dict[str, Any] | None:
    """The state of a worker in a checkpoint, or None if its file is gone.

    Tensors of the model and of optimizers are read when they are copied to where they belong: in memory they would need
    as much as the worker itself.

    Args:
        state: the checkpoint's part under :data:`CHECKPOINT_KEY`.
        path: from which it was loaded, which may be a link.
        worker: its number.

    Raises:
        CheckpointError: if the file is damaged.
    """
    files = files_named_in({CHECKPOINT_KEY: state})
    local = local_path(path)
    if worker >= len(files) or local is None:
        return None
    # `last.ckpt` may be a link, and the files stand beside the checkpoint that it points to.
    folders = [folder_of(local), folder_of(Path(os.path.realpath(local)))]
    found = [folder / files[worker] for folder in folders if (folder / files[worker]).exists()]
    if not found:
        return None
    try:
        own: dict[str, Any] = read_sealed(found[0], mapped=True)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} Remove the folder {found[0].parent} to resume from the full model alone, in which the workers' "
            "steps since the last sync are averaged."
        ) from error
    return detached(own)


def folder_of(path: Path) -> Path:
    """The folder of the workers' files that belong to the checkpoint ``path``."""
    return Path(f"{path}.workers")


@dataclass
class _New:
    """The folder and file that a save has created so far, to be removed if it fails."""

    folder: Path | None = None
    file: Path | None = None

    def remove(self) -> None:
        with suppress(OSError):
            if self.file is not None:
                self.file.unlink(missing_ok=True)
        with suppress(OSError):  # other files are there
            if self.folder is not None:
                self.folder.rmdir()


def _share(number: int, failure: Exception | None, path: str, new: _New, collective: Collective) -> list[int]:
    """Each process's number, by rank; raises on all workers if one has a failure.

    Collective: every worker must call this, in the same order.

    Raises:
        CheckpointNotWritten: on all workers, if a file could not be written; new files are removed.
        Exception: as :func:`save_together`.
    """
    kind = _NOTHING
    if failure is not None:
        kind = _DISK if isinstance(failure, OSError) else _OTHER
    rows = collective.gather_numbers([kind, number])
    kinds = [int(row[0]) for row in rows]
    if not any(kinds):
        return [int(row[1]) for row in rows]
    texts = [text.decode() for text in collective.gather_bytes(_reason(failure).encode())]
    new.remove()
    failed = [rank for rank, kind in enumerate(kinds) if kind]
    reasons = "; ".join(f"{process_name(rank, collective.members)}: {texts[rank]}" for rank in failed)
    if _OTHER not in kinds:
        raise CheckpointNotWritten(
            f"{path} could not be written ({reasons}). A file that was there before is unchanged. Free disk space, or "
            "choose another folder; with on_save_error='warn' the training continues without it."
        ) from failure
    if failure is not None:
        raise failure  # with its own traceback, where it happened
    raise RuntimeError(f"{path} could not be written ({reasons}).")


def _reason(failure: Exception | None) -> str:
    if isinstance(failure, OSError):
        return failure.strerror or f"{type(failure).__name__}: {failure}"
    return f"{type(failure).__name__}: {failure}"[:1000]


def _checksum(path: Path) -> str:
    """The checksum in the name of a sealed file."""
    return path.name.split(".")[-2]
