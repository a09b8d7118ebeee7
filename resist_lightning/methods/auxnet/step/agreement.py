"""Compares the batches of all workers, sample by sample."""

from __future__ import annotations

import json
import zlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from resist_lightning.comm.collective import Collective
from resist_lightning.errors import WorkersDisagree

Summary: TypeAlias = dict[str, dict[str, Any]]
"""For each tensor, by name, its ``shape``, its ``dtype`` and, as ``sums``, a checksum for each sample."""

Value = TypeVar("Value", bound=Hashable)

_LISTED = 8

WAYS_OUT = (
    "Every worker must train on the same batch. Leave the order of the samples to Lightning (shuffle=True in the "
    "DataLoader, use_distributed_sampler=True in the Trainer), or give all workers the same order (no shard of the "
    "data per rank, and no generator that is seeded by the rank). Draw random numbers from the global generators of "
    "torch, NumPy or Python inside the data set or the collate function, where they are the same on all workers; not "
    "from a generator of its own. In training_step and batch-transfer hooks they are the same only if all processes "
    "have one seed (seed_everything)."
)


def check_equal(collective: Collective, named: Mapping[str, Tensor], where: str) -> None:
    """Raise if the workers do not hold the same tensors.

    Two numbers per worker are sent, and checksums of all samples only where those differ. Waits for a GPU.
    Collective: every worker must call this, in the same order.

    Args:
        collective: the workers.
        named: tensors whose first dimension counts samples, or of no dimension; names and shapes may differ.
        where: the time, for the message: ``"step 50"``.

    Raises:
        WorkersDisagree: on all workers, naming the tensors, the samples and the workers.
    """
    mine = {name: _summary(tensor) for name, tensor in named.items()}
    text = json.dumps(mine).encode()
    # In the usual case these two numbers are all that is sent.
    rows = collective.gather_numbers([len(text), zlib.crc32(text)])
    if all(row == rows[0] for row in rows):
        return
    gathered = collective.gather_bytes(text)
    summaries: list[Summary] = [json.loads(text) for text in gathered]
    differences = "; ".join(_differences(summaries))
    raise WorkersDisagree(f"{where}: the workers do not see the same batch: {differences}. {WAYS_OUT}")


def named_tensors(batch: object, name: str = "batch") -> dict[str, Tensor]:
    """The dense tensors in nested containers, by their paths: ``batch[0]``, ``batch['image']``."""
    if isinstance(batch, Tensor):
        # Sparse and nested ones do not consist of samples.
        dense = batch.layout == torch.strided and not batch.is_nested
        return {name: batch} if dense else {}
    parts = parts_of(batch)
    items = parts.items() if isinstance(parts, Mapping) else enumerate(parts or ())
    found: dict[str, Tensor] = {}
    for key, part in items:
        found.update(named_tensors(part, f"{name}[{key!r}]"))
    return found


def parts_of(batch: object) -> Mapping[Any, object] | Sequence[object] | None:
    """The parts of a container by index, key or, of a dataclass, name; None if it is no container that is known."""
    if isinstance(batch, Mapping | list | tuple):
        return batch
    if is_dataclass(batch) and not isinstance(batch, type):
        return {field.name: getattr(batch, field.name, None) for field in fields(batch)}
    return None


def _summary(tensor: Tensor) -> dict[str, Any]:
    # Conjugate and negative views are lazy: their memory does not have their values.
    samples = tensor.detach().cpu().resolve_conj().resolve_neg()
    if not samples.dim():
        samples = samples.reshape(1)
    sums = []
    for sample in samples:
        values = sample.reshape(-1).view(torch.uint8)
        sums.append(zlib.crc32(values.numpy()))
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype), "sums": sums}


def _differences(summaries: list[Summary]) -> list[str]:
    """A text for each tensor that differs between workers."""
    differences = []
    # A dict keeps the order of the first worker, which is that of the batch; a set would not.
    names = dict.fromkeys(name for summary in summaries for name in summary)
    for name in names:
        missing = [worker for worker, summary in enumerate(summaries) if name not in summary]
        if missing:
            differences.append(f"{name} does not exist on {_workers(missing)}")
            continue
        tensors = [summary[name] for summary in summaries]
        kinds = [f"{tensor['dtype']} of shape {tuple(tensor['shape'])}" for tensor in tensors]
        if len(set(kinds)) > 1:
            groups = _groups(kinds)
            each = [f"{kind} on {_workers(workers)}" for kind, workers in groups.items()]
            differences.append(f"{name} is {' and '.join(each)}")
        elif any(tensor["sums"] != tensors[0]["sums"] for tensor in tensors):
            differences.append(f"{name} differs {_samples(tensors)}")
    return differences


def _samples(tensors: list[dict[str, Any]]) -> str:
    """The samples and the workers that differ, in words."""
    sums = [tuple(tensor["sums"]) for tensor in tensors]
    groups = _groups(sums).values()
    between = " and ".join(map(_workers, groups))
    if not tensors[0]["shape"]:
        return f"between {between}"
    differing = []
    for number, checksums in enumerate(zip(*sums, strict=True)):
        if len(set(checksums)) > 1:
            differing.append(str(number))
    listed = ", ".join(differing[:_LISTED])
    if len(differing) > _LISTED:
        listed += ", ..."
    return f"in {len(differing)} of {len(sums[0])} samples ({listed}) between {between}"


def _groups(values: Sequence[Value]) -> dict[Value, list[int]]:
    """The workers by their values."""
    groups: dict[Value, list[int]] = {}
    for worker, value in enumerate(values):
        groups.setdefault(value, []).append(worker)
    return groups


def _workers(workers: list[int]) -> str:
    listed = ", ".join(map(str, workers))
    return f"worker {listed}" if len(workers) == 1 else f"workers {listed}"
