"""Which faults strike which trainings. Nothing runs here."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product

from experiments.faults import faults
from experiments.faults.faults import KINDS, ONLY_PLACE, PLACES, Fault, Kind, Place
from experiments.faults.training import BLOCKS, LOCAL_STEPS, MIN_BLOCKS, ROUNDS, SAVE_EVERY
from resist_lightning.methods.resist.partition import Schedule
from resist_lightning.schedule.transfers import plan_sync

SAVED = [
    ((steps - 1) // LOCAL_STEPS, (steps - 1) % LOCAL_STEPS + 1)
    for steps in range(SAVE_EVERY, ROUNDS * LOCAL_STEPS + 1, SAVE_EVERY)
]
"""(round, local steps taken in it) of all checkpoints."""
SYNC = ("handshake", "averaging", "hand_over")
WORKERS = (2, 3, 4)
FACES = ("resist", "resist", "local_sgd")
LAUNCHERS = ("forked",) * 18 + ("popen", "torchrun")
"""One in twenty is started by each of Lightning's and torch's launchers: they take ten seconds to start, which is long for a soak."""


@dataclass(frozen=True)
class Case:
    """A fault, and the training that it strikes."""

    fault: Fault  # the fault
    face: str = "resist"  # ``resist`` or ``local_sgd``
    workers: int = 2  # how many
    # ``forked`` (processes that exist already, as under Slurm; nobody watches them), ``popen`` (Lightning's) or
    # ``torchrun``
    launcher: str = "forked"


SAMPLE = (
    Case(faults.interrupt(worker=1).at("averaging", round=1)),
    Case(faults.kill(worker=1).at("hand_over", round=1)),
    Case(faults.kill(worker=0).at("saving", round=1, step=3)),
    Case(faults.freeze(worker=1).at("handshake", round=1)),
    Case(faults.terminate(worker=1).at("local steps", round=1, step=1), "local_sgd"),
    Case(faults.segfault(worker=1).at("evaluation", round=1)),
    Case(faults.raise_error(worker=1).at("local steps", round=1, step=2)),
    Case(faults.raise_in_loader(worker=0).at("local steps", round=2, step=0)),
    Case(faults.run_out_of_memory(worker=0).at("local steps", round=0, step=1)),
    Case(faults.fill_disk(worker=0).at("saving", round=2)),
)
"""Chosen to have every place, and every kind that ends a worker in its own way. For CI."""


def draw(number: int, seed: int) -> list[Case]:
    """Random cases; every kind at every place comes as often as any other, but for one.

    Args:
        number: of cases.
        seed: 0 is a seed.
    """
    generator, pairs = random.Random(seed), list(possible())
    cases: list[Case] = []
    while len(cases) < number:
        generator.shuffle(pairs)
        cases += [_draw_one(generator, kind, place) for kind, place in pairs]
    return cases[:number]


def possible() -> Iterator[tuple[Kind, Place]]:
    """Every kind with every place where it can happen."""
    for kind, place in product(KINDS, PLACES):
        if ONLY_PLACE.get(kind, place) == place:
            yield kind, place  # type: ignore[misc]


def _draw_one(generator: random.Random, kind: Kind, place: Place) -> Case:
    workers, launcher = generator.choice(WORKERS), generator.choice(LAUNCHERS)
    face = "resist" if place == "hand_over" else generator.choice(FACES)
    if place == "hand_over":
        round, worker = generator.choice(sending(workers))
    else:
        round, worker = generator.randrange(ROUNDS - (place in SYNC)), generator.randrange(workers)
    step = generator.randrange(LOCAL_STEPS) if place == "local steps" else 0
    if place == "saving":
        round, step = generator.choice(SAVED)
    return Case(faults.Begun(kind, worker).at(place, round=round, step=step), face, workers, launcher)


@cache
def sending(workers: int) -> list[tuple[int, int]]:
    """(round, worker) for all that send or receive a block after that round of ``resist``."""
    schedule = Schedule(BLOCKS, workers, MIN_BLOCKS, seed=0, local_steps=LOCAL_STEPS)
    found: set[tuple[int, int]] = set()
    for round in range(ROUNDS - 1):
        plan = plan_sync(schedule.partition(round), schedule.partition(round + 1))
        for transfer in (*plan.merge, *plan.hand_over):
            found |= {(round, transfer.source), (round, transfer.target)}
    return sorted(found)
