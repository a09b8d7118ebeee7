"""Example inputs: from the module, or from the first samples of the training data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler, TensorDataset

from resist_lightning.state.random_state import random_state
from resist_lightning.strategies.data.example_input import example_input, select_input
from resist_lightning.strategies.data.seeded_loader import seed_loader
from tests.helpers.trainers import QUIET


class Module(L.LightningModule):
    """A module with hooks that change batches; ``found`` is the example made when training began."""

    def __init__(self, which: int | str | None = None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.which = which
        self.found: Tensor | None = None
        self.moved = True

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if not isinstance(batch, list):
            return batch
        return (batch[0] + 10, batch[1]) if isinstance(batch[0], Tensor) else batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return (batch[0] * 2, batch[1]) if isinstance(batch, tuple) else batch

    def on_train_start(self) -> None:
        before = random_state()
        self.found = example_input(self.trainer, self, self.which)
        after = random_state()
        self.moved = not (torch.equal(before["torch"], after["torch"]) and before["python"] == after["python"])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.layer(torch.ones(1, 1)).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Rows(Dataset[Any]):
    """Rows of random numbers beside their index."""

    def __init__(self, samples: int = 50) -> None:
        self.samples = samples
        self.read: list[Any] = []

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int) and not 0 <= index < self.samples:
            raise IndexError(index)
        self.read.append(index)
        return torch.full((2,), float(torch.as_tensor(index).sum())), torch.rand(())


class Stream(IterableDataset[Any]):
    """A given number of items; can be read in several passes."""

    def __init__(self, items: int) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Tensor]:
        return (torch.full((3,), float(item)) for item in range(self.items))


class Once(Stream):
    """A data set that is its own iterator."""

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        return torch.zeros(3)


def example(loader: Any, which: int | str | None = None, module: Module | None = None) -> Tensor:
    """The result of :func:`example_input` in a Trainer."""
    module = module or Module()
    module.which = which
    L.Trainer(**QUIET, max_steps=1).fit(module, loader)
    assert module.found is not None
    assert not module.moved
    return module.found


@pytest.mark.parametrize(("batch_size", "samples"), [(3, 3), (32, 32), (40, 32)])
def test_the_first_samples_go_through_the_hooks_as_in_training(batch_size: int, samples: int) -> None:
    found = example(DataLoader(Rows(), batch_size=batch_size, shuffle=True))

    assert torch.equal(found, (torch.arange(samples, dtype=torch.float32).repeat(2, 1).T + 10) * 2)


def test_a_small_data_set_gives_all_it_has() -> None:
    assert example(DataLoader(Rows(5), batch_size=12)).shape == (5, 2)


@pytest.mark.parametrize("dataset", [Rows(), TensorDataset(torch.rand(9, 2), torch.rand(9)), Stream(9)])
def test_a_seeded_loader_gives_the_same_example(dataset: Any) -> None:
    loader = DataLoader(dataset, batch_size=4)

    assert torch.equal(example(seed_loader(loader, 0, lambda: 0)), example(loader))


def test_the_data_set_is_asked_for_its_first_samples_only() -> None:
    class Stopped(Rows):
        def __getitem__(self, index: Any) -> Any:
            assert self.read != [0, 1, 2], "that was the example"
            return super().__getitem__(index)

    rows = Stopped()
    with pytest.raises(AssertionError, match="that was the example"):
        example(DataLoader(rows, batch_size=3))
    assert rows.read == [0, 1, 2]


def test_samplers_of_batches_say_how_many() -> None:
    sampler = BatchSampler(SequentialSampler(range(20)), 2, drop_last=False)

    assert example(DataLoader(Rows(), batch_sampler=sampler)).shape == (2, 2)
    assert example(DataLoader(Rows(), batch_sampler=[[5, 6, 7]])).shape == (32, 2)
    rows = Rows()
    example(DataLoader(rows, batch_size=None, sampler=sampler))
    assert rows.read[0] == [0, 1]


def test_combined_loaders_give_their_batches_together() -> None:
    loaders = {"a": DataLoader(Rows(), batch_size=2), "b": DataLoader(Stream(4), batch_size=3)}

    assert example(CombinedLoader(loaders), "b").shape == (3, 3)
    assert example(CombinedLoader(loaders), "a").shape == (2, 2)
    assert example(list(loaders.values()), 1).shape == (3, 3)


def test_iterables_that_can_begin_again_give_their_first_items() -> None:
    assert torch.equal(example(DataLoader(Stream(9), batch_size=4))[:, 0], torch.arange(4.0))
    assert example(DataLoader(Stream(2), batch_size=4)).shape == (2, 3)
    assert torch.equal(example(DataLoader(Stream(9), batch_size=None)), torch.zeros(3))
    assert example(Stream(9)).shape == (3,)  # as a loader: its items are batches


@pytest.mark.parametrize("seeded", [False, True])
def test_data_that_would_be_lost_are_not_read(seeded: bool) -> None:
    loader: Any = DataLoader(Once(3), batch_size=2)
    with pytest.raises(ValueError, match=r"data set, Once, can be iterated only once: .* Set example_input_array"):
        example(seed_loader(loader, 0, lambda: 0) if seeded else loader)
    with pytest.raises(ValueError, match="training loader, Once, can be iterated only once"):
        example(Once(3))


def test_data_without_a_first_sample_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no samples 0, 1, \.\.\. \(KeyError: 0\).* Set example_input_array"):
        example(DataLoader({"x": torch.zeros(2)}, sampler=["x"]))  # type: ignore[arg-type]


def test_the_data_go_before_the_modules_own_example() -> None:
    module = Module()
    module.example_input_array = torch.ones(5, 7)

    assert torch.equal(example(DataLoader(Rows()), module=module), example(DataLoader(Rows())))


def test_the_modules_own_example_takes_the_place_of_data_that_cannot_be_read_twice() -> None:
    module = Module()
    module.example_input_array = torch.arange(35.0).view(5, 7)

    assert torch.equal(example(DataLoader(Once(3)), module=module), torch.arange(35.0).view(5, 7))


def test_an_own_example_of_one_sample_of_zeros_becomes_a_batch_of_noise() -> None:
    module = Module()
    module.example_input_array = torch.zeros(1, 7)

    found = example(DataLoader(Once(3)), module=module)

    assert found.shape == (2, 7)
    assert found.std() > 0.1


def test_an_own_example_of_token_ids_stays_what_it_is() -> None:
    module = Module()
    module.example_input_array = torch.zeros(1, 7, dtype=torch.int64)

    assert torch.equal(example(DataLoader(Once(3)), module=module), torch.zeros(2, 7, dtype=torch.int64))


def test_the_modules_own_example_must_be_an_input() -> None:
    module = Module()
    module.example_input_array = torch.ones(5, dtype=torch.int64)

    with pytest.raises(ValueError, match=r"example_input_array is torch\.int64 of shape \(5,\); .* must be a floating"):
        example(DataLoader(Once(3)), module=module)


@dataclass
class Sample:
    label: object
    image: object


class Opaque:
    """A batch of a class of the user's."""

    def to(self, *_: Any, **__: Any) -> Opaque:
        return self


