"""Whether all workers see the same batch, sample by sample."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from resist_lightning.comm.collective import Collective
from resist_lightning.errors import WorkersDisagree

Summary: TypeAlias = dict[str, dict[str, Any]]
"""Of each tensor its ``shape``, its ``dtype`` and a checksum for each sample."""

_LISTED = 8

WAYS_OUT = (
    "Every worker must train on the same batch. Leave the order of the samples to Lightning (shuffle=True in the "
    "DataLoader, use_distributed_sampler=True in the Trainer), or give all workers the same order (no part of the "
    "data per rank, and no generator that is seeded by the rank). Draw random numbers from the global generators of "
    "torch, NumPy or Python inside the data set or the collate function, where they are the same on all workers; not "
    "from a generator of its own, and not in training_step or a batch-transfer hook."
)


def check_equal(collective: Collective, named: Mapping[str, Tensor], where: str) -> None:
    """Raise if the workers do not hold the same tensors.

    Two numbers per worker are sent, and checksums of all samples only where those differ. Waits for a GPU.
    Collective: every worker must call this, in the same order.

    Args:
        collective: the workers.
        named: tensors whose first dimension counts samples, or of no dimension; names and shapes may differ.
        where: when this is, for the message: ``"step 50"``.

    Raises:
        WorkersDisagree: on all workers, naming the tensors, the samples and the workers.
    """
    mine = {name: _summary(tensor) for name, tensor in named.items()}
    text = json.dumps(mine).encode()
    rows = collective.gather_numbers([len(text), zlib.crc32(text)])
    if all(row == rows[0] for row in rows):
        return
    summaries: list[Summary] = [json.loads(text) for text in collective.gather_bytes(text)]
    found = "; ".join(_differences(summaries))
    raise WorkersDisagree(f"{where}: the workers do not see the same batch: {found}. {WAYS_OUT}")


def named_tensors(batch: object, name: str = "batch") -> dict[str, Tensor]:
    """The tensors in nested tuples, lists and dicts, by their paths: ``batch[0]``, ``batch['image']``."""
    if isinstance(batch, Tensor):
        return {name: batch}
    parts: Mapping[Any, object] = {}
    if isinstance(batch, Mapping):
        parts = batch
    elif isinstance(batch, list | tuple):
        parts = dict(enumerate(batch))
    return {
        path: tensor for key, part in parts.items() for path, tensor in named_tensors(part, f"{name}[{key!r}]").items()
    }


def _summary(tensor: Tensor) -> dict[str, Any]:
    samples = tensor.detach().cpu().resolve_conj().resolve_neg()
    rows = samples if samples.dim() else samples.reshape(1)
    sums = [zlib.crc32(row.reshape(-1).view(torch.uint8).numpy()) for row in rows]
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype), "sums": sums}


def _differences(summaries: list[Summary]) -> list[str]:
    """One text for each tensor that is not the same everywhere."""
    found = []
    names = dict.fromkeys(name for summary in summaries for name in summary)
    for name in names:
        missing = [worker for worker, summary in enumerate(summaries) if name not in summary]
        if missing:
            found.append(f"{name} does not exist on {_workers(missing)}")
            continue
        tensors = [summary[name] for summary in summaries]
        kinds = [f"{tensor['dtype']} of shape {tuple(tensor['shape'])}" for tensor in tensors]
        if len(set(kinds)) > 1:
            found.append(f"{name} is {_by_worker(kinds)}")
        elif any(tensor["sums"] != tensors[0]["sums"] for tensor in tensors):
            found.append(f"{name} differs {_samples(tensors)}")
    return found


def _samples(tensors: list[dict[str, Any]]) -> str:
    """In which samples, and between which workers."""
    sums = [tensor["sums"] for tensor in tensors]
    groups: dict[tuple[int, ...], list[int]] = {}
    for worker, row in enumerate(sums):
        groups.setdefault(tuple(row), []).append(worker)
    who = " and ".join(_workers(group) for group in groups.values())
    if not tensors[0]["shape"]:
        return f"between {who}"
    places = [place for place, column in enumerate(zip(*sums, strict=True)) if len(set(column)) > 1]
    listed = ", ".join(map(str, places[:_LISTED])) + (", ..." if len(places) > _LISTED else "")
    return f"in {len(places)} of {len(sums[0])} samples ({listed}) between {who}"


def _by_worker(kinds: list[str]) -> str:
    return " and ".join(
        f"{kind} on {_workers([worker for worker, other in enumerate(kinds) if other == kind])}"
        for kind in dict.fromkeys(kinds)
    )


def _workers(workers: list[int]) -> str:
    return ("worker " if len(workers) == 1 else "workers ") + ", ".join(map(str, workers))
