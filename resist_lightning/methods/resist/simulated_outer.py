"""The outer optimizer of the reference simulator: one step for all workers, by name of the parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from resist_lightning.comm.quantize import Quantizer, compressible, noise_for
from resist_lightning.comm.tensors import wide_dtype
from resist_lightning.methods.residual import Block
from resist_lightning.methods.resist.config import Config
from resist_lightning.methods.simulation import flat_of, pieces_of
from resist_lightning.schedule.transfers import Transfer


class SimulatedOuter:
    """Takes the steps of the outer optimizer with the means of the simulated workers.

    Args:
        config: the settings.
        workers: number of workers.
    """

    def __init__(self, config: Config, workers: int) -> None:
        self._config = config
        self._rate, self._momentum = config.outer_rate, config.outer_momentum_of(workers)
        self._start: dict[str, Tensor] = {}  # of the parameters that trained when the round began
        self._velocities: dict[str, Tensor] = {}

    def begin_round(self, module: nn.Module, agreed: Mapping[str, Tensor]) -> None:
        """Note where the next steps of the parameters that train now begin: at values that all workers share."""
        if self._config.outer == "none":
            return
        earlier = {name: start for name, start in self._start.items() if name not in agreed}  # in other fragments
        training = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        self._start = earlier | {name: agreed[name] for name in training & agreed.keys()}
        for frozen in agreed.keys() - training:
            self._velocities.pop(frozen, None)

    def step(self, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The means after an outer step, by name: each must be given once in a round."""
        return {name: self._step(name, mean) for name, mean in means.items()}

    def _step(self, name: str, mean: Tensor) -> Tensor:
        if name not in self._start:
            return mean
        rate, momentum = self._rate, self._momentum
        wide = mean.to(wide_dtype(mean.dtype))
        change = self._start[name].to(wide.dtype) - wide
        velocity = momentum * self._velocities.get(name, torch.zeros_like(change)) + change
        self._velocities[name] = velocity
        return (wide - ((rate - 1) * change + rate * momentum * velocity)).to(mean.dtype)

    def send(self, wire: Quantizer, round: int, blocks: Sequence[Block], transfers: Sequence[Transfer]) -> None:
        """Round the velocities of blocks that travel, once for all receivers."""
        sources = {transfer.block: transfer.source for transfer in transfers}
        for index, source in sources.items():
            own: dict[str, Tensor] = {}
            for name, tensor in blocks[index].tensors().items():
                if name in self._velocities and compressible(tensor):
                    own[name] = self._velocities[name]
            if own:
                flat = flat_of(own)
                noise = noise_for(self._config.seed, round, len(blocks) + index, source, flat.device)
                self._velocities.update(pieces_of(wire.for_values.through(flat, noise), own))
