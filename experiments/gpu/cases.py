"""The cases of each part of the script, and their time limits. Nothing runs here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from experiments.faults.faults import Fault
from experiments.harness.study import Case

METHODS = ("resist", "local_sgd", "ist")
MODES = ("fp32", "tf32", "bf16", "bf16 channels_last", "bf16 channels_last compiled")


@dataclass(frozen=True)
class Probe(Case):
    """Whether so many NCCL ranks can share one GPU."""

    ranks: int
    classic: bool = False  # torch's older NCCL backend, where it has two


@dataclass(frozen=True)
class Contract(Case):
    """A training whose weights and evaluations are compared with the simulator's."""

    method: str
    ranks: int
    devices_per_worker: int = 1


@dataclass(frozen=True)
class Memory(Case):
    """A training whose memory is compared with the closed form."""

    ranks: int


@dataclass(frozen=True)
class Steps(Case):
    """Local steps of a sub-network, beside a plain loop."""

    mode: str


@dataclass(frozen=True)
class Struck(Case):
    """A training of two workers, one of which is struck by a fault."""

    kind: str
    place: str
    backend: str

    @property
    def fault(self) -> Fault:
        """The fault in worker 1, in the second round: by then there is a checkpoint."""
        return Fault(self.kind, 1, self.place, round=1, step=int(self.place == "local steps"))


@dataclass(frozen=True)
class Accuracy(Case):
    """The paper's network, trained for a fixed number of seconds."""

    method: str
    workers: int


def probes(options: Any) -> list[Probe]:
    return [Probe(ranks, classic) for classic in (False, True) for ranks in options.ranks]


def contracts(options: Any) -> list[Contract]:
    """Every method with single ranks; then with workers of two ranks each."""
    alone = [Contract(method, ranks) for ranks, method in product(options.ranks, options.methods)]
    return alone + [Contract(method, 4, devices_per_worker=2) for method in options.methods]


def memory(options: Any) -> list[Memory]:
    return [Memory(2)]


def steps(options: Any) -> list[Steps]:
    return [Steps(mode) for mode in options.modes]


def faults(options: Any) -> list[Struck]:
    """A worker is killed, stopped, and raises; in a local step and in a sync."""
    pairs = product(options.backends, options.kinds, ("local steps", "averaging"))
    return [Struck(kind, place, backend) for backend, kind, place in pairs]


def accuracy(options: Any) -> list[Accuracy]:
    return [Accuracy("single", 1), Accuracy("local_sgd", 2), Accuracy("resist", 2), Accuracy("resist", 4)]


@dataclass(frozen=True)
class Part:
    """A part of the script; seconds are maxima."""

    cases: Callable[[Any], Sequence[Any]]
    seconds: float  # of all its cases
    seconds_of_a_case: float
    together: int = 1  # cases at a time; those that are timed run alone


PARTS: dict[str, Part] = {
    "probes": Part(probes, 45, 20, together=2),
    "contracts": Part(contracts, 130, 60, together=3),
    "memory": Part(memory, 50, 50),
    "steps": Part(steps, 150, 75),
    "faults": Part(faults, 100, 50, together=4),
    "accuracy": Part(accuracy, 180, 75),
}
NEED_PROBES = ("contracts", "faults")


def chosen_parts(names: Sequence[str]) -> list[str]:
    """The requested parts, and the probes before parts that need them to choose a backend."""
    return [name for name in PARTS if name in names or (name == "probes" and set(names) & set(NEED_PROBES))]


LEAST_SECONDS = 5.0  # a case with less than that could only be killed


@dataclass(frozen=True)
class Allowance:
    """The present time limit of a case, by three limits."""

    case: float  # seconds of any case of its part
    part: float  # seconds that are left to its part
    all: float  # seconds that are left to the whole command

    @property
    def seconds(self) -> float:
        return min(self.case, self.part, self.all)

    @property
    def refusal(self) -> str | None:
        """The reason why it is not begun; None if it may."""
        if self.seconds >= LEAST_SECONDS:
            return None
        whose = "the command" if self.all <= self.part else "the part"
        return f"no time: {max(self.seconds, 0):.0f} s were left to {whose}"


def chosen_backend(device: str, ranks: int, works: Callable[[Probe], bool]) -> tuple[str, bool]:
    """The backend of so many ranks on one device, and whether it is torch's older one of that name.

    NCCL where a probe of as many ranks came through; else gloo, which sends tensors of a GPU through the host.
    """
    for probe in _probes_of(ranks):
        if device == "cuda" and works(probe):
            return "nccl", probe.classic
    return "gloo", False


def _probes_of(ranks: int) -> Iterator[Probe]:
    yield Probe(ranks)
    yield Probe(ranks, classic=True)
