"""Joins and leaves torch.distributed's default group, and gives access to its store."""

from __future__ import annotations

import os
import threading
import weakref
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeAlias, cast

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_group, _get_default_store, _world
from torch.distributed.rendezvous import rendezvous

from resist_lightning.comm.backends import NCCL, nccl_variables, uses_nccl
from resist_lightning.comm.rendezvous import HostsCannotMeet, await_store, check_hosts, with_port
from resist_lightning.comm.sockets import cut_connections, open_sockets, recording, recording_group
from resist_lightning.comm.torchrun import attempt, shares_store, started_by_torchrun
from resist_lightning.errors import first_line

_TCPStore: Any = dist.TCPStore  # type: ignore[attr-defined]
_ABORT_SECONDS = 10.0  # after which an abort is no longer waited for


def group_exists() -> bool:
    """Whether torch.distributed's default group exists."""
    return dist.is_available() and dist.is_initialized()


def bound_device() -> torch.device | None:
    """The device to which the default group is bound, if there is a group, and it is."""
    if not group_exists():
        return None
    group: Any = _get_default_group()  # torch's stubs do not know all of it
    bound: torch.device | None = group.bound_device_id
    return bound


StoreConnection: TypeAlias = Store

_stores: dict[tuple[int, str, int], Store] = {}
_store_sockets: set[str] = set()
# By the number of workers, too: one that tests alone in between must not lose count of the others' groups.
_groups_joined: Counter[tuple[int, str, int, int]] = Counter()


def join_group(
    backend: str,
    *,
    address: str,
    port: int,
    worker: int,
    workers: int,
    timeout: timedelta,
    device: torch.device | None = None,
    node: int = 0,
) -> None:
    """Make torch.distributed's default group. Collective: every worker must call this, equally often.

    Successive groups of a process share one store, each under a name of its own. With a store that ends with its group,
    or in which the next group reuses the old names (under torchrun), a fast worker reads where the others *were*, and
    its connection is refused.

    Args:
        backend: ``"gloo"`` or ``"nccl"``.
        address: of worker 0's host.
        port: where worker 0, or torchrun, serves the store.
        worker: this worker's number.
        workers: number of workers.
        timeout: of creating the group, and of every operation in it.
        device: of this worker, where the backend should bind to it.
        node: number of this worker's host.

    Raises:
        HostsCannotMeet: if processes of another host cannot be reached, or the store cannot be served, within seconds;
            or if the name of worker 0's host cannot be resolved within ``timeout``.
        RuntimeError: if the workers cannot join one another, with what to check.
    """
    by_torchrun = started_by_torchrun()
    if uses_nccl(backend):
        os.environ.update(nccl_variables(os.environ, by_torchrun=by_torchrun))
    if worker == 0:
        node = 0  # its host has the store; MPI may give the host another number
    try:
        await_store(address, port, node=node, served=shares_store(), by_torchrun=by_torchrun, timeout=timeout)
        _join(backend, address, port, worker, workers, timeout, device)
    except HostsCannotMeet:
        raise
    except RuntimeError as error:
        if worker == 0 and "EADDRINUSE" in str(error):
            raise HostsCannotMeet(_port_taken(port)) from error
        raise RuntimeError(_not_joined(backend, with_port(address, port), worker, workers, error)) from error


def _join(
    backend: str,
    address: str,
    port: int,
    worker: int,
    workers: int,
    timeout: timedelta,
    device: torch.device | None,
) -> None:
    # By process, as a forked one must not use its parent's connection.
    key = (os.getpid(), address, port)
    name = next_group(address, port, workers)
    if key not in _stores:
        # Where torch's rendezvous looks for them.
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address, str(port)
        # Not recorded with the group's sockets: the store must outlive a cut, as heartbeats go through it.
        with recording(_store_sockets):
            _stores[key], _, _ = next(rendezvous("env://", worker, workers, timeout=timeout))
    store = _stores[key]
    store.set_timeout(timeout)
    _groups_joined[(*key, workers)] += 1  # also after a failure: the next attempt must not find this one's addresses
    own = PrefixStore(f"resist_lightning/{name}", store)
    if workers > 1:
        check_hosts(PrefixStore("hosts", own), worker, workers, nccl=backend in NCCL)
    with recording_group():
        dist.init_process_group(
            backend,
            store=own,
            rank=worker,
            world_size=workers,
            timeout=timeout,
            device_id=device,
        )


def _port_taken(port: int) -> str:
    return (
        f"rank 0 cannot serve the store, because port {port} of its host is in use, by another run perhaps. Set "
        "MASTER_PORT to another free port, the same for all ranks (under SLURM too, where a job starts several runs)."
    )


