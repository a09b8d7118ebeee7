"""The watchdog's interface to the program around it. Standard library only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from resist_lightning.schedule.progress import Activity


@dataclass(frozen=True)
class Surroundings:
    """Callbacks by which the watchdog queries the program around it.

    Args:
        activity: this worker's activity, or None as long as there is no engine.
        store: the server of the store, in words.
        how_to_resume: a sentence for the user.
        how_ended: the end of process ``pid`` in words, as far as its parent knows; None if it may be running.
        orphaned: the end of the process without which this one must not run, in words; or empty.
        before_exit: called before the process is forced to exit.
    """

    activity: Callable[[], Activity | None]
    store: str
    how_to_resume: Callable[[], str]
    how_ended: Callable[[int], str | None] = field(default=lambda _: None)
    orphaned: Callable[[], str] = field(default=lambda: "")
    before_exit: Callable[[], None] = field(default=lambda: None)
