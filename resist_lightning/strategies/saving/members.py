"""Gathers the state of a worker of several members: their common part once, and each one's own part."""

from __future__ import annotations

import io
from typing import Any

import torch

from resist_lightning.comm.collective import Collective
from resist_lightning.state.host_copies import copied

_OF_EACH = ("host", "inputs")  # position in the data and random numbers; recorded batches


def gather_members(own: dict[str, Any], collective: Collective) -> dict[str, Any]:
    """The state of the worker, on its first member; the others' own part travels to it.

    Collective: every member of a worker must call this, in the same order.

    Args:
        own: this process's own resume state.
        collective: the workers and their members.
    """
    if collective.members == 1:
        return own
    buffer = io.BytesIO()
    torch.save({key: own[key] for key in _OF_EACH}, buffer)
    texts = collective.gather_inside(buffer.getvalue())
    return {**own, "members": [torch.load(io.BytesIO(text), weights_only=True) for text in texts]}


def of_member(own: dict[str, Any] | None, collective: Collective) -> dict[str, Any] | None:
    """The part of this process in the state of its worker; None if that had another number of members."""
    if own is None:
        return None
    of_each = own.get("members", [{}])
    if len(of_each) != collective.members:
        return None
    return {**own, **of_each[collective.member]}


def detached(own: dict[str, Any]) -> dict[str, Any]:
    """A state read with ``mapped=True``, with the parts that the run keeps copied to memory; it copies the rest."""
    kept = ("host", "members")
    return {**own, **copied({key: own[key] for key in kept if key in own})}
