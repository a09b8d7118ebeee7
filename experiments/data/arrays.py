"""Examples as one array, and deterministic subsets of it."""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset


class Images(NamedTuple):
    """Pixels, uint8 (images, channels, height, width), and labels, int64 (images,)."""

    pixels: Tensor
    labels: Tensor

    def take(self, indices: Tensor) -> Images:
        """These images, in this order."""
        return Images(self.pixels[indices], self.labels[indices])


class Features(NamedTuple):
    """Rows of a table, float32 (rows of the table, features), and their labels, int64 (examples,).

    A subset is a list of row numbers, int64 (examples,): the table may be mapped from a file, and is never copied.
    """

    table: Tensor
    rows: Tensor
    labels: Tensor

    def take(self, indices: Tensor) -> Features:
        """These examples, in this order."""
        return Features(self.table, self.rows[indices], self.labels[indices])

    @property
    def values(self) -> Tensor:
        """A copy of the rows, float32 (examples, features)."""
        return self.table[self.rows]


Examples = TypeVar("Examples", Images, Features)


class ArrayDataset(Dataset[Examples], Generic[Examples]):
    """A data set whose loader fetches a batch with one indexing operation instead of one per example."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples.labels)

    def __getitem__(self, index: int) -> Examples:
        return self.examples.take(torch.as_tensor(index))

    def __getitems__(self, indices: list[int]) -> Examples:
        """A whole batch: the loader prefers this to ``__getitem__``."""
        return self.examples.take(torch.as_tensor(indices))


def holdout(count: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split ``range(count)`` at random into the larger part and a hold-out of ``fraction``, both in rising
    order.

    A pure function of its arguments: no global generator is read or advanced. Both parts have at least one
    element.

    Raises:
        ValueError: fewer than two elements.
    """
    if count < 2:
        raise ValueError(f"{count} example(s) cannot be split in two; at least 2 are needed")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held = min(max(round(count * fraction), 1), count - 1)  # neither part may be empty
    return order[held:].sort().values, order[:held].sort().values


def first_per_class(labels: Tensor, limit: int | None) -> Tensor:
    """Indices of the first ``limit`` examples of every class, in rising order; all where it is None."""
    if limit is None:
        return torch.arange(len(labels))
    chosen = [torch.nonzero(labels == label).flatten()[:limit] for label in labels.unique()]
    return torch.cat(chosen).sort().values
