"""Reads and writes the model's file of a checkpoint, by this package or by a plugin of the Trainer."""

from __future__ import annotations

import inspect
import io
import os
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.fabric.utilities import cloud_io
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from resist_lightning.checkpoint.files import check_seal, explain, to_sealed_bytes, write_file
from resist_lightning.checkpoint.snapshots import SnapshotFolder
from resist_lightning.engine.resume import STATE_VERSION
from resist_lightning.errors import CheckpointError
from resist_lightning.state.host_copies import copied
from resist_lightning.strategies.saving.checkpoint_files import (
    CHECKPOINT_KEY,
    exists,
    files_named_in,
    folder_of,
    local_path,
    remove_files,
)

_WEIGHTS_ONLY = inspect.signature(cloud_io._load).parameters["weights_only"].default  # Lightning's; 2.5 has another one


class AtomicIO(TorchCheckpointIO):
    """Lightning's plugin with checksums and atomic replacement of local files.

    Lightning's own may copy a file from another disk, which leaves half a file if it is interrupted.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        local = local_path(path)
        if storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)  # raises: there are no such options
        elif local is not None:
            try:
                write_file(checkpoint, local)
            except OSError:
                if not local.exists():  # nothing names the workers' files now, and in a thread nobody else knows
                    _remove_named(local, checkpoint)
                raise
            # Not before: until then the workers' files of the checkpoint before are in use. AsyncCheckpointIO calls
            # this long after the strategy has saved.
            _remove_superseded(local, checkpoint)
        else:
            system = get_filesystem(path)
            system.makedirs(os.path.dirname(path), exist_ok=True)
            with system.transaction, system.open(str(path), "wb") as file:
                file.write(to_sealed_bytes(checkpoint))

    @override
    def load_checkpoint(self, path: _PATH, *args: Any, **options: Any) -> dict[str, Any]:
        local = local_path(path)
        if local is not None and zipfile.is_zipfile(local):
            return _load_mapped(local, *args, **options)
        if local is not None or str(path).startswith("http"):
            return super().load_checkpoint(path, *args, **options)
        system = get_filesystem(path)
        if not exists(path):
            raise FileNotFoundError(f"Checkpoint file not found: {path}")
        content = io.BytesIO(system.cat_file(str(path)))  # download once, for checksum and content
        check_seal(content, path, sealed=True)
        found: dict[str, Any] = torch.load(content, *(args or ("cpu",)), **options)
        return found


def _load_mapped(path: Path, map_location: Any = "cpu", weights_only: bool | None = _WEIGHTS_ONLY) -> dict[str, Any]:
    """Load a checkpoint whose weights are read when they are copied to where they belong.

    A worker needs a part of them; in memory all would need as much as the full model.
    """
    found: Any = torch.load(path, map_location, weights_only=weights_only, mmap=True)
    if not isinstance(found, dict):
        return found  # type: ignore[no-any-return] # the caller looks
    mapped = {key: found[key] for key in ("state_dict", CHECKPOINT_KEY) if key in found}
    # All else is kept longer, so it is copied: somebody may overwrite the file while the run goes on.
    return {**copied({key: value for key, value in found.items() if key not in mapped}), **mapped}


def or_atomic(plugin: CheckpointIO | None) -> CheckpointIO:
    """The plugin of a Trainer, or :class:`AtomicIO` where it has none, or one that wraps none yet."""
    if plugin is None:
        return AtomicIO()
    if isinstance(plugin, _WrappingCheckpointIO):
        plugin.checkpoint_io = AtomicIO()  # has no effect where it wraps another one
    return plugin


def base_of(plugin: CheckpointIO) -> CheckpointIO:
    """The innermost plugin: plugins such as ``AsyncCheckpointIO`` wrap another one."""
    while isinstance(plugin, _WrappingCheckpointIO) and plugin.checkpoint_io is not None:
        plugin = plugin.checkpoint_io
    return plugin


def write_model(
    save: Callable[[], None], checkpoint: Mapping[str, Any], path: _PATH, plugin: CheckpointIO, forgiving: bool
) -> None:
    """Write the model's file, in worker 0, and remove workers' files that no checkpoint names any more."""
    if forgiving:
        forgive_thread(plugin)
    save()
    local = local_path(path)
    if local is not None and not isinstance(base_of(plugin), AtomicIO):  # which does so itself
        _remove_superseded(local, checkpoint)


def _remove_superseded(path: Path, checkpoint: Mapping[str, Any]) -> None:
    """Remove the workers' files beside ``path`` that no checkpoint needs, now that this one is written there.

    A thread may write it while the workers save the next one to the same path: newer files stay.
    """
    folder, keep = folder_of(path), files_named_in(checkpoint)
    written = [(folder / name).stat().st_mtime_ns for name in keep if (folder / name).exists()]
    remove_files(path, keep, before=min(written, default=None))


def _remove_named(path: Path, checkpoint: Mapping[str, Any]) -> None:
    """Remove the workers' files of a checkpoint that could not be written to ``path``."""
    folder = folder_of(path)
    for name in files_named_in(checkpoint):
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # there are others, or none was written
        folder.rmdir()


