"""torchrun on two hosts, which are network namespaces: working settings, and errors of others within seconds."""

from __future__ import annotations

import os
import subprocess
import time
from typing import Any

from experiments.harness.links.namespaces import Namespaces, namespaces
from tests.helpers.namespaces import needs_namespaces, run_on_hosts
from tests.helpers.plain import Classifier, stream
from tests.helpers.trainers import make_strategy, make_trainer

pytestmark = needs_namespaces

INTERFACE = "GLOO_SOCKET_IFNAME"
IPV6 = ["fd77::1", "fd77::2"]


def train(devices: int, nodes: int, **options: Any) -> str:
    """A short training of this process; returns its result or its error."""
    trainer = make_trainer(make_strategy("local_sgd", **options), max_epochs=1, devices=devices, num_nodes=nodes)
    module = Classifier("chain")
    began = time.monotonic()
    try:
        trainer.fit(module, stream(int(os.environ["RANK"]), 4))
    except (RuntimeError, ValueError) as error:
        assert time.monotonic() - began < 20
        return str(error)
    collective = trainer.strategy.engine.collective
    total = sum(float(tensor.double().sum()) for tensor in module.state_dict().values())
    return f"{collective.workers} of {collective.members}: {total!r}"


def try_settings(cases: list[tuple[str, str]]) -> list[str]:
    """Results or errors of trainings, one for each pair of values of the variable on the two hosts."""
    said = []
    for values in cases:
        value = values[int(os.environ["GROUP_RANK"])]
        os.environ.pop(INTERFACE, None)
        if value:
            os.environ[INTERFACE] = value
        said.append(train(1, 2))
    return said


def train_in(interface: str, settings: list[tuple[int, int, dict[str, Any]]]) -> list[str]:
    os.environ[INTERFACE] = interface
    return [train(devices, nodes, **options) for devices, nodes, options in settings]


def only_ipv6(network: Namespaces) -> None:
    """Give the hosts IPv6 addresses instead of IPv4, and a second network that leads nowhere."""
    for host, address in enumerate(IPV6):
        ip = ["ip", "-n", network.namespace(host)]
        for words in (
            f"addr flush dev {network.interface} scope global",
            f"addr add {address}/64 dev {network.interface} nodad",
            "link add nowhere0 type veth peer name nowhere1",
            f"addr add fd88:{host}::1/64 dev nowhere0 nodad",
            "link set nowhere0 up",
            "link set nowhere1 up",
        ):
            subprocess.run([*ip, *words.split()], check=True)


def test_one_process_on_each_host_by_ipv6_only_and_the_variable_that_is_wrong_is_named() -> None:
    with namespaces(2) as network:
        only_ipv6(network)
        right = network.interface
        cases = [(right, right), ("", right), (right, "eth7"), (right, "nowhere0"), (right, right)]
        first, second = run_on_hosts(network, [1, 1], try_settings, cases, addresses=IPV6)

    assert first == second  # errors too: both hosts get them
    works, own_name, absent, nowhere, again = first
    assert works.startswith("2 of 1: ")
    assert again == works
    assert "would be reached at 127.0.1.1 (its name 'host-0' resolves to it)" in own_name
    assert "set GLOO_SOCKET_IFNAME=INTERFACE" in own_name
    assert f"{right} (fd77::1)" in own_name
    assert "rank 1: GLOO_SOCKET_IFNAME=eth7 names 'eth7', and there is no such interface on host-1" in absent
    assert "host-0 cannot reach host-1" in nowhere
    assert "at fd88:1::1 (GLOO_SOCKET_IFNAME=nowhere0)" in nowhere


def test_two_processes_on_each_host_and_a_worker_that_is_a_host_or_spreads_over_two_where_it_may() -> None:
    workers = [{}, {"devices_per_worker": 2}, {"devices_per_worker": "node"}, {"devices_per_worker": 4}]
    settings = [(2, 2, options) for options in [*workers, {"devices_per_worker": 4, "across_hosts": True}]]
    with namespaces(2) as network:
        found = run_on_hosts(network, [2, 2], train_in, network.interface, settings)

    alone, members, nodes, refused, across = zip(*found, strict=True)
    assert len(set(alone)) == len(set(members)) == len(set(across)) == 1
    assert alone[0].startswith("4 of 1: ")
    assert members[0].startswith("2 of 2: ")
    assert nodes == members
    assert across[0].startswith("1 of 4: ")
    for said in refused:
        assert "devices_per_worker=4 spreads worker 0 over hosts (rank 0 on host-0 (boot " in said
        assert "rank 2 on host-1 (boot " in said
        assert "set across_hosts=True" in said


def test_hosts_with_different_numbers_of_processes() -> None:
    with namespaces(2) as network:
        settings = [(3, 1, {}), (2, 2, {}), (3, 1, {"devices_per_worker": "node"})]
        found = run_on_hosts(network, [2, 1], train_in, network.interface, settings)

    together, unequal, node = zip(*found, strict=True)
    assert len(set(together)) == 1
    assert together[0].startswith("3 of 1: ")
    assert all("does not match the world size (3)" in text for text in unequal)
    assert all("spreads worker 0 over hosts" in text for text in node)
