"""Blocks that may be left out, residual ones of many kinds, and blocks that only look residual."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

WIDTH, TOKENS = 8, 5

compiled_blocks_move = pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "invalidate_compile_context_weakrefs"),
    reason="this torch keeps references to what it has compiled",
)


class Add(nn.Module):
    """Adds a branch to its input."""

    def __init__(self, branch: nn.Module, norm: nn.Module | None = None, act: Any = None) -> None:
        super().__init__()
        self.branch, self.norm, self.act = branch, norm, act

    def forward(self, x: Tensor) -> Tensor:
        out = self.branch(x)
        y = x + (out[0] if isinstance(out, tuple) else out)
        y = self.norm(y) if self.norm is not None else y
        return self.act(y) if self.act is not None else y


class Mixer(nn.Module):
    """Mixes tokens, then channels: the first layer acts on tokens, the last one on channels."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Sequential(nn.Linear(TOKENS, 7), nn.GELU(), nn.Linear(7, TOKENS))
        self.channels = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(x.transpose(1, 2)).transpose(1, 2)
        return x + self.channels(x)


class DiT(nn.Module):
    """A block with shift, scale and gate from a condition, by a layer that is registered last."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 3 * WIDTH))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition).unsqueeze(1).chunk(3, dim=-1)
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)


class Scaled(nn.Module):
    """A block with a layer scale, a gate, and a buffer on the skip path."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.gate, self.scale = (
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, WIDTH),
            nn.Parameter(torch.ones(1)),
        )
        self.register_buffer("one", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.one + self.scale * self.inside(x) * self.gate(x).sigmoid()


class Wrapper(nn.Module):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Any:
        return self.inside(x)


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.inside(x).sigmoid()


class Odd(nn.Module):
    """A block that is residual, but for its input or output."""

    def __init__(self, odd: str) -> None:
        super().__init__()
        self.inside, self.odd = nn.Linear(WIDTH, WIDTH), odd

    def forward(self, x: Any, mask: Tensor | None = None) -> Any:
        if self.odd == "a list":
            return x[0] + self.inside(x[0])
        y = x + self.inside(x)
        made = {"returns a tuple": lambda: (y, y.mean()), "data type": y.double, "shape": lambda: y[:, ::2]}
        return made.get(self.odd, lambda: y)()
