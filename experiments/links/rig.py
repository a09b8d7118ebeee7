"""Shared by all experiments over links: their options, the network of the workers, the methods by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, Strategy
from rich.console import Console

from experiments import networks
from experiments.harness import cli
from experiments.harness.links.namespaces import (
    LARGEST_WORKERS,
    LEAST_BURST_BYTES,
    Loopback,
    namespaces,
    namespaces_in_use,
    why_no_namespaces,
)  # fmt: skip
from experiments.harness.settings import ConfigError, option
from resist_lightning import Config, ISTStrategy, LocalSGDStrategy, NeuronConfig, ResISTStrategy
from resist_lightning.comm.byte_formulas import WIRE_FORMATS
from resist_lightning.engine.registry import make_layout

UNSHAPED = "unshaped"
WIRES = [name for name, form in WIRE_FORMATS.items() if form is not None]
METHOD = re.compile(rf"((?P<base>resist|local_sgd)(_(?P<wire>{'|'.join(WIRES)}))?|none)(?P<node>_node)?|ist|ddp")
METHODS_IN_WORDS = (
    f"ddp, local_sgd, resist, ist, none; resist and local_sgd also with _{', _'.join(WIRES)}, then all but ddp and ist "
    "also with _node"
)
LEAST_GBIT, MOST_GBIT = 0.001, 100
NEVER = 10**9  # local steps of a round that does not end: no communication


@dataclass(kw_only=True)
class Rig(cli.Command):
    per_node = 1  # workers that share a namespace and its link; an option of run.py only
    methods: list[str] = option()
    bandwidths_gbit: list[Any] = option()
    network: Any = option()
    batch: int = option()
    local_steps: int = option()
    min_blocks: int | None = option()
    workers: int = option(2, "workers, one process on one core each", least=2, most=LARGEST_WORKERS)
    seed: int = option(0, "0 is a seed", least=0)
    threads: int = option(1, "threads of each worker; workers x threads should not exceed the cores", least=1)
    mtu: int = option(1500, "bytes of a packet; 1500 as in Ethernet", least=576, most=65535)
    name: str | None = option(None, "name of the namespaces; null draws one")
    timeout_seconds: float = option(900.0, "limit for one method over one link", above=0)

    def __post_init__(self) -> None:
        for method in self.methods:
            if METHOD.fullmatch(method) is None:
                raise ConfigError(f"methods: {method!r} is not known; choose from {METHODS_IN_WORDS}")
            if method.endswith("_node") and self.per_node == 1:
                raise ConfigError(f"methods: {method!r} needs nodes of several processes: set links/run.py size=nodes")
        check_bandwidths(self.bandwidths_gbit)
        check_name(self.name)
        self._check_network()

    def _check_network(self) -> None:
        """Check that the network can be made, and that the methods can divide it."""
        if not isinstance(self.network, dict):
            raise ConfigError(f"network={self.network}: must have depth and width_multiplier, or depth and width")
        neurons = networks.fully_connected(self.network)
        wrong = [method for method in self.methods if method.startswith("resist" if neurons else "ist")]
        if wrong:
            reason = "residual blocks, and a fully connected network has none; take ist" if neurons else (
                "the neurons of fully connected networks (size=ist); take resist"
            )  # fmt: skip
            raise ConfigError(f"methods: {wrong[0]!r} divides {reason}")
        try:
            with torch.device("meta"):
                net = networks.described(self.network, num_classes=10, in_features=64)
            blocks = Config(min_blocks=self.min_blocks, blocks=networks.PAPER_BLOCKS)
            make_layout(net, NeuronConfig() if neurons else blocks, self.workers)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"network={self.network}: {error}") from error

    def recorded(self) -> dict[str, Any]:
        """The options as plain data, without those of this machine only."""
        here = ("size", "out", "name", "folder", "cache_dir")
        return {key: value for key, value in asdict(self).items() if key not in here}


def check_bandwidths(bandwidths: Iterable[Any]) -> None:
    """Raise a ConfigError unless links can have all of these."""
    for gbit in bandwidths:
        number = isinstance(gbit, int | float) and not isinstance(gbit, bool)
        if gbit != UNSHAPED and not (number and LEAST_GBIT <= gbit <= MOST_GBIT):
            raise ConfigError(
                f"bandwidths_gbit: {gbit!r} must be a number of Gbit/s from {LEAST_GBIT} to {MOST_GBIT}, or {UNSHAPED}"
            )


def check_name(name: str | None) -> None:
    """Raise a ConfigError where the namespaces' name is malformed, or taken."""
    if name is None:
        return
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]{0,31}", name):
        raise ConfigError(f"name={name!r} must be up to 32 letters, digits and dashes; null draws one")
    if why_no_namespaces():
        return  # none can be in use
    taken = sorted(other for other in namespaces_in_use() if re.fullmatch(rf"{re.escape(name)}-(\d+|b)", other))
    if taken:
        raise ConfigError(
            f"name={name}: network namespace {taken[0]} is in use; take another name, null to draw one, or end what "
            f"uses it and remove it (ip netns del {taken[0]})"
        )


@contextmanager
def network(
    workers: int,
    bandwidths: Iterable[Any],
    *,
    name: str | None = None,
    mtu: int = 1500,
    least_burst: int = LEAST_BURST_BYTES,
) -> Iterator[tuple[Loopback, list[float | None]]]:
    """The workers' network, and its possible bandwidths (None: unshaped); prints a missing requirement.

    See `namespaces`; the least bucket of a shaper must be small against the bytes sent at once.
    """
    missing = why_no_namespaces()
    if missing:
        Console(stderr=True).print(
            f"[yellow]No shaped links: {missing}.[/] Only the unshaped row is measured, over the loopback, without the "
            "kernel's byte counts."
        )
        yield Loopback(workers), [None]
        return
    with namespaces(workers, name or "", mtu, least_burst) as made:
        yield made, [gbit_of(entry) for entry in bandwidths]


def gbit_of(entry: Any) -> float | None:
    """An entry of ``bandwidths_gbit``; None for unshaped links."""
    return None if entry == UNSHAPED else float(entry)


def make_strategy(method: str, settings: dict[str, Any], local_steps: int) -> Strategy:
    """The strategy of a method that `METHOD` knows, with the settings of a `Rig`.

    ``none`` is a sub-network without communication. DDP has no rounds. With ``_node``, a worker is all processes of a
    node.
    """
    found = METHOD.fullmatch(method)
    assert found is not None
    limit = timedelta(seconds=settings["timeout_seconds"])
    if method == "ddp":
        return DDPStrategy(process_group_backend="gloo", timeout=limit)
    options: dict[str, Any] = {"process_group_backend": "gloo", "timeout": limit}
    if found["wire"]:
        options["wire"] = found["wire"]
    if found["node"]:
        options["devices_per_worker"] = "node"
    if found["base"] == "local_sgd":
        return LocalSGDStrategy(local_steps=local_steps, **options)
    # Without communication is a round that does not end.
    options |= {"local_steps": NEVER if method.startswith("none") else local_steps, "seed": settings["seed"]}
    if networks.fully_connected(settings["network"]):
        return ISTStrategy(**options)
    # Of shallow networks too the third section only, as in the paper; alone it is not their default.
    return ResISTStrategy(min_blocks=settings["min_blocks"], blocks=networks.PAPER_BLOCKS, **options)
