"""The header of every sync: the state that all workers must agree on before they mix weights. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from enum import IntEnum

from resist_lightning.errors import WorkersDisagree, process_name


class Purpose(IntEnum):
    """The purpose of a handshake."""

    START = 0
    SYNC = 1
    EVALUATION = 2
    CHECKPOINT = 3
    FINISH = 4
    HOST = 5


@dataclass(frozen=True)
class Header:
    """A worker's state at the beginning of a sync, compared before weights are mixed.

    Args:
        purpose: a :class:`Purpose`.
        round: its round.
        step: its local steps in the round.
        stop: whether it was asked to stop.
        layout: a digest of its blocks, shapes and settings.
        round_steps: local steps of its round; of the next one, where this one is complete.
    """

    purpose: int
    round: int
    step: int
    stop: int
    layout: int
    round_steps: int


def check_headers(headers: Sequence[Header], members: int = 1) -> None:
    """Compare the headers of all processes.

    Args:
        headers: by rank.
        members: processes of each worker.

    Raises:
        WorkersDisagree: naming each field that differs, with every worker's value.
    """
    differing = []
    for field in fields(Header):
        values = [getattr(header, field.name) for header in headers]
        if len(set(values)) > 1:
            differing.append(f"{field.name}: {_by_process(field.name, values, members)}")
    if not differing:
        return
    if len({header.round_steps for header in headers}) > 1:
        differing.append(
            "`local_steps` derives the length of a round from the step and the learning rate, which must be the same "
            "on all workers: log the metric of ReduceLROnPlateau with sync_dist=True, or step schedules by epochs"
        )
    raise WorkersDisagree(
        f"workers reached a sync in different states ({'; '.join(differing)}). No weights were mixed. Likely causes: "
        "one worker stopped, ran out of data, or skipped batches or steps (a GradScaler of your own) on its own; a "
        "loader of unknown length that ends at different steps; or workers started with different code, models or "
        "settings."
    )


def header_numbers(header: Header) -> list[float]:
    """The header as numbers, to be sent; all fit into a float64."""
    return [float(value) for value in astuple(header)]


def read_header(numbers: Sequence[float]) -> Header:
    """The header from received numbers."""
    return Header(*(int(number) for number in numbers[: len(fields(Header))]))


def _by_process(field: str, values: Sequence[int], members: int) -> str:
    shown = []
    for rank, value in enumerate(values):
        text = Purpose(value).name.lower() if field == "purpose" else str(value)
        shown.append(f"{process_name(rank, members)} {text}")
    return ", ".join(shown)
