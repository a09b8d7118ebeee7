"""What the watchdog must know of the program around it. Standard library only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from resist_lightning.schedule.progress import Activity


@dataclass(frozen=True)
class Surroundings:
    """Callbacks through which the watchdog learns about the program around it.

    Args:
        activity: what this worker is doing, or None as long as there is no engine.
        store: who serves the store, in words.
        how_to_resume: a sentence for the user.
        how_ended: how the process ``pid`` ended, as far as its parent knows; None if it may be running.
        orphaned: in words, which process has ended without which this one must not run; or empty.
        before_exit: called before the process is ended hard.
    """

    activity: Callable[[], Activity | None]
    store: str
    how_to_resume: Callable[[], str]
    how_ended: Callable[[int], str | None] = field(default=lambda _: None)
    orphaned: Callable[[], str] = field(default=lambda: "")
    before_exit: Callable[[], None] = field(default=lambda: None)
