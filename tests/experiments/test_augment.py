"""Augmentation of a batch: each image is a window of its own padded version, at its own offset."""

from __future__ import annotations

import torch
from torch import Tensor

from experiments.data.arrays import Images
from experiments.data.augment import BatchRandomCrop, BatchRandomFlip, BatchTransform


def pixels(count: int = 64) -> Tensor:
    return torch.randint(1, 256, (count, 3, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def places(original: Tensor, cropped: Tensor, padding: int) -> list[tuple[int, int]]:
    """Every offset at which the crop is a window of the padded image."""
    height, width = original.shape[-2:]
    padded = torch.nn.functional.pad(original, [padding] * 4)
    return [
        (top, left)
        for top in range(2 * padding + 1)
        for left in range(2 * padding + 1)
        if torch.equal(padded[:, top : top + height, left : left + width], cropped)
    ]


def test_a_crop_is_one_window_of_the_padded_image_and_all_places_occur() -> None:
    torch.manual_seed(0)
    before = pixels()
    after = BatchRandomCrop(1)(before)
    assert after.shape == before.shape
    assert after.dtype == torch.uint8
    found = [places(old, new, 1) for old, new in zip(before, after, strict=True)]
    assert all(len(offsets) == 1 for offsets in found)
    assert {offsets[0] for offsets in found} == {(top, left) for top in range(3) for left in range(3)}


def test_a_flip_mirrors_whole_images_about_half_of_the_time() -> None:
    torch.manual_seed(0)
    before = pixels(400)
    after = BatchRandomFlip()(before)
    kept = [torch.equal(old, new) for old, new in zip(before, after, strict=True)]
    mirrored = [torch.equal(old.flip(-1), new) for old, new in zip(before, after, strict=True)]
    assert all(one != other for one, other in zip(kept, mirrored, strict=True))
    assert 150 < sum(mirrored) < 250


def test_randomness_comes_from_the_global_generator() -> None:
    transform = BatchTransform((0.5,) * 3, (0.2,) * 3, crop_padding=2, flip=True)
    batch = Images(pixels(), torch.zeros(64, dtype=torch.long))
    drawn = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        drawn.append(transform(batch)[0])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_without_augmentation_values_are_normalised_by_channel() -> None:
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 0.125)
    batch = Images(pixels(4), torch.arange(4))
    floats, labels = BatchTransform(mean, std)(batch)
    for channel in range(3):
        expected = (batch.pixels[:, channel].double() / 255 - mean[channel]) / std[channel]
        torch.testing.assert_close(floats[:, channel].double(), expected, atol=1e-5, rtol=0)
    assert floats.dtype == torch.float32
    assert labels.tolist() == [0, 1, 2, 3]
