"""The default auxiliary networks: shapes, learning, and refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from resist_lightning.errors import StageSelectionError
from resist_lightning.methods.auxnet.network.aux_defaults import (
    ChannelsLast,
    NetworkInput,
    PatchesToTokens,
    convolutions,
    default_body,
)

IMAGE = NetworkInput((3, 8, 8), torch.float32)
IDS = NetworkInput((6,), torch.int64, vocabulary=7)
VECTOR = NetworkInput((5,), torch.float32)
SERIES = NetworkInput((6, 3), torch.float32)


def batch(given: NetworkInput, size: int) -> Tensor:
    torch.manual_seed(size)
    if given.vocabulary is not None:
        return torch.randint(0, given.vocabulary, (size, *given.shape))
    return torch.randn(size, *given.shape)


@pytest.mark.parametrize("size", [2, 3, 5, 8, 9, 32])
@pytest.mark.parametrize("smaller", [1, 2])
def test_convolutions_train_on_one_sample(size: int, smaller: int) -> None:
    network = convolutions((3, size, size), (4, smaller, smaller), width=2).train()

    network(torch.randn(1, 3, size, size)).sum().backward()

    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize(
    ("given", "boundary"),
    [
        (IMAGE, (4, 4, 4)),
        (IMAGE, (2, 2, 6)),  # channels last, as in Swin
        (IMAGE, (16, 6)),
        (IMAGE, (18, 6)),  # a class token, and one more
        (IMAGE, (3, 6)),  # fewer than a square of patches
        (IMAGE, (6,)),
        (NetworkInput((3, 6, 20), torch.float32), (8, 4)),  # a grid that is not square, with pixels left over
        (NetworkInput((1, 1, 50), torch.float32), (9, 4)),
        (NetworkInput((3, 40, 40), torch.float32), (6,)),
        (IDS, (6, 5)),
        (IDS, (7, 5)),  # a class token
        (IDS, (2, 5)),  # tokens were merged
        (IDS, (5,)),
        (SERIES, (6, 5)),
        (SERIES, (5,)),
        (VECTOR, (4,)),
        (VECTOR, (6, 4)),
        (VECTOR, (2, 3, 3)),
    ],
)
def test_every_pair_of_shapes_gives_the_boundary_once_for_each_head(
    given: NetworkInput, boundary: tuple[int, ...], heads: int
) -> None:
    body = default_body(given, boundary, 4, heads).train()

    for size in (1, 3):
        made = body(batch(given, size))
        assert made.shape == (size, heads * boundary[0], *boundary[1:])
        made.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in body.parameters())


@pytest.mark.parametrize(
    ("given", "boundary", "said"),
    [
        (NetworkInput((3, 4, 8, 8), torch.float32), (5, 4), r"makes \(5, 4\) of \(3, 4, 8, 8\) \(torch\.float32\)"),
        (IMAGE, (2, 3, 4, 4), "images .*, sequences .* and vectors"),
        (SERIES, (2, 3, 4), "images .*, sequences .* and vectors"),
        (IDS, (2, 3, 4), "for token ids"),
        (NetworkInput((6,), torch.int64), (6, 4), "no embedding of the network receives them"),
        (NetworkInput((3, 8, 8), torch.uint8), (6, 4), "no embedding of the network receives them"),
    ],
)
def test_other_shapes_are_refused_with_the_way_out(given: NetworkInput, boundary: tuple[int, ...], said: str) -> None:
    with pytest.raises(StageSelectionError, match=f"{said}.*Give `aux_network`"):
        default_body(given, boundary, 4, 1)


def test_patches_are_in_the_order_of_the_networks_own_and_see_their_own_pixels() -> None:
    patches = PatchesToTokens((1, 4, 8), (2, 4), 3)
    image = torch.zeros(1, 1, 4, 8)
    image[0, 0, 2:, 2:4] = 1.0  # second row, second column

    changed = (patches(image) - patches(torch.zeros(1, 1, 4, 8))).abs().sum(-1)[0]

    assert changed.nonzero().flatten().tolist() == [5]


def test_of_several_images_each_keeps_its_channels() -> None:
    images = torch.randn(2, 2, 3, 4, 5)  # two of 3 channels, for each of two samples

    moved = ChannelsLast(2)(images.flatten(1, 2))

    assert torch.equal(moved, torch.cat([image.permute(0, 2, 3, 1) for image in images.unbind(1)], dim=1))


@pytest.mark.parametrize(
    ("given", "truth"),
    [
        (IMAGE, lambda x: functional.avg_pool2d(x, 2).flatten(2).transpose(1, 2)),
        (IDS, lambda x: torch.stack([x % 2, x // 4], dim=-1).float().cumsum(1) / 2),
        (SERIES, lambda x: x - x.mean(1, keepdim=True)),
        (VECTOR, lambda x: x[:, :3].relu()),
    ],
)
def test_it_learns_what_follows_from_the_input_with_the_optimizer_it_is_given(given: NetworkInput, truth) -> None:
    """Sequences too: a network that mixes up tokens, or sees each alone, keeps most of the error."""
    torch.manual_seed(1)
    x = batch(given, 32)
    wanted = truth(x)
    body: nn.Module = default_body(given, wanted.shape[1:], 8, 1)
    optimizer = torch.optim.SGD(body.parameters(), 0.1, momentum=0.9)
    errors = []
    for _ in range(150):
        error = functional.mse_loss(body(x), wanted) / 2
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())

    assert errors[-1] < 0.3 * float(wanted.var()) / 2
