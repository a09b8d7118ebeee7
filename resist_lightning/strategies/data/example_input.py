"""An example input of the network, made before training starts to find shapes and measure times."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils._pytree import tree_unflatten
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from resist_lightning.methods.auxnet.step.agreement import named_tensors, parts_of
from resist_lightning.state.random_state import random_numbers_apart
from resist_lightning.strategies.data.seeded_loader import SeededIterable

SAMPLES = 32
"""Samples in an example, or fewer where a batch has fewer."""

_OTHERWISE = "Set example_input_array of the LightningModule to a tensor like the network's input."


def example_input(trainer: pl.Trainer, module: pl.LightningModule, which: int | str | None) -> Tensor:
    """A small batch of the network's input, on the training device.

    It is made of the first samples of the training data, which go through the collate function and the batch-transfer
    hooks as in training; where those cannot be read without consuming them, or no input is found in them, the module's
    ``example_input_array``. No iterator of a loader is made and no random generator advances.

    Args:
        trainer: with its training loaders made.
        module: the user's.
        which: the part of a batch that is the network's input, see :func:`select_input`.

    Returns:
        Of shape (batch, ...); integers, as of token ids, have two dimensions at least.

    Raises:
        ValueError: if a batch has no such part, or the data cannot be read without consuming them.
    """
    with random_numbers_apart():
        example: object = module.example_input_array
        loader = trainer.fit_loop._combined_loader
        assert loader is not None, "the training loaders are not made yet"
        try:
            # As an iterator of the combined loader would give it, without one.
            batch = tree_unflatten([_first_batch(each) for each in loader.flattened], loader._spec)
            batch = trainer.precision_plugin.convert_input(batch)
            batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
            return select_input(trainer.strategy.batch_to_device(batch, dataloader_idx=0), which)
        except ValueError:
            if not isinstance(example, Tensor):
                raise
            return given_example(trainer, example)


def given_example(trainer: pl.Trainer, example: Tensor) -> Tensor:
    """An ``example_input_array`` fit for measuring: often the given one is a single sample, of zeros."""
    found = _checked(example, "example_input_array is")
    if len(found) == 1:
        found = found.expand(2, *found.shape[1:])  # batch norm in training needs two
    if found.is_floating_point() and bool((found == found.flatten()[0]).all()):
        found = torch.randn_like(found)  # of constants, features have no variance
    converted: Tensor = trainer.precision_plugin.convert_input(found)
    return converted.to(trainer.strategy.root_device)


def select_input(batch: Any, which: int | str | None) -> Tensor:
    """The network's input in a batch.

    Args:
        batch: tensors in tuples, lists, dicts and dataclasses; of combined loaders, that of their batches.
        which: index, key or name of a part. The first tensor in it is taken, depth first; if None, the first in the
            batch.

    Raises:
        ValueError: if it is not there, or neither a floating tensor with a batch dimension nor token ids; the message
            describes the batch.
    """
    has = f"batch is {_description(batch)}"
    part: Any = batch
    name = "the batch"
    if which is not None:
        name = f"input={which!r}"
        parts: Any = parts_of(batch)
        if parts is None:
            raise ValueError(f"{has}, of which {name} can select nothing. Leave input out. {_OTHERWISE}")
        try:
            part = parts[which]
        except (LookupError, TypeError):
            raise ValueError(f"{has}; {name} is not one of them.") from None
    tensor = next(iter(named_tensors(part).values()), None)
    if tensor is None:
        raise ValueError(
            f"{has}; there is no tensor in {name} (of tuples, lists, dicts and dataclasses). Name with "
            f"input= the part that the network takes. {_OTHERWISE}"
        )
    return _checked(tensor, f"{has}; the first tensor in {name} is")


def _first_batch(loader: object) -> Any:
    """The first batch of a loader if it did not shuffle, with fewer samples."""
    if not isinstance(loader, DataLoader):
        return _first_items(loader, 1, "loader")[0]
    if isinstance(loader.dataset, IterableDataset):
        items = _first_items(loader.dataset, _batch_size(loader), "data set")
        return loader.collate_fn(items if loader.batch_sampler is not None else items[0])
    try:
        return loader.collate_fn(_first_samples(loader))
    except LookupError as error:
        raise ValueError(
            f"the training data have no samples 0, 1, ... ({type(error).__name__}: {error}), which would show the "
            f"network's input. {_OTHERWISE}"
        ) from error


def _first_samples(loader: DataLoader[Any]) -> Any:
    """The first samples of a map-style data set; without automatic batches, those of one request of the sampler."""
    dataset: Any = loader.dataset
    indices = list(range(min(_batch_size(loader), len(dataset))))
    if not indices:
        raise ValueError(f"the training data set is empty. {_OTHERWISE}")
    if loader.batch_sampler is None:
        return dataset[indices if isinstance(loader.sampler, BatchSampler) else 0]
    if several := getattr(dataset, "__getitems__", None):
        return several(indices)
    return [dataset[index] for index in indices]


def _first_items(source: object, number: int, kind: str) -> list[Any]:
    """The first items of an iterable; raises for an iterator, which would lose them."""
    assert isinstance(source, Iterable)
    original: Any = source.unseeded if isinstance(source, SeededIterable) else source
    if iter(original) is original:  # an iterator, or a file: it cannot begin again
        raise ValueError(
            f"the training {kind}, {type(original).__name__}, can be iterated only once: reading the network's input "
            f"from it would take items from the training. {_OTHERWISE}"
        )
    items = list(islice(source, number))
    if not items:
        raise ValueError(f"the training {kind}, {type(original).__name__}, is empty. {_OTHERWISE}")
    return items


def _batch_size(loader: DataLoader[Any]) -> int:
    size = loader.batch_size
    if not size:  # the user's own sampler makes the batches
        size = getattr(loader.batch_sampler or loader.sampler, "batch_size", None)
    return min(size, SAMPLES) if isinstance(size, int) else SAMPLES


def _checked(tensor: Tensor, found: str) -> Tensor:
    # Integers of one dimension are the labels of a batch; of more, token ids.
    dimensions = 1 if tensor.is_floating_point() else 2
    if tensor.dim() < dimensions or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(
            f"{found} {tensor.dtype} of shape {tuple(tensor.shape)}; the network's input must be a floating tensor "
            "with a batch dimension, or token ids (batch, tokens). Name with input= the part of a batch that the "
            "network takes."
        )
    return tensor


def _description(batch: object) -> str:
    if isinstance(batch, Mapping):
        return f"a {type(batch).__name__} with keys {', '.join(map(repr, batch))}"
    if isinstance(batch, list | tuple):
        return f"a {type(batch).__name__} of {len(batch)} elements"
    if isinstance(parts := parts_of(batch), Mapping):
        return f"a {type(batch).__name__} with fields {', '.join(map(repr, parts))}"
    return f"a {type(batch).__name__}"
