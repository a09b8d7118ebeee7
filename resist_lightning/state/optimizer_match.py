"""Decides whether saved state fits an optimizer, which may be of another class than the one that was saved."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from resist_lightning.errors import CheckpointError

CLASS = "class"
"""Key of the optimizer's class in saved state. Other strategies and earlier versions save none."""

_FROM_WEIGHTS = (
    "begin a new training from its weights: load them into the module, and call `fit` without `ckpt_path` (in a plain "
    "loop, call `restore` without the worker's own state)."
)


def check_fits(optimizer: Optimizer, saved: Mapping[str, Any], missing: Collection[str] = ()) -> None:
    """Check that saved state fits an optimizer. Warn where it is of another class and fits all the same.

    Torch takes hyperparameters from the checkpoint, so those of the constructor have no effect, and one that is not
    saved is gone: the first step would end with a KeyError.

    Args:
        optimizer: the user's.
        saved: its state dict, with the class under :data:`CLASS`.
        missing: names of the state that the optimizer needs and ``saved`` does not have.

    Raises:
        CheckpointError: if it does not fit.
    """
    here, there = type(optimizer).__name__, saved.get(CLASS)
    if here == there:
        return  # what it lacks was added by a newer version of the class, which then supplies it
    lacks = [*_missing_numbers(optimizer, saved), *sorted(missing)]
    written_with = there or "another optimizer"
    if lacks:
        raise CheckpointError(
            f"the checkpoint was written with {written_with}, and does not fit {here}: it has no {', '.join(lacks)}. "
            f"Resume with {there or 'the optimizer that it was written with'}; or {_FROM_WEIGHTS}"
        )
    if there is not None:
        warnings.warn(
            f"{here} resumes from the state of {there}, with the hyperparameters of the checkpoint: those given to "
            f"{here} have no effect.",
            stacklevel=1,  # the same place for all callers, so that it is shown once
        )


def check_groups(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Check that saved groups have as many parameters as those of an optimizer: state goes to them by position.

    Raises:
        CheckpointError: if they have not.
    """
    here, there = _sizes(optimizer.param_groups), _sizes(saved["param_groups"])
    if here != there:
        raise CheckpointError(
            f"the parameter groups of {type(optimizer).__name__} have {here} parameters, and those of the checkpoint "
            f"{there}. Make the groups as they were; or {_FROM_WEIGHTS}"
        )


def _missing_numbers(optimizer: Optimizer, saved: Mapping[str, Any]) -> list[str]:
    """The hyperparameters of an optimizer that its saved groups lack.

    Not the switches, such as ``fused``: newer versions of torch have added some, and supply them.
    """
    defaults = getattr(optimizer, "defaults", {}).items()  # a wrapper may have none
    numbers = {name for name, value in defaults if value is not None and not isinstance(value, bool)}
    lacks: set[str] = set()
    for group in saved.get("param_groups", ()):  # a class may have a form of its own
        lacks |= numbers - group.keys()
    return sorted(lacks)


def _sizes(groups: Sequence[Mapping[str, Any]]) -> list[int]:
    """The number of parameters in each group."""
    return [len(group["params"]) for group in groups]
