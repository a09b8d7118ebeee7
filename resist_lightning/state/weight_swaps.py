"""Optimizers that exchange weights for evaluation, such as schedule-free ones: users call ``eval`` and ``train``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

_METHODS = ("eval", "train")


class SwappingOptimizers:
    """Lets ``eval()`` and ``train()`` of optimizers act on this worker's own weights, while a full model is seen too.

    The optimizer's state is that of this worker, so an exchange with the full model's weights would spoil both.

    Args:
        optimizers: the user's; those without the two methods are left alone.
        on_own_weights: calls a function while the module holds this worker's part. Collective.
    """

    def __init__(self, optimizers: Iterable[Any], on_own_weights: Callable[[Callable[[], Any]], None]) -> None:
        self._optimizers = list(optimizers)
        self._on_own_weights = on_own_weights
        self._caught: list[tuple[Any, str]] = []

    def add(self, optimizers: Iterable[Any]) -> None:
        """Name what else stands for the optimizers before the user."""
        self._optimizers += optimizers

    def catch(self) -> None:
        """From now on redirect the calls."""
        for optimizer in self._optimizers:
            if all(callable(getattr(optimizer, method, None)) for method in _METHODS):
                for method in _METHODS:
                    vars(optimizer)[method] = self._redirected(getattr(optimizer, method))
                    self._caught.append((optimizer, method))

    def release(self) -> None:
        """From now on let the calls through."""
        for optimizer, method in self._caught:
            del vars(optimizer)[method]
        self._caught = []

    def _redirected(self, usual: Callable[..., Any]) -> Callable[..., None]:
        def on_own_weights(*args: Any, **kwargs: Any) -> None:
            self._on_own_weights(lambda: usual(*args, **kwargs))

        return on_own_weights
