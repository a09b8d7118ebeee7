"""Compares through the store where the processes are, before the group connects them all.

A process that the others cannot reach would be waited for until the timeout, and by then only torch's words are left.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

from resist_lightning.comm.hosts import Place, first_of_hosts, judge, listen, this_place, try_to_reach, who_tries_whom

_READING_SECONDS = 5.0
_ANSWER_SECONDS = 10.0
_POLL_SECONDS = 0.1


class HostsCannotMeet(RuntimeError):
    """The processes of several hosts cannot reach one another, or the store; says what to set."""


def await_store(address: str, port: int, *, node: int, served: bool, by_torchrun: bool) -> None:
    """Wait until the store answers, but not for long where it never will.

    Args:
        address: of the store.
        port: of the store.
        node: number of this host; 0 is the one with the store, which is not asked from there.
        served: whether somebody serves the store before any worker starts, as torchrun's agent does.
        by_torchrun: whether torchrun has chosen the address.

    Raises:
        HostsCannotMeet: if the name cannot be resolved, or a store that is served already does not answer.
    """
    deadline = time.monotonic() + _ANSWER_SECONDS
    while True:
        resolved, failure = _ask(address, port, connect=node > 0)
        if not failure:
            return
        if time.monotonic() > deadline:
            break
        time.sleep(_POLL_SECONDS)
    option = "--local-addr=ADDRESS for torchrun" if by_torchrun else "MASTER_ADDR=ADDRESS"
    text = (
        f"host {node} ({socket.gethostname()}) gets no answer from the store of the first host at "
        f"{with_port(address, port)}: {failure}. Set {option} on the first host, to the address at which the others "
        "reach it, and let them reach it there."
    )
    if served or not resolved:
        raise HostsCannotMeet(text)
    # Worker 0 serves it, and may be late.
    sys.stderr.write(f"{text} Waiting, as it may come yet.\n")


def with_port(address: str, port: int) -> str:
    """An address and a port in one, with brackets for IPv6."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _ask(address: str, port: int, *, connect: bool) -> tuple[bool, str]:
    """Whether the name was resolved, and why nobody answers; the latter is empty if somebody does."""
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        return False, f"the name {address!r} cannot be resolved here ({error.strerror})"
    if not connect:
        return True, ""
    try:
        socket.create_connection((address, port), timeout=_ANSWER_SECONDS / 2).close()
    except OSError as error:
        where = ", ".join(dict.fromkeys(str(each[4][0]) for each in found))
        return True, f"{error} (at {where})" if where != address else str(error)
    return True, ""


def check_hosts(store: Any, rank: int, processes: int, *, nccl: bool) -> None:
    """Check that the processes of several hosts can reach one another. Collective: every process must call this.

    Args:
        store: of the group that is to be made, under a name that no other group has.
        rank: of this process.
        processes: how many there are.
        nccl: whether they will talk by NCCL; else by gloo.

    Raises:
        HostsCannotMeet: on every process, naming the host, the variable, and what to set it to.
    """
    place = this_place(os.environ, nccl=nccl)
    listener = listen(place)
    try:
        port = listener.getsockname()[1] if listener is not None else 0
        compare_places(store, rank, processes, Place(**{**vars(place), "port": port}))
    finally:
        if listener is not None:
            listener.close()


def compare_places(store: Any, rank: int, processes: int, place: Place) -> None:
    """Tell the others this process's place, and raise on all of them if that cannot work. Collective.

    Rank 0 alone reads them all: the store serves each process three answers, however many there are.
    """
    store.set(f"place/{rank}", place.to_json())
    if rank == 0:
        names = [f"place/{each}" for each in range(processes)]
        _note_who_is_late(store, names)
        places = [Place.from_json(text.decode()) for text in store.multi_get(names)]
        problem = judge(places)
        store.set("verdict", problem)
        _raise(store, problem, processes, rank)
        pairs = who_tries_whom(first_of_hosts(places))
        tries = {rank: places[other].to_json() for rank, other in pairs.items() if places[other].port}
        store.set("tries", json.dumps(tries))
    else:
        _raise(store, store.get("verdict").decode(), processes, rank)
    tries = json.loads(store.get("tries"))
    if not tries:
        return
    if str(rank) in tries:
        store.set(f"tried/{rank}", try_to_reach(Place.from_json(tries[str(rank)])))
    if rank == 0:
        results = [text.decode() for text in store.multi_get([f"tried/{each}" for each in tries])]
        store.set("reached", next((text for text in results if text), ""))
    _raise(store, store.get("reached").decode(), processes, rank)


def _note_who_is_late(store: Any, names: Sequence[str]) -> None:
    """Wait a little for these keys, and then say whose are not there: no error of theirs may reach this host."""
    deadline = time.monotonic() + _ANSWER_SECONDS
    pause = _POLL_SECONDS / 20  # most come together
    while not store.check(names):
        if time.monotonic() > deadline:
            late = [str(rank) for rank, name in enumerate(names) if not store.check([name])]
            shown = ", ".join(late[:8]) + (", ..." if len(late) > 8 else "")
            sys.stderr.write(
                f"rank 0 waits for {len(late)} of {len(names)} processes, which have not come yet: rank {shown}. Their "
                "errors, if any, are printed on their hosts.\n"
            )
            return
        time.sleep(pause)
        pause = min(2 * pause, _POLL_SECONDS)


def _raise(store: Any, problem: str, processes: int, rank: int) -> None:
    """Raise an error that all processes have been told. The one that serves the store goes last."""
    if not problem:
        return
    store.add("told", 1)
    deadline = time.monotonic() + _READING_SECONDS
    while rank == 0 and store.add("told", 0) < processes and time.monotonic() < deadline:
        time.sleep(0.05)
    raise HostsCannotMeet(problem)
