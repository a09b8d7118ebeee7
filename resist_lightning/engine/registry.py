"""What a run divides its model by follows from the kind of its settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from resist_lightning.comm.collective import Collective
from resist_lightning.engine.full_model import bare
from resist_lightning.methods.auxnet.config import StageConfig
from resist_lightning.methods.auxnet.layout import StageLayout
from resist_lightning.methods.auxnet.sync import StageSync
from resist_lightning.methods.config import CommonConfig
from resist_lightning.methods.ist.config import NeuronConfig
from resist_lightning.methods.ist.layout import NeuronLayout
from resist_lightning.methods.ist.sync import NeuronSync
from resist_lightning.methods.layout import Layout
from resist_lightning.methods.resist.config import Config
from resist_lightning.methods.resist.layout import BlockLayout
from resist_lightning.methods.resist.sync import BlockSync
from resist_lightning.methods.sync import Sync
from resist_lightning.state.optimizer_state import OptimizerStates
from resist_lightning.state.timing import Seconds


def make_layout(module: nn.Module, config: CommonConfig, workers: int, optimizers: Sequence[Optimizer] = ()) -> Layout:
    """The parts of a module.

    Args:
        module: the user's.
        config: the settings.
        workers: how many there are.
        optimizers: the user's; none if they are not known yet.

    Raises:
        ValueError: if the settings do not fit the module; see the layouts.
    """
    refuse_lazy(module)
    with bare(module):
        if isinstance(config, NeuronConfig):
            return NeuronLayout(module, config, workers)
        if isinstance(config, StageConfig):
            return StageLayout(module, config, workers)
        assert isinstance(config, Config)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        trained = {id(parameter) for group in groups for parameter in group["params"]}
        return BlockLayout(module, config, workers, trained or None)


def refuse_lazy(module: nn.Module) -> None:
    """Refuse a module with tensors that get their shapes from its first input.

    Raises:
        ValueError: with their names.
    """
    tensors = [*module.named_parameters(), *module.named_buffers()]
    lazy = [name for name, tensor in tensors if is_lazy(tensor)]
    if lazy:
        named = f"{', '.join(lazy[:4])}{f' and {len(lazy) - 4} more' if len(lazy) > 4 else ''}"
        raise ValueError(
            f"{named}: no shape yet. Tensors of lazy modules, such as nn.LazyLinear, get their shapes from the first "
            "input, and workers must know them before they share the model. Call the module once on an input, in "
            "torch.no_grad(), before the training starts; or take modules whose sizes are given, such as nn.Linear."
        )


def make_sync(
    layout: Layout, states: OptimizerStates, collective: Collective, device: torch.device, seconds: Seconds
) -> Sync[Any, Any]:
    """A worker's side of the syncs."""
    if collective.worker == 0:
        states.warn_about_settings(layout.config.momentum, layout.config.local_steps)
    if isinstance(layout, NeuronLayout):
        return NeuronSync(layout, states, collective, device, seconds)
    if isinstance(layout, StageLayout):
        return StageSync(layout, states, collective, device, seconds)
    assert isinstance(layout, BlockLayout)
    return BlockSync(layout, states, collective, device, seconds)
