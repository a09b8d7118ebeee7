"""Measures the time and the output shape of each unit of a network, on an example batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from resist_lightning.errors import StageSelectionError
from resist_lightning.methods.auxnet.config import StageConfig
from resist_lightning.methods.auxnet.network.aux_defaults import NetworkInput
from resist_lightning.methods.auxnet.network.aux_networks import make_aux_network
from resist_lightning.methods.auxnet.network.chain import Chain
from resist_lightning.methods.auxnet.network.find import describe
from resist_lightning.methods.auxnet.network.forward import unchanged
from resist_lightning.state.timing import now

_REPEATS = 3


@dataclass(frozen=True)
class Measured:
    """Times and shapes of the units of a network. Shapes are without the batch.

    Args:
        forward_seconds: forward time of each unit, for the whole batch.
        backward_seconds: backward time of each unit, for the whole batch; the first unit's ends at its parameters.
        shapes: shape of each unit's output; the last is the network's output.
        given: the network's input.
        nonnegative: for each unit, whether no entry of its output was below 0, as behind a ReLU.
        dtype: data type of the units' outputs.
    """

    forward_seconds: tuple[float, ...]
    backward_seconds: tuple[float, ...]
    shapes: tuple[tuple[int, ...], ...]
    given: NetworkInput
    nonnegative: tuple[bool, ...]
    dtype: torch.dtype


def measure(chain: Chain, example: Tensor, *, repeats: int = _REPEATS) -> Measured:
    """Run a network unit by unit, in training mode, once to warm up and then ``repeats`` times.

    Buffers, gradients, random generators and modes are unchanged afterwards.

    Args:
        chain: the network; all of it must be present.
        example: (batch, ...), an input of the network, on its device.
        repeats: number of runs whose median is taken, at least 1.

    Raises:
        StageSelectionError: if a unit's output is not a tensor of floats with the batch as first dimension, or units
            differ in dtype.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats} must be at least 1.")
    stages = [chain.stage(number, number + 1) for number in range(len(chain.units))]
    # By unit, the seconds of each run.
    forward: list[list[float]] = [[] for _ in stages]
    backward: list[list[float]] = [[] for _ in stages]
    with unchanged(chain.network), _buffers_kept(chain.network):
        vocabulary = None if example.is_floating_point() else _vocabulary(stages[0], example)
        for _ in range(1 + repeats):
            outputs: list[Tensor] = []
            x = example.detach()
            for number, stage in enumerate(stages):
                try:
                    # The gradient of the network's input is not needed.
                    output, forward_time, backward_time = _run(stage, x.requires_grad_(number > 0))
                except (ValueError, TypeError, RuntimeError, IndexError) as error:
                    raise StageSelectionError(
                        f"{describe(chain.name)} fails in the unit that ends with {chain.units[number]!r}, for a "
                        f"network input of {example.dtype} and shape {tuple(example.shape)}: {error}. Name with "
                        "`input` the part of a batch that the network takes; where training_step changes it first, set "
                        "example_input_array of the LightningModule to a tensor like the network's input."
                    ) from error
                _check(chain, number, output, [example, *outputs])
                x = output.detach()
                outputs.append(x)
                forward[number].append(forward_time)
                backward[number].append(backward_time)
    # The first run is left out: it warms up caches.
    return Measured(
        forward_seconds=tuple(median(times[1:]) for times in forward),
        backward_seconds=tuple(median(times[1:]) for times in backward),
        shapes=tuple(tuple(output.shape[1:]) for output in outputs),
        given=NetworkInput(tuple(example.shape[1:]), example.dtype, vocabulary),
        nonnegative=tuple(bool((output >= 0).all()) for output in outputs),
        dtype=outputs[0].dtype,
    )


