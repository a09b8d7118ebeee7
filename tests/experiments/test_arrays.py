"""Subsets of an array of images: disjoint, complete, the same in every process."""

from __future__ import annotations

import pytest
import torch

from experiments.data.arrays import ArrayDataset, Images, first_per_class, holdout


def images(count: int) -> Images:
    pixels = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(count, 1, 2, 2)
    return Images(pixels, torch.arange(count) % 3)


@pytest.mark.parametrize(("count", "fraction", "held"), [(100, 0.1, 10), (1437, 0.1, 144), (3, 0.01, 1), (2, 0.99, 1)])
def test_a_holdout_has_its_share_and_nothing_is_lost_or_twice(count: int, fraction: float, held: int) -> None:
    kept, taken = holdout(count, fraction, seed=1)
    assert len(taken) == held
    assert sorted([*kept.tolist(), *taken.tolist()]) == list(range(count))


def test_a_holdout_depends_on_its_seed_alone_and_leaves_the_global_generator() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = holdout(50, 0.2, seed=1)[1]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(holdout(50, 0.2, seed=1)[1], first)
    assert not torch.equal(holdout(50, 0.2, seed=2)[1], first)
    assert first.tolist() != list(range(10))


def test_one_image_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        holdout(1, 0.1, seed=1)


def test_a_limit_takes_the_first_images_of_each_class() -> None:
    labels = torch.tensor([1, 1, 0, 1, 0, 2, 0])
    assert first_per_class(labels, 2).tolist() == [0, 1, 2, 4, 5]
    assert first_per_class(labels, None).tolist() == list(range(7))


def test_a_batch_is_fetched_in_the_order_asked_for() -> None:
    dataset = ArrayDataset(images(9))
    batch = dataset.__getitems__([5, 0, 8])
    assert batch.pixels[:, 0, 0, 0].tolist() == [5, 0, 8]
    assert batch.labels.tolist() == [2, 0, 2]
    assert len(dataset) == 9
