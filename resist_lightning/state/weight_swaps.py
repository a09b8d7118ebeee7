"""Serves optimizers that swap weights for evaluation by ``eval()`` and ``train()``, such as schedule-free ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

_METHODS = ("eval", "train")


class SwappingOptimizers:
    """Lets ``eval()`` and ``train()`` act on this worker's own weights, even while the module is the full model.

    The optimizer's state belongs to this worker's weights: a swap with those of the full model would corrupt both.

    Args:
        optimizers: the user's optimizers; those without the two methods are left alone.
        on_own_weights: calls a function while the module holds this worker's part. Collective.
        alone: whether others take no part in an evaluation, so that ``on_own_weights`` cannot be called in one.
    """

    def __init__(
        self, optimizers: Iterable[Any], on_own_weights: Callable[[Callable[[], Any]], None], *, alone: bool = False
    ) -> None:
        self._alone = alone
        self._optimizers = list(optimizers)
        self._on_own_weights = on_own_weights
        self._caught: list[tuple[Any, str]] = []

    def add(self, optimizers: Iterable[Any]) -> None:
        """Include wrappers by which the user reaches the optimizers."""
        self._optimizers += optimizers

    def catch(self) -> None:
        """Begin to redirect the calls."""
        for optimizer in self._optimizers:
            if not all(callable(getattr(optimizer, method, None)) for method in _METHODS):
                continue
            for method in _METHODS:
                usual = getattr(optimizer, method)
                vars(optimizer)[method] = self._redirected(usual)  # hides the class's own
                self._caught.append((optimizer, method))

    def release(self) -> None:
        """Stop redirecting the calls."""
        for optimizer, method in self._caught:
            del vars(optimizer)[method]
        self._caught = []

    def _redirected(self, usual: Callable[..., Any]) -> Callable[..., None]:
        def on_own_weights(*args: Any, **kwargs: Any) -> None:
            if self._alone:
                raise RuntimeError(
                    "an optimizer's eval() or train() within an evaluation changes the weights of all workers, and "
                    "evaluate_on='first' leaves them out of it. Call it in on_validation_start and on_validation_end, "
                    "or set evaluate_on='all'."
                )
            self._on_own_weights(lambda: usual(*args, **kwargs))

        return on_own_weights
