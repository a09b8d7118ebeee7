"""The full model, seen while the run goes on: scaled, with its own batch-norm statistics, and undone exactly."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from resist_lightning.exchange import Exchange
from resist_lightning.layout import Layout
from resist_lightning.norm import BatchStatistics, Call, norms_with_statistics, recalibrate
from resist_lightning.scaling import ScaleHooks, fold, foldable, unfold


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
        self._remembered: list[tuple[Tensor, Tensor]] = []
        self._originals: dict[str, Tensor] = {}
        self._statistics: dict[str, Tensor] = {}
        self._batch_statistics = BatchStatistics([])
        self._hooks = ScaleHooks([], 1.0)

    def remember(self, tensors: Sequence[Tensor]) -> None:
        """Keep copies of this worker's tensors, for :meth:`restore`."""
        self._remembered = [(tensor, tensor.detach().clone()) for tensor in tensors]

    def remembered(self) -> dict[int, Tensor]:
        """What :meth:`remember` was given, by the identity of the tensor."""
        return {id(tensor): copy for tensor, copy in self._remembered}

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
        self.active = True

    def close(self) -> None:
        """Take off what is not a weight: hooks and batch statistics."""
        self._batch_statistics.remove()
        self._hooks.remove()
        self._originals, self._statistics = {}, {}
        self.active = False

    def restore(self) -> None:
        """Put back the remembered tensors, bit for bit."""
        with torch.no_grad():
            for tensor, copy in self._remembered:
                tensor.copy_(copy)
        self._remembered = []

    def settle(self) -> None:
        """Leave the module as the full model for good. Scales that do not fold into weights stay as hooks."""
        self._batch_statistics.remove()
        self._originals, self._statistics = {}, {}
        self.active = False

    def state(self) -> dict[str, Any]:
        """What :meth:`undo` needs, beside the module's weights."""
        layout = self._layout
        return {
            "scale": layout.scale,
            "blocks": [block.name for block in layout.blocks],
            "hooked": [block.name for block in layout.blocks if not foldable(block)],
            "originals": {name: tensor.cpu() for name, tensor in self._originals.items()},
            "norm_statistics": {name: tensor.cpu() for name, tensor in self._statistics.items()},
        }

    def undo(self, state: dict[str, Any]) -> None:
        """Turn loaded weights of a full model back into weights to train, exactly."""
        layout = self._layout
        names = set(state["blocks"])
        blocks = [block for block in layout.blocks if block.name in names]
        if state["scale"] != 1:
            unfold(blocks, state["scale"], state["originals"])
        buffers = self._norm_buffers()
        with torch.no_grad():
            for name, statistic in state["norm_statistics"].items():
                if name in buffers:
                    buffers[name].copy_(statistic)

    def _norm_buffers(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}" if name else key: buffer
            for name, norm in norms_with_statistics(self._layout.module).items()
            for key, buffer in norm.named_buffers(recurse=False)
        }
