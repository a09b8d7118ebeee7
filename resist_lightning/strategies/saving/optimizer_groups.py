"""The optimizers' part of Lightning's checkpoints: parameter groups; their state is in each worker's own file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.optim import Optimizer

from resist_lightning.state.optimizer_match import CLASS, check_fits
from resist_lightning.state.unmade import is_unmade, load_optimizer_state
from resist_lightning.strategies.local_steps import unwrapped


def groups_of(optimizer: Optimizer) -> dict[str, Any]:
    """The state dict of an optimizer without its state."""
    optimizer = unwrapped(optimizer)
    return {**optimizer.state_dict(), "state": {}, CLASS: type(optimizer).__name__}


def load_optimizers(strategy: Any, checkpoint: Mapping[str, Any], usual: Callable[[Mapping[str, Any]], None]) -> None:
    """Load the optimizers' states from another strategy's checkpoint; ours have only their parameter groups.

    Args:
        strategy: of this worker.
        checkpoint: Lightning's.
        usual: Lightning's way to load them, for a module that has memory.

    Raises:
        CheckpointError: if they do not fit the optimizers.
    """
    optimizers = [unwrapped(optimizer) for optimizer in strategy.optimizers]
    pairs = list(zip(optimizers, checkpoint["optimizer_states"], strict=False))
    for optimizer, state in pairs:
        check_fits(optimizer, state)
    if not is_unmade(strategy.lightning_module):
        usual(checkpoint)
        return
    for optimizer, state in pairs:
        load_optimizer_state(optimizer, state, strategy.root_device)
