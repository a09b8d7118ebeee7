"""What a value of a configuration may be, besides its type."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass(frozen=True)
class Limit:
    """What a value must be besides its type: ``least`` is allowed, ``above`` not; ``hint`` is the way out."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    choices: tuple[Any, ...] = ()
    hint: str = ""


def limited(**limits: Any) -> Any:
    """A field without default, with a `Limit`."""
    return field(default=MISSING, metadata={"limit": Limit(**limits)})
