"""Reads the files that a broken training left, and compares a training resumed from them with the unbroken one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.faults.training import Settings
from experiments.faults.workers import run_training
from resist_lightning.checkpoint.files import read_sealed
from resist_lightning.strategies.saving.checkpoint_files import CHECKPOINT_KEY


@dataclass(frozen=True)
class Unbroken:
    """The reference training, without a fault."""

    checkpoints: Mapping[str, Any]  # its checkpoints, by name
    final: Mapping[str, Tensor]  # the weights of every worker at the end


@dataclass(frozen=True)
class Left:
    """The checkpoints and files that a broken training left."""

    last: str | None  # name of the last checkpoint that can be read; None if there is none
    half_written: list[str]  # names of unreadable ones
    temporary: int  # files that belong to no checkpoint, in the folders of checkpoints and of temporary files
    # whether all checkpoints that the unbroken training has, too, equal its own. Those saved because of the fault are
    # resumed from
    equal: bool
    saved_steps: int  # local steps of the last one


def train_unbroken(settings: Settings, folder: Path) -> Unbroken:
    """Train as a reference."""
    ended = run_training(settings, folder)
    if ended.ends != ["exit code 0"] * settings.workers:
        raise RuntimeError(f"a training without a fault ended with {ended.ends}: {ended.errors}\n{ended.output}")
    files = {path.stem: read(path)[0] for path in (folder / "checkpoints").glob("*.ckpt")}
    finals = finals_of(folder, settings.workers)
    if not files or not all(same(finals[0], final) for final in finals):
        # A comparison with it would prove nothing.
        raise RuntimeError("a training without a fault saved nothing, or left different weights on its workers.")
    return Unbroken(files, finals[0])


def look(folder: Path, unbroken: Unbroken) -> Left:
    """Read every file that a training has left."""
    readable: dict[int, str] = {}  # by local steps
    half_written, equal, belonging = [], True, set()
    found = {path for path in (folder / "checkpoints").rglob("*") if path.is_file()}
    for path in sorted(path for path in found if path.suffix == ".ckpt"):
        belonging.add(path)
        try:
            content, beside = read(path)
        except Exception:  # noqa: BLE001 - anything may be wrong with half a file
            half_written.append(path.name)
            continue
        belonging.update(beside)
        readable[content["global_step"]] = path.stem
        if path.stem in unbroken.checkpoints:
            equal = equal and same(content, unbroken.checkpoints[path.stem], PATHS)
    steps = max(readable, default=0)
    in_tmp = [path for path in (folder / "tmp").rglob("*") if path.is_file()]
    return Left(readable.get(steps), half_written, len(found - belonging) + len(in_tmp), equal, steps)


def read(path: Path) -> tuple[dict[str, Any], list[Path]]:
    """A checkpoint with the states in its workers' files, and the paths of these."""
    # On the CPU: this process forks the workers of the next training, which it could not after using a GPU.
    content = torch.load(path, map_location="cpu", weights_only=True)
    beside = [Path(f"{path}.workers") / name for name in content.get(CHECKPOINT_KEY, {}).get("files", [])]
    return {**content, "own": [read_sealed(file) for file in beside]}, beside


def check_resuming(settings: Settings, folder: Path, left: Left, unbroken: Unbroken) -> str | None:
    """Resume a broken training from its last checkpoint, in a new folder; returns what went wrong, or None."""
    assert left.last is not None
    resume = str(folder / "checkpoints" / f"{left.last}.ckpt")
    again = folder.with_name(folder.name + "-resumed")
    ended = run_training(replace(settings, fault=None, resume=resume), again)
    if ended.ends != ["exit code 0"] * settings.workers:
        errors = [f"{error['type']}: {error['text']}" for error in ended.errors if error]
        return f"cannot resume: from {left.last}: {errors[0] if errors else ended.ends}"
    finals = finals_of(again, settings.workers)
    if not all(same(unbroken.final, final) for final in finals):
        return f"wrong continuation: from {left.last} to other weights"
    return None


def finals_of(folder: Path, workers: int) -> list[Any]:
    """The weights that every worker ended with; None for one that did not."""
    paths = [folder / f"final-{worker}.pt" for worker in range(workers)]
    return [torch.load(path, weights_only=True) if path.exists() else None for path in paths]


# Keys under which a checkpoint names the folder it is in, and the files beside it.
PATHS = re.compile(r"ModelCheckpoint|callbacks|files$")


def same(one: Any, other: Any, but: re.Pattern[str] | None = None) -> bool:
    """Whether two contents are equal, tensors bit for bit; keys that match ``but`` are ignored."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        wanted, there = ({key for key in mapping if but is None or not but.match(str(key))} for mapping in (one, other))
        return wanted == there and all(same(one[key], other[key], but) for key in wanted)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(same(*pair, but) for pair in zip(one, other, strict=True))
    return type(one) is type(other) and bool(one == other)


def lost_steps(struck_at: int, left: Left) -> int:
    """Local steps that every worker must repeat."""
    return max(struck_at - left.saved_steps, 0)