def test_the_modules_own_example_stands_for_a_batch_whose_parts_are_not_known() -> None:
    module = Module()
    loader = DataLoader(TensorDataset(torch.rand(4, 3)), batch_size=2, collate_fn=lambda _: Opaque())
    with pytest.raises(ValueError, match=r"batch is a Opaque; there is no tensor .* Set example_input_array"):
        example(loader, module=module)
    module.example_input_array = torch.ones(5, 7)

    assert example(loader, module=module).shape == (5, 7)


X, Y, LABEL, IDS = torch.rand(2, 3), torch.rand(2, 4), torch.tensor([1, 2]), torch.tensor([[1, 2], [3, 4]])


@pytest.mark.parametrize(
    ("batch", "which", "found"),
    [
        (X, None, X),
        ((X, LABEL), None, X),
        ([LABEL, X], 1, X),
        ([LABEL, X], -1, X),
        ({"label": LABEL, "image": X}, "image", X),
        ({0: LABEL, 7: X}, 7, X),
        ({"views": ["name", (X, Y)], "label": LABEL}, None, X),
        ({"a": (X, LABEL), "b": (Y, LABEL)}, "b", Y),
        ([None, {"image": X}], None, X),
        ((IDS, LABEL), None, IDS),
        (Sample(LABEL, (X, Y)), "image", X),
        ({"a": Sample(X, Y)}, None, X),
    ],
)
def test_the_first_tensor_of_a_batch_or_of_a_part_is_the_input(batch: Any, which: Any, found: Tensor) -> None:
    assert select_input(batch, which) is found


@pytest.mark.parametrize(
    ("batch", "which", "told"),
    [
        (
            {"image": X, "label": LABEL},
            "img",
            "batch is a dict with keys 'image', 'label'; input='img' is not one of them",
        ),
        ({"image": X}, 0, "batch is a dict with keys 'image'; input=0 is not one of them"),
        ((X, LABEL), 2, "batch is a tuple of 2 elements; input=2 is not one of them"),
        ([X, LABEL], "image", "batch is a list of 2 elements; input='image' is not one of them"),
        (X, 0, "batch is a Tensor, of which input=0 can select nothing"),
        ("text", None, r"batch is a str; there is no tensor in the batch.*Set example_input_array"),
        (Sample(X, Y), "img", "batch is a Sample with fields 'label', 'image'; input='img' is not one of them"),
        ({"name": ["a"], "x": X}, "name", "keys 'name', 'x'; there is no tensor in input='name'"),
        ((LABEL, X), None, r"2 elements; the first tensor in the batch is torch\.int64 of shape \(2,\); .* floating"),
        ((X, LABEL), 1, r"the first tensor in input=1 is torch\.int64 of shape \(2,\)"),
        ((IDS > 2, LABEL), None, r"is torch\.bool of shape \(2, 2\); .* or token ids"),
        ((torch.tensor(1.0),), None, r"is torch\.float32 of shape \(\); .* with a batch dimension"),
    ],
)
def test_what_cannot_be_the_input_is_named(batch: Any, which: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        select_input(batch, which)