def _not_joined(backend: str, store: str, worker: int, workers: int, error: RuntimeError) -> str:
    """The message of a failed join, with what to check."""
    variable = "NCCL_SOCKET_IFNAME" if uses_nccl(backend) else "GLOO_SOCKET_IFNAME"
    return (
        f"rank {worker} of {workers} could not join the others over {backend!r} at {store}: {first_line(str(error))}. "
        "Start all of them with this address, port and number of ranks. Between hosts, every host must reach every "
        f"other on all ports from 1024 on (the store's is MASTER_PORT, {backend} takes free ones), in a network that "
        "you trust: nothing is encrypted. A host with several networks, or whose name resolves to a loopback address "
        f"there (127.0.1.1 on Debian), needs {variable}=INTERFACE, the interface that the others reach; `ip -br "
        "address` lists them."
    )


def interrupt_group() -> None:
    """Make operations that wait in the default group raise; from any thread. The group cannot be used afterwards."""
    only_nccl = _uses_nccl() and "gloo" not in dist.get_backend_config()
    if not only_nccl:
        cut_connections()  # first, as an abort may take seconds
    abort_nccl()


def abort_nccl() -> None:
    """End the operations of NCCL that are under way, if there are any; from any thread. Its groups are lost.

    Their kernels would otherwise run on, waiting for workers that are gone, and whatever waits for the GPU with them.
    """
    if not _uses_nccl():
        return
    # Groups of members too; all at once, as the abort of one may wait for an operation of another.
    aborts = [threading.Thread(target=_abort, args=(group,), daemon=True) for group in list(_world.pg_map)]
    for abort in aborts:
        abort.start()
    for abort in aborts:
        abort.join(_ABORT_SECONDS)


def _abort(group: Any) -> None:
    with suppress(Exception):  # the main thread may be leaving the group
        group.abort()


def _uses_nccl() -> bool:
    return group_exists() and uses_nccl(dist.get_backend_config())


def messages_sent() -> int:
    """Number of operations this process has started in the default group; 0 without a group. Sends nothing."""
    if not group_exists():
        return 0
    group: Any = _get_default_group()
    try:
        return int(group._get_sequence_number_for_group())
    except RuntimeError:  # a backend that does not count
        return 0


def group_timeout() -> timedelta:
    """The default group's timeout. By default torch gives other groups 30 minutes (gloo), whatever this one has."""
    kind = dist.get_backend_config().split(":")[0]
    group: Any = _get_default_group()
    timeout: timedelta = group._get_backend(torch.device(kind)).options._timeout
    return timeout


# At most one second group, with its default group: a later default group gets another one. Weak references, as whoever
# refers to a group keeps its connections open.
_second: list[tuple[weakref.ref[Any], weakref.ref[Any]]] = []


def second_group() -> dist.ProcessGroup:
    """A group of the same processes as the default one, with connections of its own; made once.

    Collective: every process must call this, in the same order.
    """
    default = _get_default_group()
    for beside, second in _second:
        group = second()
        if beside() is default and isinstance(group, dist.ProcessGroup):
            return group
    with recording_group(add=True):
        made: Any = dist.new_group(timeout=group_timeout())
    _second[:] = [(weakref.ref(default), weakref.ref(made))]
    return cast(dist.ProcessGroup, made)


def next_group(address: str, port: int, workers: int) -> str:
    """The name of the group of so many workers that this process will join next through a store; the same on all.

    Raises:
        RuntimeError: if torchrun has restarted the workers in a way that leaves no such name.
    """
    return f"{attempt()}/{workers}/{_groups_joined[os.getpid(), address, port, workers] + 1}"


def connect_to_store(address: str, port: int, timeout: timedelta) -> StoreConnection:
    """A separate connection to a store, for another thread while :func:`join_group` makes the group."""
    store: StoreConnection = _TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False)
    return store


def interrupt_joining(before: Collection[str]) -> None:
    """Make :func:`join_group` raise in another thread: cut all connections that it uses.

    Args:
        before: the sockets that were open before the call of :func:`join_group`.
    """
    cut_connections((open_sockets() - set(before)) | _store_sockets)


def clone_store() -> Store:
    """A new connection to the store through which the default group was made; another thread may use it."""
    return _get_default_store().clone()


def destroy_group() -> None:
    """Leave torch.distributed's default group. Collective: every worker must call this."""
    dist.destroy_process_group()


# The store of the abandoned group: an object of its own, which keeps no connection of the group alive.
_abandoned: list[Store] = []


def abandon_group() -> None:
    """Leave the default group to :func:`destroy_abandoned_group`, as an error may have broken it. Waits for nobody."""
    _abandoned[:] = [_get_default_store()]


def destroy_abandoned_group() -> None:
    """Destroy the default group if it was abandoned: its connections may have been cut."""
    if group_exists() and any(_get_default_store() is store for store in _abandoned):
        if _uses_nccl():
            interrupt_group()  # else it would wait for operations that nobody ends
        dist.destroy_process_group()
    _abandoned.clear()
