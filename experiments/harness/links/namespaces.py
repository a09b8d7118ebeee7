"""Workers in Linux network namespaces, joined by a bridge whose links `tc` shapes.

::

    namespace NAME-0          namespace NAME-b            namespace NAME-1
    worker 0 ─ resist0 ═══════ port0 ─ bridge ─ port1 ═══════ resist0 ─ worker 1
               └ shaped: up    └ shaped: down   └ shaped: down └ shaped: up

Nothing of it is seen by, or can disturb, the host's own network. Everything is gone when the context is left, by
whatever way.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from experiments.harness.settings import Failure

# Of the workers' TCP. Every Linux has it and lets a namespace choose it; with bbr, the exchange of `receives_first.py`
# took 1.05 to 1.10 of bytes / bandwidth from run to run, with reno 1.05 each time.
CONGESTION_CONTROL = "reno"

INTERFACE = "resist0"  # the worker's end of its link, by the same name in every namespace

ADDRESS = "10.77.0.{}"
LARGEST_WORKERS = 200

LEAST_BURST_BYTES, BURST_SECONDS = 128 * 1024, 1e-3
QUEUE_BYTES = 16 * 2**20  # of a shaper: more than TCP has in flight, so that nothing is dropped


class LinksError(Failure):
    """The network could not be made; one line."""


def why_no_namespaces() -> str:
    """The missing requirement of namespaces and shaped links; empty if there is none."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"no {' and no '.join(missing)} here (install iproute2)"
    if os.geteuid() != 0:
        return "not root"
    try:
        with namespaces(1) as probe:
            probe.shape(1)
    except LinksError as error:
        return f"namespaces with shaped links are refused: {error}"
    return ""


def namespaces_in_use() -> set[str]:
    """Names of all network namespaces."""
    return {line.split()[0] for line in _ip("netns", "list").splitlines() if line.strip()}


class Loopback:
    """The substitute where there are no namespaces: all workers on the host's loopback, never shaped."""

    interface = "lo"
    counts = False  # whether the interface's counters are those of one worker

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.address = "127.0.0.1"
        self.port = free_port()

    def command(self, worker: int) -> list[str]:
        """The prefix of a worker's own command."""
        return []

    def shape(self, gbit: float | None) -> None:
        """Do nothing: the loopback cannot be shaped."""
        assert gbit is None, "the loopback is never shaped"

    def shapers(self) -> list[dict[str, Any]]:
        """`tc`'s statistics of the shapers: there are none."""
        return []