def measure_entries(config: StageConfig, measured: Measured, example: Tensor) -> tuple[float, ...]:
    """Time the auxiliary network of a stage that would begin with each unit, forward and backward.

    Returns:
        Seconds for each unit, 0 for the first; infinity where there can be no auxiliary network.
    """
    if config.stored or config.delayed:
        return (0.0,) * len(measured.shapes)
    boundaries = list(zip(measured.shapes, measured.nonnegative, strict=True))[:-1]
    # Equal boundaries share one measurement.
    seconds: dict[tuple[tuple[int, ...], bool], float] = {}
    for shape, nonnegative in set(boundaries):
        try:
            network = make_aux_network(config, measured.given, shape, nonnegative=nonnegative, boundary=0)
        except Exception:  # noqa: BLE001 - any error of the user's network; told if a stage must begin here
            seconds[shape, nonnegative] = math.inf
            continue
        network.to(example.device, measured.dtype)
        times = []
        for _ in range(1 + _REPEATS):
            _, forward, backward = _run(_Guess(network), example)
            times.append(forward + backward)
        seconds[shape, nonnegative] = median(times[1:])
    return (0.0, *(seconds[boundary] for boundary in boundaries))


class _Guess(nn.Module):
    """An auxiliary network with one output."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @override
    def forward(self, x: Tensor) -> Tensor:
        guess, multiplier = self.network(x)
        found: Tensor = guess if multiplier is None else guess + multiplier
        return found


def _vocabulary(stage: nn.Module, ids: Tensor) -> int | None:
    """Number of token ids, by the embedding that is given them; None if none is."""
    watch = _Embeddings(ids)
    try:
        with watch, torch.no_grad():
            stage(ids)
    except (ValueError, TypeError, RuntimeError, IndexError):
        return None  # measuring fails likewise, and names the unit
    return max(watch.sizes, default=None)


class _Embeddings(TorchFunctionMode):
    """Notes the sizes of the embeddings that are given some ids."""

    def __init__(self, ids: Tensor) -> None:
        super().__init__()
        self._ids = ids.flatten()
        self.sizes: list[int] = []

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (functional.embedding, functional.embedding_bag):
            given, weight = args[:2]
            # In any shape; positions and kinds of tokens, which are embedded too, are other numbers.
            if torch.equal(given.flatten(), self._ids.to(given.dtype)):
                self.sizes.append(len(weight))
        return func(*args, **(kwargs or {}))


def _run(stage: nn.Module, x: Tensor) -> tuple[Any, float, float]:
    """Output and seconds of the forward and the backward; gradients are discarded."""
    start = now(x.device)
    output: Any = stage(x)
    middle = now(x.device)
    # `grad`, not `backward`: the user's parameters keep the gradients that they have.
    if isinstance(output, Tensor) and output.requires_grad:
        wanted = [tensor for tensor in (x, *stage.parameters()) if tensor.requires_grad]
        torch.autograd.grad(output, wanted, torch.ones_like(output), allow_unused=True)
    return output, middle - start, now(x.device) - middle


def _check(chain: Chain, number: int, output: object, before: list[Tensor]) -> None:
    """Refuse a unit's output that cannot cross a boundary; ``before``: the example and the outputs so far."""
    batch, dtype = len(before[0]), before[-1].dtype
    if not isinstance(output, Tensor):
        problem = f"a {type(output).__name__}, not a tensor"
    elif not output.is_floating_point():
        problem = f"a tensor of {output.dtype}, not of floats"
    elif output.dim() < 1 or len(output) != batch:
        problem = f"a tensor of shape {tuple(output.shape)}, whose first dimension is not the batch of {batch}"
    elif len(before) > 1 and output.dtype != dtype:
        # All messages between stages have one data type.
        problem = f"a tensor of {output.dtype}, but the unit before it one of {dtype}"
    else:
        return
    raise StageSelectionError(
        f"{describe(chain.name)} cannot be cut into stages: the unit that ends with {chain.units[number]!r} returns "
        f"{problem}."
    )


@contextmanager
def _buffers_kept(network: nn.Module) -> Iterator[None]:
    # By assignment and by value: a forward may replace a buffer, or write into it.
    before: list[tuple[nn.Module, str, Tensor | None, Tensor | None]] = []
    for module in network.modules():
        for name, buffer in module._buffers.items():
            values = None if buffer is None else buffer.clone()
            before.append((module, name, buffer, values))
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, values in before:
                module._buffers[name] = buffer
                if buffer is not None and values is not None:
                    buffer.copy_(values)
