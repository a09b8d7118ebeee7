"""Replaces methods of Lightning's objects for the time of one ``fit``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Patches:
    """Replaced attributes of objects and classes, which :meth:`remove` puts back."""

    def __init__(self) -> None:
        self._undo: list[tuple[Any, str, Any]] = []

    def replace(self, owner: Any, name: str, method: Any) -> None:
        """Have ``owner`` use ``method`` until :meth:`remove`."""
        self._undo.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, method)

    def remove(self) -> None:
        """Put the originals back."""
        # The newest first: something that was replaced twice gets its first original back.
        for owner, name, original in reversed(self._undo):
            if original is None:  # the owner had none of its own, and its class still has it
                delattr(owner, name)
            else:
                setattr(owner, name, original)
        self._undo = []


def do_nothing(*_: Any, **__: Any) -> None:
    """A no-op in the place of a hook, or of a message."""


def after(first: Callable[[], object], usual: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls ``first``, then ``usual``."""

    def both(*args: Any, **kwargs: Any) -> Any:
        first()
        return usual(*args, **kwargs)

    return both
