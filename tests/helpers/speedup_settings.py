"""Common settings of precision and speed, and the small networks on which they are tested."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from tests.helpers.plain import make_net

WORKERS, LOCAL_STEPS, STEPS, WIDTH, CLASSES = 2, 2, 3, 8, 4
COUNTING = "counting"  # a backend of torch.compile, registered by `speedups`
METHODS = ("resist", "local_sgd", "ist")

Step = Callable[[nn.Module, list[Optimizer], Callable[[], Tensor]], None]


# Networks.


class ImageBlock(nn.Module):
    """A convolutional block with batch norm, without a declared branch end."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.conv1 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.conv2 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def branch(self, x: Tensor) -> Tensor:
        return self.conv2(functional.relu(self.norm(self.conv1(x))))

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return x + self.branch(x)
        return x + checkpoint(self.branch, x, use_reentrant=self.reentrant)


class TokenBlock(nn.Module):
    """A pre-norm block with two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(WIDTH), nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.norm2, self.mlp = nn.LayerNorm(WIDTH), nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Net(nn.Module):
    """Blocks on images, then blocks on tokens.

    Args:
        reentrant: kind of activation checkpointing, inside of image blocks and around token blocks; None for none.
    """

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.stem, self.head = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Linear(WIDTH, CLASSES)
        self.images = nn.ModuleList(ImageBlock(reentrant) for _ in range(2))
        self.tokens = nn.ModuleList(TokenBlock() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.images:
            x = block(x)
        x = x.flatten(2).transpose(1, 2)
        for block in self.tokens:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x.mean(1))


def make_network(method: str, reentrant: bool | None = None) -> nn.Module:
    """The network that a method can divide, the same in every process."""
    if method == "ist":
        return make_net("chain")
    torch.manual_seed(7)
    return Net(reentrant)


def batch_of(worker: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * worker + step)
    x = torch.randn(8, 3, 8, 8, generator=generator)
    return x, torch.randint(0, CLASSES, (8,), generator=generator)


# Parts of settings.


def sgd(net: nn.Module) -> list[Optimizer]:
    return [torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)]


def one_of_each(net: nn.Module, **options: bool) -> list[Optimizer]:
    """SGD, Adam and AdamW, each on every third parameter."""
    kinds = [partial(torch.optim.SGD, lr=0.05, momentum=0.9), partial(torch.optim.Adam, lr=1e-2), torch.optim.AdamW]
    parameters = list(net.parameters())
    return [kind(parameters[number::3], **options) for number, kind in enumerate(kinds)]


def muon(net: nn.Module) -> list[Optimizer]:
    """Muon for matrices, and AdamW for the rest."""
    parameters = list(net.parameters())
    others = [parameter for parameter in parameters if parameter.dim() != 2]
    matrices = [parameter for parameter in parameters if parameter.dim() == 2]
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=1e-2)]


def lion(net: nn.Module) -> list[Optimizer]:
    from lion_pytorch import Lion

    return [Lion(net.parameters(), lr=1e-3)]


def schedule_free(net: nn.Module) -> list[Optimizer]:
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(net.parameters(), lr=1e-2)
    optimizer.train()
    return [optimizer]


def usual_step(net: nn.Module, optimizers: list[Optimizer], loss: Callable[[], Tensor]) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss().backward()
    for optimizer in optimizers:
        optimizer.step()


def sharpness_aware_step(net: nn.Module, optimizers: list[Optimizer], loss: Callable[[], Tensor]) -> None:
    """SAM by hand: the gradient at the worst point nearby, by two forwards and two backwards."""
    (optimizer,) = optimizers

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss().backward()
        moved = [parameter for parameter in net.parameters() if parameter.grad is not None]
        norm = torch.stack([parameter.grad.norm() for parameter in moved]).norm()
        steps = [0.05 * parameter.grad / norm for parameter in moved]
        with torch.no_grad():
            for parameter, step in zip(moved, steps, strict=True):
                parameter.add_(step)
        optimizer.zero_grad()
        value = loss()
        value.backward()
        with torch.no_grad():
            for parameter, step in zip(moved, steps, strict=True):
                parameter.sub_(step)
        return value

    optimizer.step(closure)


def scaled_step() -> Step:
    """A step with a gradient scaler of the worker's own."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def step(net: nn.Module, optimizers: list[Optimizer], loss: Callable[[], Tensor]) -> None:
        optimizers[0].zero_grad()
        scaler.scale(loss()).backward()
        scaler.step(optimizers[0])
        scaler.update()

    return step


def nothing(net: nn.Module, method: str) -> None:
    """Leave a network as it is."""


def channels_last(net: nn.Module, method: str) -> None:
    net.to(memory_format=torch.channels_last)


def is_channels_last(net: nn.Module) -> bool:
    weights = [tensor for tensor in net.parameters() if tensor.dim() == 4]
    return bool(weights) and all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


def compile_blocks(net: nn.Module, method: str) -> None:
    for block in blocks_of(net):
        block.compile(backend=COUNTING, fullgraph=True)


