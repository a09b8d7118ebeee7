"""Checks the user's forward hooks on layers whose neurons are divided: a trace sees no hooks of torch.nn's modules."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from resist_lightning.errors import LayerSelectionError
from resist_lightning.methods.ist.layout import NeuronLayout
from resist_lightning.methods.ist.network.neurons import Passed
from resist_lightning.state.random_state import random_numbers_apart, random_state, set_random_state


@dataclass(eq=False)
class HookCheck:
    """Stands in the place of a forward hook, until its first call in a subnet.

    A hook that only reads is called once, as ever. One that changes the value is called twice more, with values that
    are equal in the first half of the neurons: there the results must be equal too, or it combines neurons.

    Args:
        passed: the module and the side of it where the neurons are seen.
        module: that module.
        key: of the hook in the module's table.
        hook: the user's.
        width: number of neurons that this worker holds.
        called: whether the hook has been called, and needs no check any more.
    """

    passed: Passed
    module: nn.Module
    key: int
    hook: Callable[..., Any]
    width: int
    called: bool = False

    def begin(self) -> None:
        """Take the hook's place."""
        self._table()[self.key] = self

    def end(self) -> None:
        """Give the hook its place back, unless the user has removed it."""
        table = self._table()
        if isinstance(table.get(self.key), HookCheck):
            table[self.key] = self.hook

    def __call__(self, module: nn.Module, *call: Any) -> Any:
        """Call the hook, and check what it does.

        Raises:
            LayerSelectionError: if it combines neurons.
        """
        value = self._value_in(call)
        # A compiled part keeps this call for good, and must be as without the check.
        if torch.compiler.is_compiling() or not isinstance(value, Tensor) or value.is_inference():
            return self.hook(module, *call)
        self.called = True
        self.end()
        before, version, random = value.detach().clone(), value._version, random_state()
        returned = self.hook(module, *call)
        if returned is None and value._version == version:
            return None
        changed = before.clone()
        changed.narrow(self.passed.dimension, *self._second_half(before)).mul_(10).add_(10)
        with random_numbers_apart(), torch.enable_grad():
            results = []
            for tried in (before, changed):
                set_random_state(random)
                results.append(self._try(module, call, tried))
        self._compare(before, *results)
        return returned

    def _table(self) -> dict[int, Callable[..., Any]]:
        return self.module._forward_pre_hooks if self.passed.before else self.module._forward_hooks

    def _value_in(self, call: tuple[Any, ...]) -> Any:
        """The tensor with the neurons among a hook's arguments behind the module; None where it is given by name."""
        if not self.passed.before:
            return call[-1]
        return call[0][0] if call[0] else None

    def _try(self, module: nn.Module, call: tuple[Any, ...], value: Tensor) -> Any:
        """The result of the hook for another value."""
        # As in training, where a hook may register one for the gradient, or write in place.
        tried = value.requires_grad_(value.is_floating_point()).clone()
        if self.passed.before:
            args, *options = call
            returned = self.hook(module, (tried, *args[1:]), *options)
            # It may return the arguments, with those by name, or the one argument.
            while isinstance(returned, tuple):
                returned = returned[0]
        else:
            returned = self.hook(module, *call[:-1], tried)
        return tried if returned is None else returned

    def _second_half(self, value: Tensor) -> tuple[int, int]:
        """The first entry of the second half of the neurons, and the number of entries in it."""
        size = value.shape[self.passed.dimension]
        first = self.width // 2 * (size // self.width)  # flattened, a neuron has several entries
        return first, size - first

    def _compare(self, before: Tensor, one: Any, other: Any) -> None:
        start, _ = self._second_half(before)
        halves = []
        for result in (one, other):
            if not isinstance(result, Tensor) or result.shape != before.shape:
                self._refuse("returns something of another shape")
            halves.append(result.detach().narrow(self.passed.dimension, 0, start).nan_to_num())
        if not torch.equal(*halves):
            self._refuse("computes a neuron's value from those of others")

    def _refuse(self, problem: str) -> NoReturn:
        name = getattr(self.hook, "__qualname__", type(self.hook).__name__)
        kind = "forward pre-hook" if self.passed.before else "forward hook"
        raise LayerSelectionError(
            f"the {kind} {name} of {self.passed.module!r} ({type(self.module).__name__}) {problem}, and a worker has "
            f"only {self.width} of these neurons: subnets would train another function than the full model computes. "
            "Leave the layer whole by naming the others with `layers`, or remove the hook."
        )


def check_hooks(layout: NeuronLayout, widths: list[int], known: Collection[int]) -> list[HookCheck]:
    """Put a check in the place of each hook that sees a part of a layer's neurons.

    Args:
        layout: the division.
        widths: of each hidden layer, the number of neurons that this worker holds.
        known: keys of the hooks that have been checked.
    """
    checks: dict[int, HookCheck] = {}
    for passed in layout.neurons.passed:
        width = widths[passed.layer]
        # A single neuron is combined with none.
        if not 1 < width < layout.neurons.layers[passed.layer].width:
            continue
        module = layout.module.get_submodule(passed.module)
        table = module._forward_pre_hooks if passed.before else module._forward_hooks
        for key, hook in table.items():
            # The neurons of several layers may pass one module; those of the first come first.
            if key not in known and key not in checks:
                checks[key] = HookCheck(passed, module, key, hook, width)
    for check in checks.values():
        check.begin()
    return list(checks.values())
