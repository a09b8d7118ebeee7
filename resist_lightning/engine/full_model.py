"""The full model, seen while the run goes on: scaled, with its own batch-norm statistics, and undone exactly."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from resist_lightning.checks.hashing import Hasher, as_numbers
from resist_lightning.comm.exchange import Exchange
from resist_lightning.comm.tensors import same
from resist_lightning.methods.layout import Layout
from resist_lightning.methods.residual import block_at
from resist_lightning.methods.resist.scaling import ScaleHooks, fold, foldable, folded, remove_scale_hooks, unfold
from resist_lightning.state.batch_norm import (
    BatchStatistics,
    Call,
    norms_with_statistics,
    recalibrate,
    remove_batch_statistics,
)
from resist_lightning.state.user_writes import Writes


def put_on(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Give a module with the weights of a full model what else belongs to it, in the place of what it has of that.

    Args:
        module: the user's.
        state: from :meth:`FullModel.state`; empty for weights that are not of a full model.
    """
    take_off(module)
    names, there = state.get("hooked", []), dict(module.named_modules())
    missing = [name for name in names if name not in there]
    if missing:
        warnings.warn(
            f"the full model scales {missing[0]!r}, which this module does not have: what it computes is not what was "
            "reported of the full model. Load the weights into the module that was trained.",
            stacklevel=3,
        )
    if names:
        ScaleHooks([block_at(name, there[name]) for name in names if name in there], state["scale"])
    if state.get("batch_statistics", False):
        BatchStatistics(norms_with_statistics(module).values())


def take_off(module: nn.Module) -> None:
    """Undo :func:`put_on`, of this module or of one that it is a copy of."""
    remove_scale_hooks(module)
    remove_batch_statistics(module)


@contextmanager
def bare(module: nn.Module) -> Iterator[None]:
    """Inside, a module is without what :func:`put_on` gave it, so that its own forward can be looked at."""
    children = list(module.modules())
    hooks: list[Any] = [h for child in children for h in (child._forward_hooks, child._forward_hooks_with_kwargs)]
    kept = [dict(h) for h in hooks]
    forwards = [(child, vars(child)["forward"]) for child in children if "forward" in vars(child)]
    take_off(module)
    try:
        yield
    finally:
        for now, before in zip(hooks, kept, strict=True):
            now.clear()
            now.update(before)
        for child, forward in forwards:
            vars(child)["forward"] = forward


