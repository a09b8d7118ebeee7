"""Whether hosts can reach one another, judged from their processes' reports; real hosts: tests/integration."""

from __future__ import annotations

import socket

import pytest

from resist_lightning.comm import hosts
from resist_lightning.comm.hosts import (
    Place,
    first_of_hosts,
    in_words,
    interface_addresses,
    judge,
    this_place,
    who_tries_whom,
)


def place(host: str, address: str, reason: str = "its name resolves to it", **more: str) -> Place:
    return Place(host, network=host, address=address, reason=reason, interfaces="eth0 (10.0.0.2)", **more)


A, B = place("a", "10.0.0.1"), place("b", "10.0.0.2")


def test_hosts_of_one_network_are_fine() -> None:
    assert judge([A, A, B, B]) == ""
    assert first_of_hosts([A, A, B, B, A]) == [0, 2]


@pytest.mark.parametrize("address", ["127.0.1.1", "127.0.0.1", "::1"])
def test_an_address_that_only_its_host_reaches_is_refused_between_hosts_and_fine_on_one(address: str) -> None:
    own = place("b", address)
    assert judge([own, own]) == ""
    said = judge([A, own, own])
    assert said.startswith(
        f"b (rank 1) would be reached at {address} (its name resolves to it), an address that only the host"
    )
    remedy = "On every host set GLOO_SOCKET_IFNAME=INTERFACE, the interface that the other hosts reach; b has eth0"
    assert said.endswith(f"{remedy} (10.0.0.2).")
    assert "The same is true of 1 more." in judge([own, place("c", address)])


def test_hosts_that_both_take_the_address_of_a_bridge_of_their_own_are_refused() -> None:
    said = judge([A, place("b", "172.17.0.1"), place("c", "172.17.0.1")])
    assert said.startswith("b and c (rank 2) would both be reached at 172.17.0.1")


def test_each_host_tries_the_next_and_one_alone_tries_nobody() -> None:
    assert who_tries_whom([0, 2, 5]) == {0: 2, 2: 5, 5: 0}
    assert who_tries_whom([0]) == {}


def test_nccl_has_no_address_that_could_be_judged() -> None:
    assert judge([place("a", ""), place("b", "")]) == ""


def test_a_problem_of_one_process_is_told_to_all_first() -> None:
    wrong = Place("b", "b", problem="GLOO_SOCKET_IFNAME=eth7 names 'eth7'")
    said = judge([place("a", "127.0.0.1"), wrong, wrong])
    assert said.startswith("rank 1: GLOO_SOCKET_IFNAME=eth7 names 'eth7'. The same is true of 1 more. Correct it there")


@pytest.mark.parametrize(
    ("variable", "value", "wrong"),
    [
        ("GLOO_SOCKET_IFNAME", "lo", ""),
        ("GLOO_SOCKET_IFNAME", "lo,eth7", "names 'eth7', and there is no such interface"),
        ("GLOO_SOCKET_IFNAME", "l", "names 'l'"),  # gloo needs the full name
        ("NCCL_SOCKET_IFNAME", "l", ""),  # NCCL accepts a prefix
        ("NCCL_SOCKET_IFNAME", "=l", "leaves no interface"),
        ("NCCL_SOCKET_IFNAME", "=lo", ""),
        ("NCCL_SOCKET_IFNAME", "eth7,ib", "leaves no interface"),
        ("NCCL_SOCKET_IFNAME", "^docker", ""),
        ("NCCL_SOCKET_IFNAME", "^lo", "leaves no interface"),
    ],
)
def test_the_variable_must_name_an_interface_of_the_host(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, wrong: str
) -> None:
    monkeypatch.setattr(hosts, "interface_addresses", lambda: {"lo": ["127.0.0.1"]})
    found = this_place({variable: value}, nccl=variable.startswith("NCCL"))
    assert (wrong in found.problem) if wrong else not found.problem
    if wrong:
        assert found.problem.startswith(f"{variable}={value} ")
        assert socket.gethostname() in found.problem
    else:
        assert this_place({}, nccl=False).address  # the address of the host's own name, or the loopback


def test_the_other_backends_variable_is_not_read() -> None:
    assert not this_place({"NCCL_SOCKET_IFNAME": "eth7"}, nccl=False).problem
    assert not this_place({"GLOO_SOCKET_IFNAME": "eth7"}, nccl=True).problem


def test_the_variable_gives_the_address_that_gloo_takes() -> None:
    found = this_place({"GLOO_SOCKET_IFNAME": "lo"}, nccl=False)
    assert (found.address, found.reason) == ("127.0.0.1", "GLOO_SOCKET_IFNAME=lo")
    assert Place.from_json(found.to_json()) == found


def test_interfaces_are_shown_with_the_addresses_that_other_hosts_may_reach() -> None:
    assert interface_addresses()["lo"][0] == "127.0.0.1"
    shown = in_words({"lo": ["127.0.0.1"], "eth0": ["10.0.0.2", "fd00::2", "fe80::1"], "eth1": ["fe80::2"]})
    assert shown == "eth0 (10.0.0.2, fd00::2)"
    assert in_words({"lo": ["::1"]}) == "no interface with an address"


def test_somebody_who_listens_is_reached_and_nobody_is_named_with_the_way_out() -> None:
    there = Place("b", address="127.0.0.1", reason="GLOO_SOCKET_IFNAME=lo", interfaces="eth0 (10.0.0.2)")
    listener = hosts.listen(there)
    assert listener is not None
    reached = Place(**{**vars(there), "port": listener.getsockname()[1]})
    with listener:
        assert hosts.try_to_reach(reached) == ""
    said = hosts.try_to_reach(reached)
    assert "cannot reach b at 127.0.0.1 (GLOO_SOCKET_IFNAME=lo): [Errno 111]" in said
    assert "all ports from 1024 on" in said
    assert "set GLOO_SOCKET_IFNAME=INTERFACE" in said
    assert hosts.listen(Place("b")) is None
