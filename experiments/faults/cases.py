"""Draws the faults of a soak and the trainings that they strike. Nothing runs here."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product

from experiments.faults.faults import KINDS, ONLY_PLACE, PLACES, Fault
from experiments.faults.training import BLOCKS, LOCAL_STEPS, MIN_BLOCKS, ROUNDS, SAVE_EVERY
from resist_lightning.methods.resist.partition import Schedule
from resist_lightning.schedule.transfers import plan_sync

# (round, local steps taken in it) of all checkpoints.
SAVED = [
    ((steps - 1) // LOCAL_STEPS, (steps - 1) % LOCAL_STEPS + 1)
    for steps in range(SAVE_EVERY, ROUNDS * LOCAL_STEPS + 1, SAVE_EVERY)
]
SYNC = ("handshake", "averaging", "hand_over")
WORKERS = (2, 3, 4)
FACES = ("resist", "resist", "local_sgd")
# One in twenty is started by each of Lightning's and torch's launchers: they take ten seconds to start, which is long
# for a soak.
LAUNCHERS = ("forked",) * 18 + ("popen", "torchrun")


@dataclass(frozen=True)
class Case:
    """A fault, and the training that it strikes."""

    fault: Fault  # the fault
    face: str = "resist"  # ``resist`` or ``local_sgd``
    workers: int = 2  # number of workers
    # ``forked`` (processes that exist already, as under Slurm; nobody watches them), ``popen`` (Lightning's) or
    # ``torchrun``
    launcher: str = "forked"


# Chosen to have every place, and every kind that ends a worker in its own way. For CI.
SAMPLE = (
    Case(Fault("interrupt", 1, "averaging", round=1)),
    Case(Fault("kill", 1, "hand_over", round=1)),
    Case(Fault("kill", 0, "saving", round=1, step=3)),
    Case(Fault("freeze", 1, "handshake", round=1)),
    Case(Fault("terminate", 1, "local steps", round=1, step=1), "local_sgd"),
    Case(Fault("segfault", 1, "evaluation", round=1)),
    Case(Fault("raise_error", 1, "local steps", round=1, step=2)),
    Case(Fault("raise_in_loader", 0, "local steps", round=2, step=0)),
    Case(Fault("run_out_of_memory", 0, "local steps", round=0, step=1)),
    Case(Fault("fill_disk", 0, "saving", round=2)),
)


def draw(number: int, seed: int) -> list[Case]:
    """``number`` random cases; every kind at every place comes equally often, give or take one."""
    generator, pairs = random.Random(seed), list(possible())
    cases: list[Case] = []
    while len(cases) < number:
        generator.shuffle(pairs)  # so that a soak that is stopped early has no kind more than another
        cases += [_draw_one(generator, kind, place) for kind, place in pairs]
    return cases[:number]


def possible() -> Iterator[tuple[str, str]]:
    """Every kind with every place where it can happen."""
    for kind, place in product(KINDS, PLACES):
        if ONLY_PLACE.get(kind, place) == place:
            yield kind, place


def _draw_one(generator: random.Random, kind: str, place: str) -> Case:
    workers = generator.choice(WORKERS)
    launcher = generator.choice(LAUNCHERS)
    # Local SGD hands nothing over.
    face = "resist" if place == "hand_over" else generator.choice(FACES)
    if place == "hand_over":
        round, worker = generator.choice(sending(workers))
    else:
        round = generator.randrange(ROUNDS - (place in SYNC))
        worker = generator.randrange(workers)
    step = generator.randrange(LOCAL_STEPS) if place == "local steps" else 0
    if place == "saving":
        round, step = generator.choice(SAVED)
    return Case(Fault(kind, worker, place, round, step), face, workers, launcher)


@cache
def sending(workers: int) -> list[tuple[int, int]]:
    """(round, worker) for all that send or receive a block after that round of ``resist``."""
    schedule = Schedule(BLOCKS, workers, MIN_BLOCKS, seed=0)
    found: set[tuple[int, int]] = set()
    for round in range(ROUNDS - 1):
        plan = plan_sync(schedule.partition(round), schedule.partition(round + 1))
        for transfer in (*plan.merge, *plan.hand_over):
            found |= {(round, transfer.source), (round, transfer.target)}
    return sorted(found)
