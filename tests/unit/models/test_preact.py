"""The networks of the paper: parameter counts (spec, section 3), shapes and the order of operations in a block."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from resist_lightning.models import SECTIONS_OF_DEPTH, PreActBlock, PreActResNet, preact_resnet

BLOCK_PARAMETERS = 1_180_672


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def on_meta(depth: int, num_classes: int) -> PreActResNet:
    with torch.device("meta"):
        return preact_resnet(depth, num_classes=num_classes)


def test_parameters_of_101_as_in_the_paper() -> None:
    net = on_meta(101, 100)
    partitionable = list(net.section3)[1:]
    assert parameters(net) == 41_396_900
    assert [parameters(block) for block in partitionable] == [BLOCK_PARAMETERS] * 22
    assert parameters(net) - 22 * BLOCK_PARAMETERS == 15_422_116


def test_parameters_of_101_with_ten_classes() -> None:
    assert parameters(on_meta(101, 10)) == 41_350_730


@pytest.mark.parametrize(("depth", "millions"), [(152, 56.75), (200, 73.28)])
def test_parameters_of_the_deeper_networks(depth: int, millions: float) -> None:
    assert round(parameters(on_meta(depth, 100)) / 1e6, 2) == millions


@pytest.mark.parametrize("depth", sorted(SECTIONS_OF_DEPTH))
def test_every_depth_has_its_sections_and_one_projection_per_stride(depth: int) -> None:
    net = on_meta(depth, 10)
    sections = (net.section1, net.section2, net.section3, net.section4)
    assert tuple(len(section) for section in sections) == SECTIONS_OF_DEPTH[depth]
    for number, section in enumerate(sections, start=1):
        first, *rest = section
        assert (first.shortcut is None) == (number == 1)
        assert all(block.shortcut is None for block in rest)


@pytest.mark.parametrize("size", [8, 32, 33])
def test_output_shape_and_gradients_of_every_parameter(size: int) -> None:
    net = preact_resnet(14, num_classes=7, width_multiplier=0.125, in_channels=1)
    logits = net(torch.randn(3, 1, size, size))
    assert logits.shape == (3, 7)
    logits.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_a_block_computes_what_the_paper_draws() -> None:
    torch.manual_seed(0)
    block = PreActBlock(4, 6, stride=2).eval()
    for bn in (block.bn1, block.bn2):
        nn.init.uniform_(bn.running_mean, -1, 1)
        nn.init.uniform_(bn.weight, -1, 1)
    x = torch.randn(2, 4, 8, 8)
    first = block.bn1(x).clamp(min=0)
    expected = block.conv2(block.bn2(block.conv1(first)).clamp(min=0)) + block.shortcut(first)
    torch.testing.assert_close(block(x), expected, rtol=0, atol=0)


def test_a_block_that_keeps_the_shape_adds_its_untouched_input() -> None:
    block = PreActBlock(4, 4)
    nn.init.zeros_(block.get_submodule(block.residual_branch_end).weight)
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(block(x), x, rtol=0, atol=0)


def test_the_pooling_is_a_mean_over_the_last_map_and_nothing_stands_before_it() -> None:
    net = preact_resnet(14, width_multiplier=0.125).eval()
    x = torch.randn(2, 3, 32, 32)
    last = net.section4(net.section3(net.section2(net.section1(net.stem(x)))))
    assert last.shape[-2:] == (4, 4)
    torch.testing.assert_close(net(x), net.head(last.mean(dim=(2, 3))))


def test_without_running_statistics_evaluation_uses_the_batch() -> None:
    net = preact_resnet(14, width_multiplier=0.125, track_running_stats=False)
    assert not list(net.buffers())
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(net.eval()(x), net.train()(x), rtol=0, atol=0)


def test_no_convolution_has_a_bias() -> None:
    convolutions = [m for m in on_meta(101, 10).modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 1 + 2 * 33 + 3
    assert all(conv.bias is None for conv in convolutions)


@pytest.mark.parametrize("depth", [0, 50, 100])
def test_an_unknown_depth_names_the_value_and_the_choices(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"depth={depth} .*14, 26, 38, 101, 152, 200"):
        preact_resnet(depth)


@pytest.mark.parametrize("sections", [(1, 1, 1), (1, 1, 0, 1), (1, 1, 1, 1, 1)])
def test_impossible_sections_are_refused(sections: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="four numbers of blocks"):
        PreActResNet(sections)


@pytest.mark.parametrize("width", [0.0, -1.0])
def test_an_impossible_width_is_refused(width: float) -> None:
    with pytest.raises(ValueError, match="width_multiplier"):
        preact_resnet(14, width_multiplier=width)
