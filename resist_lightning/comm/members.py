"""Groups processes into workers of several members, and makes the `Collective` of a process.

::

    worker 0: rank 0  rank 1        inside:  {0, 1}, {2, 3}, one group for each worker
    worker 1: rank 2  rank 3        between: {0, 2}, {1, 3}, one group for each place in a worker
"""

from __future__ import annotations

import os
import warnings
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_group

from resist_lightning.comm.collective import Collective, SoloCollective
from resist_lightning.comm.group import group_exists, group_timeout
from resist_lightning.comm.hosts import host_name
from resist_lightning.comm.member_collective import MemberCollective, Members
from resist_lightning.comm.sockets import recording_group
from resist_lightning.comm.torch_collective import GroupCollective

# At most one: the default group that was split, and its members. A later default group is another one, not split.
_splits: list[tuple[weakref.ref[Any], Members]] = []


def split_into_workers(count: int, *, across_hosts: bool = False) -> None:
    """Make every ``count`` consecutive ranks of the default group the members of one worker.

    From here on :func:`default_collective` returns these workers. Groups are created here only, never later.

    Collective: every process must call this, in the same order, right after it has joined the group.

    Args:
        count: members of each worker.
        across_hosts: whether the members of a worker may be on several hosts.

    Raises:
        ValueError: on every process, if ``count`` does not divide their number or differs between them, or a worker is
            spread over hosts.
    """
    found = members()
    if found is not None and found.count == count:
        return  # split by an earlier training in the same group
    _splits.clear()
    processes = dist.get_world_size()
    # Before the groups are made: a process with another number would wait for groups that nobody makes.
    hosts = _agree(count)
    if count == 1:
        return
    check_count(count, processes)
    if not across_hosts:
        check_hosts(hosts, count)
    rank = dist.get_rank()
    ranks = range(processes)
    # Every process makes every group, in one order: torch numbers them as they are made.
    with recording_group(add=True):
        timeout = group_timeout()
        inside = [dist.new_group(list(ranks[first : first + count]), timeout) for first in range(0, processes, count)]
        between = [dist.new_group(list(ranks[place::count]), timeout) for place in range(count)]
    worker, member = divmod(rank, count)
    own: Any = (inside[worker], between[member])
    _splits.append((weakref.ref(_get_default_group()), Members(count, *own)))


def members() -> Members | None:
    """The split of the default group; None if each of its processes is a worker."""
    if not _splits or not group_exists():
        return None
    group, found = _splits[0]
    return found if group() is _get_default_group() else None


def default_collective(device: torch.device | None = None, *, warn: bool = False) -> Collective:
    """The workers of torch.distributed's default group, or one alone where there is none or it has one member.

    Args:
        device: device of the tensors that workers send.
        warn: whether to warn if there is no group, and torchrun has started other processes; and if torch compares
            messages between two workers as if all took part.
    """
    if not group_exists() or dist.get_world_size() == 1:
        if warn and not group_exists():
            _warn_if_others_run()
        return SoloCollective()
    if warn:
        _warn_if_messages_are_compared()
    split = members()
    return MemberCollective(split, device) if split is not None else GroupCollective(device)


def _warn_if_others_run() -> None:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    # Only torchrun's word counts: Lightning leaves WORLD_SIZE behind in a main process that has trained.
    if dist.is_torchelastic_launched() and processes > 1:
        warnings.warn(
            f"this process trains alone, although torchrun has started {processes}: there is no process group. Call "
            "torch.distributed.init_process_group() before you make the Engine.",
            stacklevel=4,
        )


def _warn_if_messages_are_compared() -> None:
    # Torch compares the numbers of operations before each collective, and over gloo messages between two count as well.
    in_detail = dist.get_debug_level() == dist.DebugLevel.DETAIL  # type: ignore[attr-defined]
    if in_detail and "gloo" in dist.get_backend_config() and dist.get_rank() == 0:
        warnings.warn(
            "TORCH_DISTRIBUTED_DEBUG=DETAIL ends a run over gloo with 'Detected mismatch between collectives' as soon "
            "as workers have sent different numbers of messages to one another, as in a hand-over, which is no error. "
            "Set it to INFO.",
            stacklevel=4,
        )


def check_count(count: int, processes: int) -> None:
    """Check that ``processes`` can be divided into workers of ``count`` members.

    Raises:
        ValueError: if they cannot.
    """
    if processes % count == 0:
        return
    possible = [number for number in range(1, processes + 1) if processes % number == 0]
    raise ValueError(
        f"devices_per_worker={count} does not divide the {processes} processes of this run into equal workers. Choose "
        f"one of {', '.join(map(str, possible))}, or start another number of processes."
    )


def check_hosts(hosts: Sequence[str], count: int) -> None:
    """Check that the members of each worker are on one host: their gradients are averaged in every step.

    Args:
        hosts: by rank.
        count: members of each worker.

    Raises:
        ValueError: naming the first worker that is spread over hosts.
    """
    for first in range(0, len(hosts), count):
        of_worker = hosts[first : first + count]
        if len(set(of_worker)) == 1:
            continue
        on_hosts = ", ".join(f"{number} on {host}" for host, number in Counter(hosts).items())
        spread = ", ".join(f"rank {first + place} on {host}" for place, host in enumerate(of_worker))
        raise ValueError(
            f"devices_per_worker={count} spreads worker {first // count} over hosts ({spread}), and gradients would "
            f"cross their link in every step. Processes: {on_hosts}. Choose a number that divides the processes of "
            "each host, or set across_hosts=True if the link is fast."
        )


def _agree(count: int) -> list[str]:
    """The host of each rank; raises on all processes if they have come with different counts."""
    texts = [text.decode() for text in GroupCollective().gather_bytes(f"{count} {host_name()}".encode())]
    counts = [text.partition(" ")[0] for text in texts]
    hosts = [text.partition(" ")[2] for text in texts]
    if len(set(counts)) > 1:
        different = ", ".join(f"{number} on {host}" for number, host in dict.fromkeys(zip(counts, hosts, strict=True)))
        raise ValueError(
            f"the processes were started with different devices_per_worker: {different}. All workers must have equally "
            "many members: start the same number of processes on each host (devices_per_worker='node' stands for it), "
            "with the same settings."
        )
    return hosts
