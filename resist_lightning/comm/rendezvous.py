"""Compares the addresses of all processes through the store, before the group connects them.

Otherwise the others wait for an unreachable process until the timeout, and end with an error of torch only.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

from resist_lightning.comm.hosts import Place, first_of_hosts, judge, listen, this_place, try_to_reach, who_tries_whom

_READING_SECONDS = 5.0
_ANSWER_SECONDS = 10.0
_POLL_SECONDS = 0.1


class HostsCannotMeet(RuntimeError):
    """Processes cannot reach one another, or the store, or serve it; says what to set."""


def await_store(address: str, port: int, *, node: int, served: bool, by_torchrun: bool, timeout: timedelta) -> None:
    """Wait until the store answers, but only briefly where it never will.

    Args:
        address: of the store.
        port: of the store.
        node: number of this host; the store is on host 0, which does not connect to it here.
        served: whether the store is up before any worker starts, as that of torchrun's agent is.
        by_torchrun: whether torchrun has chosen the address.
        timeout: time for the name to be resolved.

    Raises:
        HostsCannotMeet: if the name cannot be resolved, or a store that is up already does not answer.
    """
    option = "--local-addr=ADDRESS for torchrun" if by_torchrun else "MASTER_ADDR=ADDRESS"

    def text() -> str:
        return (
            f"host {node} ({socket.gethostname()}) gets no answer from the store of the first host at "
            f"{with_port(address, port)}: {failure}. Set {option} on the first host to the address at which the others "
            "reach it, and let no firewall block them."
        )

    resolve = partial(_ask, address, port, connect=False)
    failure = _retry(resolve, _ANSWER_SECONDS)
    if failure:
        # In Kubernetes and SLURM the first host's name may be known only some time after the others have started.
        sys.stderr.write(f"{text()} Waiting, because the name may be known later.\n")
        failure = _retry(resolve, timeout.total_seconds() - _ANSWER_SECONDS)
    if failure:
        raise HostsCannotMeet(text())
    if node > 0:
        failure = _retry(partial(_ask, address, port, connect=True), _ANSWER_SECONDS)
    if failure and served:
        raise HostsCannotMeet(text())
    if failure:  # worker 0 serves it, and may be late
        sys.stderr.write(f"{text()} Waiting, because it may still start.\n")


def _retry(attempt: Callable[[], str], seconds: float) -> str:
    """Call ``attempt`` until it returns no failure, or the time is over; returns the last failure."""
    deadline = time.monotonic() + seconds
    while (failure := attempt()) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return failure


def with_port(address: str, port: int) -> str:
    """An address and a port in one, with brackets for IPv6."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _ask(address: str, port: int, *, connect: bool) -> str:
    """Resolve a name, and connect to a store there; returns the reason of a failure."""
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        return f"the name {address!r} cannot be resolved here ({error.strerror})"
    try:
        if connect:
            socket.create_connection((address, port), timeout=_ANSWER_SECONDS / 2).close()
    except OSError as error:
        where = ", ".join(dict.fromkeys(str(each[4][0]) for each in found))
        return f"{error} (at {where})" if where != address else str(error)
    return ""


def check_hosts(store: Any, rank: int, processes: int, *, nccl: bool) -> None:
    """Check that the processes of several hosts can reach one another. Collective: every process must call this.

    Args:
        store: of the group to be made, under a name that no other group has.
        rank: of this process.
        processes: number of processes.
        nccl: whether they will use NCCL; else gloo.

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
    """Compare the places of all processes, and raise on all of them if they cannot connect. Collective.

    Only rank 0 reads all of them: each other process reads three values from the store, whatever their number.
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
    """Wait a little for these keys, then report the ranks that are missing: their errors cannot reach this host."""
    deadline = time.monotonic() + _ANSWER_SECONDS
    pause = _POLL_SECONDS / 20  # most come together
    while not store.check(names):
        if time.monotonic() > deadline:
            late = [str(rank) for rank, name in enumerate(names) if not store.check([name])]
            shown = ", ".join(late[:8]) + (", ..." if len(late) > 8 else "")
            sys.stderr.write(
                f"rank 0 waits for {len(late)} of {len(names)} processes that have not joined yet: rank {shown}. Their "
                "errors, if any, are printed on their hosts.\n"
            )
            return
        time.sleep(pause)
        pause = min(2 * pause, _POLL_SECONDS)


def _raise(store: Any, problem: str, processes: int, rank: int) -> None:
    """Raise an error on all processes; the one that serves the store goes last."""
    if not problem:
        return
    store.add("told", 1)
    deadline = time.monotonic() + _READING_SECONDS
    while rank == 0 and store.add("told", 0) < processes and time.monotonic() < deadline:
        time.sleep(0.05)
    raise HostsCannotMeet(problem)
