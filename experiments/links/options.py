"""The command line of the experiments on links: `key=value`, checked before anything starts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from experiments.harness.links.namespaces import (
    LARGEST_WORKERS,
    LEAST_BURST_BYTES,
    Loopback,
    namespaces,
    namespaces_in_use,
    why_no_namespaces,
)
from experiments.harness.settings import ConfigError, check_keys, limited
from experiments.links.networks import check_network
from resist_lightning.comm.bytes import WIRE_FORMATS

UNSHAPED = "unshaped"
WIRES = [name for name, form in WIRE_FORMATS.items() if form is not None]
METHOD = re.compile(rf"(?P<base>resist|local_sgd)(_(?P<wire>{'|'.join(WIRES)}))?|ist|ddp|none")
METHODS_IN_WORDS = f"ddp, local_sgd, resist, ist, none; resist and local_sgd also with _{', _'.join(WIRES)}"
LEAST_GBIT, MOST_GBIT = 0.001, 100


@dataclass
class Rig:
    """What all experiments on links have in common."""

    methods: list[str] = MISSING
    workers: int = limited(least=2, most=LARGEST_WORKERS, hint="one process, on one core, each")
    bandwidths_gbit: list[Any] = MISSING
    network: Any = MISSING
    batch: int = limited(least=1, hint="images per local step of one worker")
    local_steps: int = limited(least=1, hint="the paper takes 50")
    min_blocks: int | None = limited(least=0, hint="null takes 5, as the paper")
    seed: int = limited(least=0, hint="0 is a seed")
    threads: int = limited(least=1, hint="of each worker; workers x threads should not exceed the cores")
    mtu: int = limited(least=576, most=65535, hint="1500 is Ethernet's")
    name: str | None = MISSING
    output: str = MISSING
    timeout_seconds: float = limited(above=0, hint="for one method over one link")


def composed(folder: Path, name: str, schema: type, arguments: Sequence[str]) -> DictConfig:
    """The configuration ``folder/name.yaml`` with the overrides of the command line.

    Raises:
        ConfigError: a key or a value that is impossible.
    """
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(folder)):
            cfg = compose(name, list(arguments))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(str(error).partition("Config search path")[0]) from error
    check_keys(cfg, schema, "")
    return cfg


def check_rig(cfg: DictConfig) -> None:
    """Check methods, bandwidths, the names of the namespaces, and what the network can be parted into.

    Raises:
        ConfigError: at the first value that is impossible.
    """
    if not cfg.methods or not cfg.bandwidths_gbit:
        raise ConfigError("methods and bandwidths_gbit need at least one entry each, e.g. methods=[ddp,resist]")
    for key in ("methods", "bandwidths_gbit"):
        if len(set(cfg[key])) < len(cfg[key]):
            raise ConfigError(f"{key}={list(cfg[key])}: an entry stands there twice; name each once")
    for method in cfg.methods:
        check_method(method)
    check_bandwidths(cfg.bandwidths_gbit)
    check_name(cfg.name)
    check_network(cfg)


def check_bandwidths(bandwidths: Iterable[Any]) -> None:
    """Raise a ConfigError unless links can have all of these."""
    for gbit in bandwidths:
        number = isinstance(gbit, int | float) and not isinstance(gbit, bool)
        if gbit != UNSHAPED and not (number and LEAST_GBIT <= gbit <= MOST_GBIT):
            raise ConfigError(
                f"bandwidths_gbit: {gbit!r} must be a number of Gbit/s from {LEAST_GBIT} to {MOST_GBIT}, or {UNSHAPED}"
            )


def check_method(method: str) -> None:
    """Raise a ConfigError unless there is such a method."""
    if METHOD.fullmatch(method) is None:
        raise ConfigError(f"methods: {method!r} is not known; choose from {METHODS_IN_WORDS}")


def check_name(name: str | None) -> None:
    """Raise a ConfigError where the namespaces' name is malformed, or taken."""
    if name is None:
        return
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]{0,31}", name):
        raise ConfigError(f"name={name!r} must be up to 32 letters, digits and dashes; null draws one")
    if why_no_namespaces():
        return
    taken = sorted(other for other in namespaces_in_use() if re.fullmatch(rf"{re.escape(name)}-(\d+|b)", other))
    if taken:
        raise ConfigError(
            f"name={name}: network namespace {taken[0]} is in use; take another name, null to draw one, or end what "
            f"uses it and remove it (ip netns del {taken[0]})"
        )


@contextmanager
def network(cfg: DictConfig, least_burst: int = LEAST_BURST_BYTES) -> Iterator[tuple[Loopback, list[float | None]]]:
    """The workers' network, and the bandwidths that it can have (None: unshaped); says what is missing.

    Args:
        cfg: its workers, bandwidths_gbit, name and mtu.
        least_burst: bytes of a shaper's bucket, at least; small against what is sent at once.
    """
    missing = why_no_namespaces()
    wanted = [gbit_of(entry) for entry in cfg.bandwidths_gbit]
    if missing:
        Console(stderr=True).print(
            f"[yellow]No shaped links: {missing}.[/] Only the unshaped row is measured, over the loopback, without the "
            "kernel's byte counts."
        )
        yield Loopback(cfg.workers), [None]
        return
    with namespaces(cfg.workers, cfg.name or "", cfg.mtu, least_burst) as made:
        yield made, wanted


def gbit_of(entry: Any) -> float | None:
    """An entry of ``bandwidths_gbit``; None for unshaped links."""
    return None if entry == UNSHAPED else float(entry)


def settings_of(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain data; without paths, which say something of this machine only."""
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    return {key: value for key, value in plain.items() if key not in ("output", "name", "folder", "cache_dir")}