def forgive_thread(plugin: CheckpointIO, wait: bool = False) -> None:
    """Turn the stored OSError of an ``AsyncCheckpointIO``'s thread, raised at each later save, into a warning."""
    if wait:
        with suppress(OSError):  # the one that it has stored
            plugin.teardown()
    error: BaseException | None = getattr(plugin, "_error", None)
    if isinstance(error, OSError):
        vars(plugin)["_error"] = None
        rank_zero_warn(f"A checkpoint could not be written ({error}). The training continues.")


def snapshots_at(path: _PATH, plugin: CheckpointIO) -> Path | None:
    """The folder of snapshots at ``path``; None for a checkpoint, which may be a folder with a user's plugin."""
    local = local_path(path)
    if local is None or not local.is_dir():
        return None
    ours = isinstance(base_of(plugin), TorchCheckpointIO) or SnapshotFolder(local).newest_first()
    return local if ours else None


def load_checkpoint(load: Callable[[], Any], path: _PATH, by: CheckpointIO) -> dict[str, Any]:
    """Load the model's file.

    Args:
        load: reads it.
        path: of the file.
        by: the plugin that ``load`` uses.

    Raises:
        FileNotFoundError: if there is none.
        CheckpointError: if it is no checkpoint of Lightning, is damaged, or was written by a newer version.
    """
    local = local_path(path)
    try:
        if local is not None and local.is_file():
            with local.open("rb") as file:
                check_seal(file, path, sealed=isinstance(base_of(by), AtomicIO))
        checkpoint = load()
    except (FileNotFoundError, CheckpointError):
        raise
    except Exception as error:
        if local is None or not isinstance(base_of(by), TorchCheckpointIO):
            raise  # a format of its own, of which this package can say nothing
        raise CheckpointError(explain(local, error)) from error
    _check_content(checkpoint, path)
    found: dict[str, Any] = checkpoint
    return found


def _check_content(checkpoint: Any, path: _PATH) -> None:
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        what = "a bare state_dict" if _is_state_dict(checkpoint) else f"a {type(checkpoint).__name__}"
        raise CheckpointError(
            f"{path} holds {what}, not a Lightning checkpoint. Load weights by "
            "`module.load_state_dict(torch.load(path))` before `fit`; `ckpt_path` needs a file that the Trainer wrote."
        )
    version = checkpoint.get(CHECKPOINT_KEY, {}).get("version", 0)
    if version > STATE_VERSION:
        raise CheckpointError(
            f"{path} was written by a newer resist-lightning (format {version}; this one reads up to {STATE_VERSION}). "
            f"Update the package, or remove the key {CHECKPOINT_KEY!r} to use the weights alone."
        )


def _is_state_dict(found: object) -> bool:
    return isinstance(found, dict) and bool(found) and all(hasattr(value, "shape") for value in found.values())
