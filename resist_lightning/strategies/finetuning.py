"""Fine-tuning: restores the frozen parameters and layers of a resumed run.

Lightning's callbacks unfreeze a layer when its epoch begins, and at no other time. So in a run that is resumed later it
would still be frozen, unless the checkpoint has the changes since the run began.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

_OF_MODULES = ("training", "track_running_stats")


class ModuleModes:
    """Tracks the program's switches during training: frozen parameters, and modules in evaluation mode."""

    def __init__(self) -> None:
        self._module: nn.Module = nn.Module()
        self._first: dict[str, bool] = {}
        self._before_validation: dict[str, bool] | None = None

    def begin(self, module: nn.Module) -> None:
        """Start before the first batch: whatever is switched from now on is a change."""
        self._module, self._first = module, _modes(module)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Inside, report the modes from before: Lightning switches all modules for a validation, and back."""
        self._before_validation = _modes(self._module)
        try:
            yield
        finally:
            self._before_validation = None

    def changes(self) -> dict[str, bool]:
        """The modes that differ from the beginning, by ``name.attribute``; empty before :meth:`begin`."""
        now = self._before_validation or _modes(self._module)
        return {name: value for name, value in now.items() if self._first.get(name, value) != value}

    def apply(self, changes: Mapping[str, bool]) -> None:
        """Apply the :meth:`changes` of the run that is resumed."""
        owners: dict[str, Any] = dict(self._module.named_modules())
        owners.update(self._module.named_parameters())  # no parameter has the name of a module
        for name, value in changes.items():
            owner, _, attribute = name.rpartition(".")
            if owner in owners:
                setattr(owners[owner], attribute, value)


def not_in_optimizer(optimizer: Optimizer, parameters: Iterable[Tensor]) -> list[Tensor]:
    """Replaces ``BaseFinetuning.filter_on_optimizer``, which compares values: an absent block has none."""
    parameters = list(parameters)  # it may be a generator, and is needed twice
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    new = [parameter for parameter in parameters if id(parameter) not in known]
    if len(new) < len(parameters):
        rank_zero_warn(
            f"{len(parameters) - len(new)} of the {len(parameters)} parameters that were to be added to "
            f"{type(optimizer).__name__} are already in one of its groups, and stay there. At first give the optimizer "
            "only parameters that train from the beginning: [p for p in self.parameters() if p.requires_grad]."
        )
    return new


def _modes(module: nn.Module) -> dict[str, bool]:
    found = {f"{name}.requires_grad": parameter.requires_grad for name, parameter in module.named_parameters()}
    for name, child in module.named_modules():
        attributes = vars(child)
        for attribute in _OF_MODULES:
            if attribute in attributes:  # only batch norm tracks statistics
                found[f"{name}.{attribute}"] = bool(attributes[attribute])
    return found
