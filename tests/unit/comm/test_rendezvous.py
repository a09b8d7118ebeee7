"""Messages between processes through a store before their group is made; the processes are threads here."""

from __future__ import annotations

import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from torch.distributed import PrefixStore, TCPStore

from resist_lightning.comm import hosts, rendezvous
from resist_lightning.comm.hosts import Place
from resist_lightning.comm.rendezvous import HostsCannotMeet, await_store, check_hosts, compare_places, with_port


def compare(places: list[Place]) -> list[str]:
    """Each process's error message, or an empty string."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def tell(rank: int) -> str:
        client = TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=10))
        try:
            compare_places(PrefixStore("hosts", client), rank, len(places), places[rank])
        except HostsCannotMeet as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(places)) as pool:
        return list(pool.map(tell, range(len(places))))


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let addresses of the loopback stand for those of other hosts."""
    monkeypatch.setattr(hosts, "_is_loopback", lambda _: False)


def test_processes_of_one_host_go_on() -> None:
    assert compare([Place("a", "a", "127.0.0.1")] * 3) == [""] * 3


def test_hosts_that_reach_one_another_go_on(far: None) -> None:
    with socket.create_server(("127.0.0.2", 0)) as first, socket.create_server(("127.0.0.3", 0)) as second:
        places = [
            Place("a", "a", "127.0.0.2", port=first.getsockname()[1]),
            Place("b", "b", "127.0.0.3", port=second.getsockname()[1]),
        ]
        assert compare([places[0], places[0], places[1]]) == [""] * 3


def test_every_process_is_told_of_what_prevents_one() -> None:
    said = compare([Place("a", "a", "10.0.0.1"), Place("b", "b", "127.0.1.1"), Place("a", "a", "10.0.0.1")])
    assert len(set(said)) == 1
    assert said[0].startswith("b (rank 1) would be reached at 127.0.1.1")


def test_every_process_is_told_of_a_host_that_another_cannot_reach(far: None) -> None:
    with socket.create_server(("127.0.0.2", 0)) as first, socket.create_server(("127.0.0.3", 0)) as closed:
        ports = first.getsockname()[1], closed.getsockname()[1]
        closed.close()
        places = [
            Place("a", "a", "127.0.0.2", port=ports[0]),
            Place("b", "b", "127.0.0.3", port=ports[1]),
        ]
        said = compare([places[0], places[1], places[1]])
    assert len(set(said)) == 1
    assert "cannot reach b at 127.0.0.3" in said[0]


def test_the_places_of_real_processes_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    with pytest.raises(HostsCannotMeet, match="rank 0: GLOO_SOCKET_IFNAME=eth7 names 'eth7'"):
        check_hosts(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), 0, 1, nccl=False)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_ANSWER_SECONDS", 0.2)


SOON = timedelta(seconds=0.4)


def test_a_name_that_cannot_be_resolved_is_told_on_every_host(
    impatient: None, capfd: pytest.CaptureFixture[str]
) -> None:
    for node, by_torchrun, way_out in ((1, True, "Set --local-addr=ADDRESS for torchrun"), (0, False, "MASTER_ADDR=")):
        said = f"'no.such.invalid' cannot be resolved here.*{way_out}"
        with pytest.raises(HostsCannotMeet, match=said):
            await_store("no.such.invalid", 29500, node=node, served=False, by_torchrun=by_torchrun, timeout=SOON)
        assert re.search(f"{said}.* Waiting, because the name may be known later", capfd.readouterr().err)


def test_a_name_may_be_resolved_later(impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Kubernetes a name is known some time after the others start; they gave it up after 10 s."""
    known_at, resolve = time.monotonic() + 0.4, socket.getaddrinfo

    def getaddrinfo(name: str, *args: Any, **options: Any) -> Any:
        if name == "first.invalid" and time.monotonic() < known_at:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return resolve("127.0.0.1" if name == "first.invalid" else name, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        await_store("first.invalid", port, node=1, served=True, by_torchrun=True, timeout=timedelta(seconds=60))
    assert known_at <= time.monotonic() < known_at + 5


def test_a_store_that_is_served_already_must_answer_and_another_one_may_be_late(
    impatient: None, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        await_store("127.0.0.1", port, node=1, served=True, by_torchrun=True, timeout=SOON)
    with pytest.raises(HostsCannotMeet, match=rf"no answer from the store .* at 127.0.0.1:{port}: .*111"):
        await_store("127.0.0.1", port, node=1, served=True, by_torchrun=True, timeout=SOON)
    assert capfd.readouterr().err == ""
    await_store("127.0.0.1", port, node=1, served=False, by_torchrun=False, timeout=SOON)
    assert "Set MASTER_ADDR=ADDRESS on the first host" in capfd.readouterr().err
    await_store(
        "127.0.0.1", port, node=0, served=True, by_torchrun=True, timeout=SOON
    )  # the store's own host needs no connection


def test_processes_that_do_not_come_are_named(impatient: None, capfd: pytest.CaptureFixture[str]) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=0.1))
    store.set("place/1", "it has come")
    with pytest.raises(RuntimeError):
        compare_places(store, 0, 12, Place("a"))
    assert "rank 0 waits for 10 of 12 processes" in capfd.readouterr().err


def test_addresses_of_ipv6_are_told_apart_from_their_port() -> None:
    assert with_port("fd77::1", 29500) == "[fd77::1]:29500"
    assert with_port("10.0.0.1", 29500) == "10.0.0.1:29500"