class Namespaces(Loopback):
    """The network of one run; make it with `namespaces`.

    An empty name, with which those of the namespaces begin, draws one; the largest packet and the least bucket of a
    shaper are in bytes.
    """

    interface = INTERFACE
    counts = True

    def __init__(self, workers: int, name: str = "", mtu: int = 1500, least_burst: int = LEAST_BURST_BYTES) -> None:
        self.workers = workers
        self.name = name or f"rl-{secrets.token_hex(4)}"
        self.mtu = mtu
        self.least_burst = least_burst
        self.address = ADDRESS.format(1)
        self.port = 29500
        self.bridge = f"{self.name}-b"
        self._shaped = False

    def namespace(self, worker: int) -> str:
        """The namespace of a worker."""
        return f"{self.name}-{worker}"

    def command(self, worker: int) -> list[str]:
        """The prefix of a worker's own command; `ip` replaces itself by it, so no process stands between."""
        return ["ip", "netns", "exec", self.namespace(worker)]

    def make(self) -> None:
        """Make the namespaces, the bridge and the links, all of them inside the namespaces."""
        _ip("netns", "add", self.bridge)
        _ip("-n", self.bridge, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self.bridge, "link", "set", "bridge", "mtu", str(self.mtu), "up")
        for worker in range(self.workers):
            own, port = self.namespace(worker), f"port{worker}"
            _ip("netns", "add", own)
            # Both ends are made where they belong: nothing appears in the host's own network.
            peer = ["peer", "name", port, "netns", self.bridge]
            _ip("-n", own, "link", "add", INTERFACE, "mtu", str(self.mtu), "type", "veth", *peer)
            _ip("-n", self.bridge, "link", "set", port, "mtu", str(self.mtu), "master", "bridge", "up")
            _ip("-n", own, "addr", "add", f"{ADDRESS.format(worker + 1)}/24", "dev", INTERFACE)
            _ip("-n", own, "link", "set", "lo", "up")
            _ip("-n", own, "link", "set", INTERFACE, "up")
            _ip("netns", "exec", own, "sysctl", "-qw", f"net.ipv4.tcp_congestion_control={CONGESTION_CONTROL}")

    def remove(self) -> None:
        """Remove all namespaces that exist."""
        for name in [self.bridge, *map(self.namespace, range(self.workers))]:
            with suppress(LinksError):  # one that was not made yet; the others must go all the same
                _ip("netns", "del", name)

    def shape(self, gbit: float | None) -> None:
        """Give every link this bandwidth, in both directions; None lifts the limit."""
        for namespace, device in self._ends():
            if gbit is None:
                if self._shaped:
                    _run("tc", "-n", namespace, "qdisc", "del", "dev", device, "root")
                continue
            rate = round(gbit * 1e9)
            burst = str(burst_bytes(rate, self.least_burst))
            limits = ["rate", f"{rate}bit", "burst", burst, "limit", str(QUEUE_BYTES)]
            # In place of the shaper before, if there is one.
            _run("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", "tbf", *limits)
        self._shaped = gbit is not None

    def shapers(self) -> list[dict[str, Any]]:
        """`tc`'s statistics of every shaper, the workers' ends first: rate, and passed bytes with all headers."""
        found = []
        for namespace, device in self._ends():
            for qdisc in json.loads(_run("tc", "-n", namespace, "-s", "-j", "qdisc", "show", "dev", device)):
                found.append({"device": device, **qdisc})
        return found

    def _ends(self) -> list[tuple[str, str]]:
        workers = range(self.workers)
        return [*((self.namespace(w), INTERFACE) for w in workers), *((self.bridge, f"port{w}") for w in workers)]


def burst_bytes(bits_per_second: int, least: int = LEAST_BURST_BYTES) -> int:
    """The bucket of a shaper: small against the measured traffic, large enough for the rate to be reached."""
    return max(least, round(bits_per_second / 8 * BURST_SECONDS))


@contextmanager
def namespaces(
    workers: int, name: str = "", mtu: int = 1500, least_burst: int = LEAST_BURST_BYTES
) -> Iterator[Namespaces]:
    """The network, for as long as the context lasts; removed also after an error, Ctrl-C or a SIGTERM."""
    made = Namespaces(workers, name, mtu, least_burst)
    with terminable():
        try:
            made.make()
            yield made
        finally:
            with undisturbed():
                made.remove()


@contextmanager
def terminable() -> Iterator[None]:
    """Let a SIGTERM act as Ctrl-C: unwind, and so clean up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Hold back Ctrl-C and SIGTERM while cleaning up: an impatient second one would leave things behind."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def interface_bytes(interface: str) -> tuple[int, int]:
    """Bytes that the kernel counted on an interface of this namespace: sent, received."""
    folder = Path("/sys/class/net") / interface / "statistics"
    return int((folder / "tx_bytes").read_text()), int((folder / "rx_bytes").read_text())


def kernel() -> dict[str, str | None]:
    """For the stamp of a result file: the kernel, whose TCP and shaper are at work."""
    return {"kernel": platform.release(), "tcp": CONGESTION_CONTROL}


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _ip(*arguments: str) -> str:
    return _run("ip", *arguments)


def _run(*command: str) -> str:
    # A session of its own: Ctrl-C must not end a command in its middle, as its effects would not be known.
    done = subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True)
    if done.returncode != 0:
        raise LinksError(f"{' '.join(command)}: {' '.join(done.stderr.split()) or done.returncode}")
    return done.stdout
