"""Ends epochs on all workers together, after the batches of the shortest loader."""

from __future__ import annotations

from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn

from resist_lightning.comm.collective import Collective


def end_epochs_together(loader: CombinedLoader, collective: Collective) -> None:
    """Limit the epochs of all workers to the length of the shortest.

    Collective: every worker must call this, in the same order. Epochs of unknown length are left alone: if they end at
    different steps, the header of the next sync stops the run with an error.

    Args:
        loader: this worker's training loaders, with the limits that follow from ``Trainer(limit_train_batches=...)``.
            Its limits are lowered, before an iterator of it is made; those of loaders that are made later are not.
        collective: the workers.
    """
    batches = [int(row[0]) for row in collective.gather_numbers([_batches(loader)])]
    shortest = min(batches)
    if len(set(batches)) == 1 or shortest < 0:
        return  # alike, or unknown
    rank_zero_warn(
        f"the workers' training epochs have {batches} batches; every epoch ends after {shortest} for all of them. "
        "Shard the data evenly to use all of it."
    )
    limits = loader.limits or [float("inf")] * len(loader.flattened)
    loader.limits = [min(limit, shortest) for limit in limits]


def _batches(loader: CombinedLoader) -> int:
    """Number of batches in an epoch; -1 if unknown. Lightning knows it once an iterator is made."""
    limits = loader.limits or [float("inf")] * len(loader.flattened)
    lengths = []
    for each, limit in zip(loader.flattened, limits, strict=True):
        length = sized_len(each)
        lengths.append(limit if length is None else min(length, limit))
    # In the other modes that Lightning trains with, an epoch lasts as long as the longest.
    batches = min(lengths) if loader._mode == "min_size" else max(lengths)
    return -1 if batches == float("inf") else int(batches)