class FullModel:
    """Turns an assembled module into what is evaluated and saved, and back.

    Args:
        layout: the model's parts.
        exchange: the workers.
        forward_context: a context in which recorded inputs are replayed.
    """

    def __init__(
        self, layout: Layout, exchange: Exchange, forward_context: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        self.active = False
        self._layout = layout
        self._exchange = exchange
        self._forward_context = forward_context
        self.swapped = False  # whether the trained weights were exchanged between `note` and `remember`
        self._remembered: list[tuple[Tensor, Tensor]] = []
        self._noted: dict[int, Tensor] = {}
        self._writes: Writes | None = None
        self._originals: dict[str, Tensor] = {}
        self._statistics: dict[str, Tensor] = {}
        self._batch_statistics = BatchStatistics([])
        self._hooks = ScaleHooks([], 1.0)

    def note(self, tensors: Sequence[Tensor]) -> None:
        """Keep copies of this worker's tensors, before anybody has prepared them for an evaluation."""
        self._noted = {id(tensor): tensor.detach().clone() for tensor in tensors}

    def remember(self, tensors: Sequence[Tensor]) -> None:
        """Keep copies of this worker's tensors, for :meth:`restore`."""
        self.swapped, self._remembered = False, []
        for tensor in tensors:
            copy = self._noted.get(id(tensor))
            if copy is None or not same(copy, tensor):
                self.swapped |= copy is not None and isinstance(tensor, nn.Parameter)
                copy = tensor.detach().clone()
            self._remembered.append((tensor, copy))

    def forget_notes(self) -> None:
        """Call it when the evaluation has ended."""
        self._noted = {}

    def state_dict(self) -> dict[int, Tensor]:
        """What this worker will have after :meth:`restore`, by the identity of the module's tensors."""
        written = {id(tensor): tensor for tensor in self.written().values()}
        return {**{id(tensor): copy for tensor, copy in self._remembered}, **written}

    def written(self) -> dict[str, Tensor]:
        """By name, the tensors that user code has written since :meth:`open`, and that stay so."""
        return self._writes.found() if self._writes is not None else {}

    def open(self, calls: Sequence[Call], still: Collection[str], kind: str, left_out: Sequence[int] = ()) -> None:
        """Scale the blocks and set the batch-norm statistics.

        Collective: every worker must call this, in the same order.

        Args:
            calls: recorded inputs to re-estimate statistics with; empty to leave them as they are.
            still: names of batch norms whose statistics do not train.
            kind: how the bytes are counted.
            left_out: workers whose inputs do not count.
        """
        layout = self._layout
        self._statistics = {name: buffer.detach().clone() for name, buffer in self._norm_buffers().items()}
        self._originals = fold(layout.blocks, layout.scale) if layout.scale != 1 else {}
        self._hooks.remove()
        self._hooks = ScaleHooks([block for block in layout.blocks if not foldable(block)], layout.scale)
        if layout.config.batch_norm == "batch":
            self._batch_statistics = BatchStatistics(norms_with_statistics(layout.module).values())
        elif calls:
            estimated = recalibrate(layout.module, calls, self._forward_context, still)
            self._exchange.average(estimated, kind, left_out)
        self._writes = Writes(layout.module, self._ours())
        self.active = True

    def close(self) -> None:
        """Take off what is not a weight, hooks and batch statistics; what user code has written is its own."""
        self._batch_statistics.remove()
        self._hooks.remove()
        self._originals, self._statistics = {}, {}
        found = self.written()
        if self._layout.companion is not None:
            self._layout.companion.keep(found)
        written = {id(tensor) for tensor in found.values()}
        self._remembered = [(tensor, copy) for tensor, copy in self._remembered if id(tensor) not in written]
        self._writes = None
        self.active = False

    def restore(self) -> None:
        """Put back the remembered tensors, bit for bit."""
        with torch.no_grad():
            for tensor, copy in self._remembered:
                tensor.copy_(copy)
        self._remembered = []

    def settle(self) -> None:
        """Leave the module as the full model for good. What :func:`put_on` would give it stays on it."""
        self._writes = None
        self._originals, self._statistics = {}, {}
        self.active = False
        if self._layout.companion is not None:
            self._layout.companion.settle()

    def state(self) -> dict[str, Any]:
        """What :meth:`undo` and :func:`put_on` need, beside the module's weights."""
        layout = self._layout
        return {
            "scale": layout.scale,
            "blocks": [block.name for block in layout.blocks],
            "hooked": [block.name for block in layout.blocks if not foldable(block)],
            "batch_statistics": layout.config.batch_norm == "batch",
            "originals": {name: tensor.cpu() for name, tensor in self._originals.items()},
            "norm_statistics": {name: tensor.cpu() for name, tensor in self._statistics.items()},
            "left": {name: _mark(tensor) for name, tensor in self._not_as_trained().items()},
        }

    def undo(self, state: Mapping[str, Any]) -> None:
        """Turn weights of a full model back into weights to train, exactly.

        What has been written since, e.g. by loading other weights, is taken as it is.
        """
        layout, left = self._layout, state.get("left")
        names = set(state["blocks"])
        blocks = [block for block in layout.blocks if block.name in names]
        tensors = {**folded(blocks), **self._norm_buffers()}
        untouched: set[str] | None = None  # before there were marks: all
        if left is not None:
            untouched = {name for name, mark in left.items() if name in tensors and _mark(tensors[name], mark) == mark}
            written = sorted(tensors.keys() & left.keys() - untouched)
            if untouched and written and self._exchange.worker == 0:
                warnings.warn(
                    f"{len(written)} tensors of the full model have been written since it was made, e.g. {written[0]}: "
                    f"they are trained on as they are. From {len(untouched)} others the test-time scale is taken, and "
                    "their statistics are those of the training before. To begin from what the module holds, use a "
                    "new Trainer.",
                    stacklevel=5,
                )
        if state["scale"] != 1:
            unfold(blocks, state["scale"], state["originals"], untouched)
        buffers = self._norm_buffers()
        with torch.no_grad():
            for name, statistic in state["norm_statistics"].items():
                if name in buffers and (untouched is None or name in untouched):
                    buffers[name].copy_(statistic)

    def _not_as_trained(self) -> dict[str, Tensor]:
        """By name, the tensors that in the full model are not what they are in training."""
        scaled = folded(self._layout.blocks) if self._layout.scale != 1 else {}
        buffers = self._norm_buffers()
        estimated = {name: buffers[name] for name, s in self._statistics.items() if not torch.equal(buffers[name], s)}
        return {**scaled, **estimated}

    def _ours(self) -> set[str]:
        """Names of what in the full model is not the user's: statistics, scaled weights, and what has another shape."""
        layout = self._layout
        own_shapes = {id(tensor): copy.shape for tensor, copy in self._remembered}
        module = layout.module
        named: list[tuple[str, Tensor]] = [*module.named_parameters(), *module.named_buffers()]
        cut = {name for name, tensor in named if own_shapes.get(id(tensor), tensor.shape) != tensor.shape}
        return cut | folded(layout.blocks).keys() | self._norm_buffers().keys()

    def _norm_buffers(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}" if name else key: buffer
            for name, norm in norms_with_statistics(self._layout.module).items()
            for key, buffer in norm.named_buffers(recurse=False)
        }


def _mark(tensor: Tensor, like: Sequence[Any] = ("",)) -> list[Any]:
    """Tells whether a tensor has been written since: its data type and a number for its bits.

    Args:
        tensor: of any device and memory format.
        like: an earlier mark, of a tensor that may have been converted since.
    """
    dtype = getattr(torch, like[0]) if like[0] else tensor.dtype
    (number,) = as_numbers(Hasher(1).hashes([tensor.detach().to(dtype).contiguous()], 0))
    return [str(dtype).removeprefix("torch."), int(number)]
