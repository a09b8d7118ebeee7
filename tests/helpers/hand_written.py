"""Small residual networks as users write them by hand: encoders, ResNets, U-Nets, graphs, diffusion transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH = 16
DEPTH = 5


class EncoderBlock(nn.Module):
    """A transformer block; the norm is before each branch, or after each sum."""

    def __init__(self, norm_first: bool, width: int = WIDTH) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm_first:
            x = x + self.attend(self.norm1(x))
            return x + self.mlp(self.norm2(x))
        x = self.norm1(x + self.attend(x))
        return self.norm2(x + self.mlp(x))

    def attend(self, x: Tensor) -> Tensor:
        # Two heads.
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return self.out(functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(functional.gelu(self.up(x)))


class Encoder(nn.Module):
    """Classifies sequences of token ids."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, WIDTH)
        self.blocks = nn.ModuleList(EncoderBlock(norm_first) for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class KeywordBlock(nn.Module):
    """A block that is called by keyword, and returns a tuple with the bias for the next block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, hidden: Tensor, *, bias: Tensor) -> tuple[Tensor, Tensor]:
        return hidden + self.down(functional.gelu(self.up(self.norm(hidden) + bias))), bias


class Keywords(nn.Module):
    """A network that passes a bias on from block to block."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.bias = nn.Embedding(32, WIDTH), nn.Parameter(torch.ones(WIDTH))
        self.layers = nn.ModuleList(KeywordBlock() for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, ids: Tensor) -> Tensor:
        hidden, bias = self.embedding(ids), self.bias.expand(len(ids), 1, WIDTH)
        for layer in self.layers:
            hidden, bias = layer(hidden=hidden, bias=bias)
        return self.head(hidden)


class WideBlock(nn.Module):
    """Pre-activation block of a WideResNet."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.dropout = nn.Dropout(0.1)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(functional.relu(self.bn1(x)))
        out = self.conv2(self.dropout(functional.relu(self.bn2(out))))
        return out + self.skip(x)


class WideResNet(nn.Module):
    """Three groups of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.groups = nn.ModuleList()
        for inputs, outputs in ((8, 8), (8, 16), (16, 24)):
            blocks = [WideBlock(inputs, outputs), *(WideBlock(outputs, outputs) for _ in range(3))]
            self.groups.append(nn.Sequential(*blocks))
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for group in self.groups:
            x = functional.avg_pool2d(group(x), 2)
        return self.head(x.mean((2, 3)))


class UNet(nn.Module):
    """Residual blocks on the way down and up, with long skips; the time step goes into each block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.time = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Linear(1, WIDTH)
        self.down = nn.ModuleList(UNetBlock() for _ in range(3))
        self.middle = nn.ModuleList(UNetBlock() for _ in range(3))
        self.merge = nn.ModuleList(nn.Conv2d(2 * WIDTH, WIDTH, 1) for _ in range(3))
        self.up = nn.ModuleList(UNetBlock() for _ in range(3))
        self.head = nn.Conv2d(WIDTH, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        time = self.time(x.mean((1, 2, 3))[:, None])
        x = self.stem(x)
        skips = []
        for block in self.down:
            x = block(x, time)
            skips.append(x)
        x = functional.avg_pool2d(x, 2)
        for block in self.middle:
            x = block(x, time)
        x = functional.interpolate(x, scale_factor=2)
        for merge, block in zip(self.merge, self.up, strict=True):
            x = block(merge(torch.cat([x, skips.pop()], 1)), time)
        return self.head(x)


class UNetBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, WIDTH), nn.GroupNorm(4, WIDTH)
        self.conv1, self.conv2 = (nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(2))
        self.time = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        out = self.conv1(functional.silu(self.norm1(x))) + self.time(time)[:, :, None, None]
        return x + self.conv2(functional.silu(self.norm2(out)))


class ResidualLayer(nn.Module):
    """A layer of a residual MLP for tables."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm1d(WIDTH), nn.Dropout(0.1)
        self.first, self.second = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.second(self.dropout(self.first(self.norm(x)).relu())))


def residual_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, WIDTH), *(ResidualLayer() for _ in range(DEPTH)), nn.Linear(WIDTH, 4))


class GraphLayer(nn.Module):
    """A residual layer on the sum of a node's own and its neighbours' features."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.neighbours = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        x = self.norm(nodes)
        sent = self.neighbours(x)[edges[0]]
        received = torch.zeros_like(x).index_add(0, edges[1], sent)
        return nodes + self.out((self.own(x) + received).relu())


class GraphNetwork(nn.Module):
    """Classifies nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(12, WIDTH), nn.Linear(WIDTH, 4)
        self.layers = nn.ModuleList(GraphLayer() for _ in range(DEPTH))

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        x = self.stem(nodes)
        for layer in self.layers:
            x = layer(x, edges)
        return self.head(x)


class DiTBlock(EncoderBlock):
    """A block with shift, scale and gate of both branches from a condition (adaLN)."""

    def __init__(self) -> None:
        super().__init__(norm_first=True)
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in range(2))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:  # type: ignore[override]
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attend(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """A diffusion transformer on patches of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.condition = nn.Conv2d(3, WIDTH, 4, 4), nn.Linear(3, WIDTH)
        self.blocks = nn.ModuleList(DiTBlock() for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, images: Tensor) -> Any:
        x, condition = self.patches(images).flatten(2).transpose(1, 2), self.condition(images.mean((2, 3)))
        for block in self.blocks:
            x = block(x, condition)
        return self.head(x)


class Residual(nn.Module):
    """Adds its input to the output of any module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x


class FeedForward(nn.Sequential):
    """A sequence that adds its input."""

    def __init__(self) -> None:
        up, down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        super().__init__(nn.LayerNorm(WIDTH), up, nn.GELU(), down)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Rotary(nn.Module):
    """Turns pairs of features by an angle that grows with the position."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", 0.3 ** torch.arange(WIDTH // 2))

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[1])[:, None] * self.frequencies
        one, other = x.chunk(2, dim=-1)
        return torch.cat([one * angles.cos() - other * angles.sin(), one * angles.sin() + other * angles.cos()], -1)


class RotaryAttention(nn.Module):
    def __init__(self, rotary: Rotary) -> None:
        super().__init__()
        self.norm, self.rotary = nn.LayerNorm(WIDTH), rotary
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm(x)).chunk(3, dim=-1)
        return self.out(functional.scaled_dot_product_attention(self.rotary(query), self.rotary(key), value))


class Wrappers(nn.Module):
    """Two blocks a layer, in a list of lists; one object turns the positions in all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(32, WIDTH), nn.Linear(WIDTH, 4)
        rotary = Rotary()
        pairs = ((Residual(RotaryAttention(rotary)), FeedForward()) for _ in range(DEPTH))
        self.layers = nn.ModuleList(map(nn.ModuleList, pairs))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for attention, feed_forward in self.layers:
            x = feed_forward(attention(x))
        return self.head(x)
