"""Predicts the seconds of a local step over a link, and recommends a method. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from experiments.choosing.footprint import Footprint

BITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "tbit": 1e12}
LINK = re.compile(rf"(?P<number>[0-9.]+(e[+-]?[0-9]+)?)\s*(?P<unit>{'|'.join(BITS)})?", re.IGNORECASE)

CLEARLY = 1.1
"""Another method is named for its speed where it is so many times as fast."""

SMALLER = 0.8
"""Another method is named for its memory where it needs at most this share."""


def bytes_per_second(link: object) -> float:
    """The speed of a link that is written as ``100mbit``, ``1gbit``, or as a number of bytes per second.

    Raises:
        ValueError: for anything else, and unless it is above 0.
    """
    found = LINK.fullmatch(str(link).strip())
    try:
        number = float(found["number"]) if found else 0.0
    except ValueError:  # 1.2.3
        number = 0.0
    if found is None or not 0 < number < float("inf"):
        raise ValueError(
            f"link={link}: must be a number above 0 and kbit, mbit, gbit or tbit (per second), such as 100mbit or 1gbit, or a "
            "number of bytes per second, such as 12.5e6"
        )
    unit = found["unit"]
    return number * BITS[unit.lower()] / 8 if unit else number


@dataclass(frozen=True)
class Row:
    """The costs of a method over a link; a worker's, the slowest one's where they differ."""

    method: str
    parameters: int
    share: float  # of the network's parameters
    memory_bytes: int
    sent_bytes: float  # per local step, mean over workers
    compute_seconds: float  # of a local step
    communication_seconds: float  # per local step
    speed: float  # times as fast as DDP

    @property
    def seconds(self) -> float:
        """Seconds of a local step, with its share of the sync."""
        return self.compute_seconds + self.communication_seconds

    @property
    def communicating(self) -> float:
        """Share of communication in the time."""
        return self.communication_seconds / self.seconds


def predict(
    footprints: Sequence[Footprint], compute: Mapping[str, float], bandwidth: float, latency: float = 0.0
) -> list[Row]:
    """Seconds of each method: compute, then bytes / bandwidth and the latencies, as if nothing was hidden behind compute.

    Args:
        footprints: of the methods; DDP is among them.
        compute: seconds of forward, backward and optimizer step, by part of the network that is held.
        bandwidth: bytes per second that a worker can send.
        latency: seconds that a message takes beside its bytes.
    """
    times = {}
    for found in footprints:
        sync = found.slowest_bytes / bandwidth + found.messages * latency
        times[found.method] = (compute[found.part], sync / found.local_steps)
    whole = next(found.parameters for found in footprints if found.method == "ddp")
    ddp = sum(times["ddp"])
    rows = []
    for found in footprints:
        step, sync = times[found.method]
        sent = found.sync_bytes / found.local_steps
        share, speed = found.parameters / whole, ddp / (step + sync)
        rows.append(Row(found.method, found.parameters, share, found.memory_bytes, sent, step, sync, speed))
    return rows


def scaled(seconds: float, operations: Mapping[str, int]) -> dict[str, float]:
    """Seconds of a step with each part, from those with the whole network, by the number of operations."""
    return {part: seconds * count / operations["whole"] for part, count in operations.items()}


@dataclass(frozen=True)
class Advice:
    """The recommended method, and alternatives, by name."""

    method: str
    more_accurate: str | None = None
    faster: str | None = None
    smaller: str | None = None


def advise(rows: Sequence[Row], costs: Mapping[str, float], point: float) -> Advice:
    """Recommend the method with the best speed, after a fixed price for each point of accuracy that it costs.

    Args:
        rows: the methods; DDP, which costs nothing, is among them.
        costs: points of accuracy below DDP on equal samples, by method. A method of unknown cost is never taken, but
            named where it is faster.
        point: times as fast a method must be for each point that it costs; at 1 only speed counts.
    """
    known = {"ddp": 0.0, **costs}

    def worth(row: Row) -> tuple[float, float]:
        # Of equal ones, as where speed alone counts and nothing is sent, the one that costs the least.
        return row.speed / point ** known[row.method], -known[row.method]

    taken = max((row for row in rows if row.method in known), key=worth)
    fastest = max(rows, key=lambda row: row.speed)
    more_accurate = [row for row in rows if known.get(row.method, float("inf")) < known[taken.method]]
    return Advice(
        taken.method,
        max(more_accurate, key=worth).method if more_accurate else None,
        fastest.method if fastest.speed >= CLEARLY * taken.speed else None,
        _smaller(rows, taken),
    )


def _smaller(rows: Sequence[Row], taken: Row) -> str | None:
    least = min(rows, key=lambda row: row.memory_bytes)
    return least.method if least.memory_bytes < SMALLER * taken.memory_bytes else None


def recorded(row: Row) -> dict[str, Any]:
    """The row for a result file."""
    return {**asdict(row), "seconds": row.seconds}
