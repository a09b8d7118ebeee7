"""Finds the address at which other hosts reach a process, and checks it. Standard library only."""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import struct
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"

_READ_ADDRESS = 0x8915  # Linux's SIOCGIFADDR
_PROBE_SECONDS = 5.0


@dataclass(frozen=True)
class Place:
    """A process's host and network address.

    Args:
        host: its host's name.
        network: distinguishes hosts of one name, and network namespaces of one host.
        address: at which the backend is reachable for the others; empty if unknown.
        reason: for this address.
        port: a listening port at ``address`` while the places are compared; 0 for none.
        interfaces: of the host, in words.
        problem: the reason why no other process can reach it, whatever the others do; empty if none is known.
    """

    host: str
    network: str = ""
    address: str = ""
    reason: str = ""
    port: int = 0
    interfaces: str = "none"
    problem: str = ""

    def to_json(self) -> str:
        """The place as text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Place:
        """The place in a text of :meth:`to_json`."""
        return cls(**json.loads(text))


def host_name() -> str:
    """This host's name, with the beginning of its boot's id where there is one, as two hosts may have one name."""
    name = socket.gethostname()
    with suppress(OSError):  # not Linux
        name += f" (boot {Path('/proc/sys/kernel/random/boot_id').read_text()[:8]})"
    return name


def this_place(variables: Mapping[str, str], *, nccl: bool) -> Place:
    """This process's place.

    Args:
        variables: its environment.
        nccl: whether the processes use NCCL, which chooses an interface by itself; else gloo.
    """
    interfaces = interface_addresses()
    host, words = host_name(), in_words(interfaces)
    network = host
    with suppress(OSError):  # not Linux, where containers may have names of their own and one network
        network = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/net")
    problem = _wrong_interfaces(variables, interfaces, nccl=nccl)
    if problem or nccl:
        return Place(host, network, interfaces=words, problem=problem and f"{problem} on {host}, which has {words}")
    given = variables.get(GLOO, "")
    if given:
        addresses = interfaces[given.split(",")[0]]
        return Place(host, network, addresses[0] if addresses else "", f"{GLOO}={given}", interfaces=words)
    address, reason = _address_of_own_name()
    return Place(host, network, address, reason, interfaces=words)


def judge(places: Sequence[Place]) -> str:
    """Why the processes cannot reach one another; empty if nothing is known that prevents it. Pure.

    Args:
        places: of all processes, by rank.
    """
    problems = [f"rank {rank}: {place.problem}" for rank, place in enumerate(places) if place.problem]
    if problems:
        return f"{problems[0]}. {_elsewhere(len(problems) - 1)}Correct it there, or unset the variable."
    firsts = first_of_hosts(places)
    if len(firsts) == 1:
        return ""
    own = {rank: places[rank] for rank in firsts if _is_loopback(places[rank].address)}
    if own:
        rank, place = next(iter(own.items()))
        return (
            f"{place.host} (rank {rank}) would be reached at {place.address} ({place.reason}), an address that only "
            f"the host itself can reach. {_elsewhere(len(own) - 1)}{_remedy(place)}"
        )
    seen: dict[str, int] = {}
    for rank in firsts:
        place = places[rank]
        other = places[seen.setdefault(place.address, rank)] if place.address else place
        if other is not place:
            return (
                f"{other.host} and {place.host} (rank {rank}) would both be reached at {place.address} "
                f"({place.reason}), so one cannot be reached by the other. {_remedy(place)}"
            )
    return ""


def first_of_hosts(places: Sequence[Place]) -> list[int]:
    """The lowest rank of each host."""
    firsts: dict[str, int] = {}
    for rank, place in enumerate(places):
        firsts.setdefault(place.network, rank)
    return list(firsts.values())


def who_tries_whom(firsts: Sequence[int]) -> dict[int, int]:
    """The target of each rank that tries to reach another: a ring, so that each host tries and is tried once. Pure."""
    if len(firsts) == 1:
        return {}
    return dict(zip(firsts, [*firsts[1:], firsts[0]], strict=True))


def listen(place: Place) -> socket.socket | None:
    """Listen at the place's address, so that others can try to reach it; None if it is unknown or cannot be used."""
    if not place.address:
        return None
    with suppress(OSError):
        family = socket.AF_INET6 if ":" in place.address else socket.AF_INET
        return socket.create_server((place.address, 0), family=family, backlog=16)
    return None