def wrap_blocks(net: nn.Module, method: str) -> None:
    for blocks in (net.images, net.tokens):
        for index, block in enumerate(blocks):
            blocks[index] = torch.compile(block, backend=COUNTING, fullgraph=True)


def compile_all(net: nn.Module, method: str) -> None:
    net.compile(backend=COUNTING, fullgraph=True)


def blocks_of(net: nn.Module) -> Iterator[nn.Module]:
    return chain(net.images, net.tokens)


def mixed(dtype: torch.dtype) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=dtype, cache_enabled=False)


# The settings.


@dataclass(frozen=True)
class Setting:
    """A setting, and its effects on a training.

    Args:
        says: its name on the page, with the code for it.
        methods: the methods that support it.
        condition: the page's remark where it works.
        prepare: changes the network before the training.
        optimizers: makes the optimizers.
        make_step: makes the function that takes a local step.
        context: in which the network is called.
        reentrant: kind of activation checkpointing; None for none.
        momentum: the policy; ``ist_momentum`` is IST's if it differs.
        check: a condition on the network at the end.
        tolerance: for the comparison with the simulator, relative to each tensor.
        like: an equivalent setting, with which the simulator trains; empty for this one.
        otherwise: the page's remarks on other methods.
    """

    says: str
    methods: tuple[str, ...] = METHODS
    condition: str = ""
    prepare: Callable[[nn.Module, str], None] = nothing
    optimizers: Callable[[nn.Module], list[Optimizer]] = sgd
    make_step: Callable[[], Step] = lambda: usual_step
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    reentrant: bool | None = None
    momentum: str = "reset"
    ist_momentum: str = ""
    check: Callable[[nn.Module], bool] = lambda _: True
    tolerance: float = 1e-4
    like: str = ""
    otherwise: Mapping[str, str] = field(default_factory=dict)


def in_double(net: nn.Module, method: str) -> None:
    """For optimizers that step by a sign: in single precision rounding errors flip signs."""
    net.double()


BLOCKS = ("resist", "local_sgd")
REFUSED = "refused before the training"

SETTINGS = {
    "plain": Setting("none"),
    "bf16-mixed": Setting('`precision="bf16-mixed"`', context=partial(mixed, torch.bfloat16), tolerance=0.02),
    "bf16-true": Setting(
        '`precision="bf16-true"`',
        prepare=lambda net, method: net.bfloat16(),
        check=lambda net: all(tensor.dtype == torch.bfloat16 for tensor in net.parameters()),
        tolerance=0.02,
    ),
    "16-mixed": Setting(
        '`precision="16-mixed"`',
        condition="on the CPU Lightning itself makes it bf16-mixed; this row is torch's own autocast and scaler",
        context=partial(mixed, torch.float16),
        make_step=scaled_step,
        tolerance=0.02,
    ),
    "channels_last": Setting(
        "`net.to(memory_format=torch.channels_last)`", prepare=channels_last, check=is_channels_last, like="plain"
    ),
    "checkpoint": Setting(
        "`checkpoint(..., use_reentrant=False)`", condition="inside of blocks and around them", methods=BLOCKS,
        reentrant=False,
    ),
    "checkpoint, reentrant": Setting(
        "`checkpoint(..., use_reentrant=True)`", condition="inside of blocks and around them", methods=BLOCKS,
        reentrant=True,
    ),
    "compiled blocks": Setting("`block.compile()`", methods=("resist",), prepare=compile_blocks, like="plain"),
    "wrapped blocks": Setting(
        "`torch.compile(block)`", methods=("resist",), condition="name the wrappers in `blocks`", prepare=wrap_blocks,
        like="plain",
    ),
    "compiled network": Setting(
        "`net.compile()`", methods=("local_sgd", "ist"), condition="compile the blocks", prepare=compile_all,
        like="plain",
        otherwise={"resist": REFUSED},
    ),
    "foreach": Setting(
        "SGD, Adam, AdamW with `foreach=True`", prepare=in_double, optimizers=partial(one_of_each, foreach=True),
        momentum="travel",
    ),
    "fused": Setting(
        "SGD, Adam, AdamW with `fused=True`", prepare=in_double, optimizers=partial(one_of_each, fused=True),
        momentum="travel", like="foreach",
    ),
    "Muon": Setting("`torch.optim.Muon`", prepare=in_double, optimizers=muon, momentum="travel"),
    "Lion": Setting("Lion (`lion-pytorch`)", prepare=in_double, optimizers=lion, momentum="travel"),
    "schedule-free": Setting(
        "AdamW without a schedule (`schedulefree`)", prepare=in_double, optimizers=schedule_free, momentum="keep",
        ist_momentum="reset", condition="`momentum='reset'` under `ist`",
    ),
    "SAM": Setting("SAM by hand, in a closure", make_step=lambda: sharpness_aware_step),
}  # fmt: skip

CELLS = [(name, method) for name, setting in SETTINGS.items() for method in setting.methods]
