"""Payloads of residual blocks: their tensors, state that goes with them, and their outer velocities."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from resist_lightning.comm.payload import Payload
from resist_lightning.comm.quantize import compressible, noise_for
from resist_lightning.methods.residual import parameters_of
from resist_lightning.methods.resist.layout import BlockLayout
from resist_lightning.state.optimizer_state import OptimizerStates
from resist_lightning.state.outer import OuterOptimizer, has_outer_step


class Payloads:
    """The payloads of one worker.

    Args:
        layout: the blocks and the settings.
        states: the optimizers' state.
        outer: the outer optimizer; None without one.
        worker: the worker.
        device: device of present tensors.
    """

    def __init__(
        self,
        layout: BlockLayout,
        states: OptimizerStates,
        outer: OuterOptimizer | None,
        worker: int,
        device: torch.device,
    ) -> None:
        self._layout = layout
        self._states = states
        self._outer = outer
        self._worker = worker
        self._device = device
        self._compresses = layout.config.wire != "fp32"

    def of(self, index: int, *, round: int | None = None) -> Payload:
        """The payload of a block at the end of ``round``; None: for an observation, exact and without state.

        Args:
            index: index of the block; numbers behind the last block's are those of the blocks' velocities.
            round: the round that ends.
        """
        blocks = self._layout.blocks
        if index >= len(blocks):
            assert round is not None
            return self._of_velocity(index, round)
        block = blocks[index]
        tensors, config = list(block.tensors().values()), self._layout.config
        if round is None:
            return Payload(tensors)
        state = self._states.tensors(parameters_of([block])) if config.momentum == "travel" else []
        if self._layout.companion is not None:
            state = [*state, *self._layout.companion.tensors(block.tensors())]
        if not self._compresses:
            return Payload(tensors, state)
        noise = noise_for(config.seed, round, index, self._worker, self._device)
        plain = [tensor for tensor in tensors if not compressible(tensor)]
        return Payload(plain, state, [tensor for tensor in tensors if compressible(tensor)], noise)

    def _of_velocity(self, number: int, round: int) -> Payload:
        """The payload of the outer optimizer's velocity of a block."""
        assert self._outer is not None
        tensors = self._layout.blocks[number - len(self._layout.blocks)].tensors().values()
        plain, compressed = map(self._outer.velocities, self.split_velocities(tensors))
        if not self._compresses:
            return Payload(plain, kind="outer")
        noise = noise_for(self._layout.config.seed, round, number, self._worker, self._device)
        return Payload(plain, (), compressed, noise, kind="outer")

    def split_velocities(self, tensors: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The tensors of a block whose velocity travels as it is, and those whose velocity is compressed."""
        stepping = list(filter(has_outer_step, tensors))
        if not self._compresses:
            return stepping, []
        # Compressed like the block itself: else the velocity would cost four times as much as the block in int8.
        plain = [tensor for tensor in stepping if not compressible(tensor)]
        return plain, list(filter(compressible, stepping))