def try_to_reach(place: Place) -> str:
    """Why ``place`` cannot be reached from here; empty if it can."""
    try:
        socket.create_connection((place.address, place.port), timeout=_PROBE_SECONDS).close()
    except OSError as error:
        return (
            f"{socket.gethostname()} cannot reach {place.host} at {place.address} ({place.reason}): {error}. If that "
            f"is the right network, open all ports from 1024 on between the hosts. If it is not: {_remedy(place)}"
        )
    return ""


def interface_addresses() -> dict[str, list[str]]:
    """The network interfaces of this host and their addresses: first IPv4, then IPv6 by scope, as gloo takes them."""
    found: dict[str, list[str]] = {name: [] for _, name in socket.if_nameindex()}
    if sys.platform != "linux":
        return found
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for name, addresses in found.items():
            with suppress(OSError):  # it has no address
                answer = fcntl.ioctl(asking, _READ_ADDRESS, struct.pack("256s", name.encode()[:15]))
                addresses.append(socket.inet_ntoa(answer[20:24]))
    with suppress(OSError):  # a host without IPv6
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            digits, *_, name = line.split()
            found.setdefault(name, []).append(str(ipaddress.IPv6Address(bytes.fromhex(digits))))
    # The file is in no order; gloo takes addresses of wider scope first.
    return {name: sorted(addresses, key=_is_local) for name, addresses in found.items()}


def in_words(interfaces: Mapping[str, Sequence[str]]) -> str:
    """The interfaces that another host may reach, with their addresses."""
    words = []
    for name, addresses in interfaces.items():
        public = [address for address in addresses if not _is_local(address)]
        if public:
            words.append(f"{name} ({', '.join(public)})")
    return ", ".join(words) or "no interface with an address"


def _wrong_interfaces(variables: Mapping[str, str], interfaces: Mapping[str, object], *, nccl: bool) -> str:
    """The error in the variable that names interfaces; empty if there is none."""
    name = NCCL if nccl else GLOO
    given = variables.get(name, "")
    if not given:
        return ""
    if not nccl:
        absent = [each for each in given.split(",") if each not in interfaces]
        return f"{name}={given} names {', '.join(map(repr, absent))}, and there is no such interface" if absent else ""
    # "^" excludes, "=" asks for whole names; else these are beginnings of names.
    exclude, exact = given.startswith("^"), given.lstrip("^").startswith("=")
    wanted = given.lstrip("^=").split(",")
    for interface in interfaces:
        named = interface in wanted if exact else interface.startswith(tuple(wanted))
        if named != exclude:
            return ""
    return f"{name}={given} leaves no interface"


def _address_of_own_name() -> tuple[str, str]:
    """The address that gloo takes by itself, and why: the first that this host's name resolves to and that is its own.

    Where there is none, torch takes the loopback.
    """
    name = socket.gethostname()
    with suppress(OSError):
        for family, kind, _, _, where in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM):
            with suppress(OSError), socket.socket(family, kind) as probe:
                probe.bind(where)
                return str(where[0]), f"its name {name!r} resolves to it"
    return "127.0.0.1", f"its name {name!r} does not resolve to an address of its own"


def _is_loopback(address: str) -> bool:
    return bool(address) and ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _is_local(address: str) -> bool:
    """Whether other hosts cannot use an address, or only together with an interface."""
    parsed = ipaddress.ip_address(address)
    return parsed.is_loopback or parsed.is_link_local


def _elsewhere(others: int) -> str:
    return f"The same is true of {others} more. " if others else ""


def _remedy(place: Place) -> str:
    return (
        f"On every host set {GLOO}=INTERFACE, the interface that the other hosts reach; {place.host} has "
        f"{place.interfaces}."
    )
