"""Predicts seconds of a local step over a link: by computing, bytes, bandwidth and overlap. Standard library only."""

from __future__ import annotations


def sync_seconds(link_bytes: float, gbit: float) -> float:
    """Seconds of a sync over full-duplex links.

    Args:
        link_bytes: of the worker that sends or receives the most.
        gbit: bandwidth of its link, in Gbit/s.
    """
    return link_bytes * 8 / gbit / 1e9


def step_seconds(compute: float, sync: float, local_steps: int, overlap: int) -> float:
    """Seconds of a local step, with its share of the wait for a sync.

    ::

        border                 end of the round
        ├ step ┬ step ┬ step ┤ waits ├
        ├─────────── sync ───────────┤

    Args:
        compute: seconds of a local step alone.
        sync: seconds of a sync alone.
        local_steps: of a round.
        overlap: local steps beside which the sync runs.
    """
    return compute + max(0.0, sync - overlap * compute) / local_steps
