"""Two workers over a slow link: what does a sync beside the training save?

python experiments/links/overlap.py local_steps=20 overlap=10 bandwidth_gbit=0.1

Rounds without communication, rounds that wait for their sync, and rounds that overlap it take turns in the same two
processes. Prints a table and writes overlap.jsonl (docs/decisions/0043-overlap.md). Needs root and iproute2.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from torch import nn

from experiments.harness import cli
from experiments.harness.links.namespaces import kernel, namespaces, why_no_namespaces
from experiments.harness.links.workers import Place, linked_workers
from experiments.harness.record import write_record
from experiments.harness.settings import ConfigError, option
from experiments.harness.tables import show
from experiments.links import tables
from experiments.links.rig import LEAST_GBIT, MOST_GBIT, NEVER
from experiments.networks import PAPER_BLOCKS, described
from resist_lightning import Config, Engine

Round = Callable[[], float]
WAYS = ("none", "waits", "overlaps")


@dataclass(kw_only=True)
class Options(cli.Command):
    out: str = option(str(tables.RESULTS), "folder of the result file", smoke="runs/links")
    depth: int = option(101, "of the network", least=14, smoke=14)
    width_multiplier: float = option(0.5, "of the network", above=0, smoke=0.125)
    batch: int = option(2, "images per local step of one worker", least=1)
    local_steps: int = option(20, "of a round", least=2, smoke=3)
    overlap: int = option(10, "local steps beside which a sync runs", least=1, smoke=1)
    bandwidth_gbit: float = option(0.1, "0.1 is a link of 100 Mbit/s", least=LEAST_GBIT, most=MOST_GBIT)
    repeats: int = option(4, "rounds of every way, interleaved", least=1, smoke=1)
    timeout_seconds: float = option(900.0, "for all of it", above=0)

    def __post_init__(self) -> None:
        if self.overlap >= self.local_steps:
            raise ConfigError(f"overlap={self.overlap} must be below local_steps={self.local_steps}")


def rounds_of(way: str, settings: dict[str, Any]) -> tuple[Engine, Round]:
    """An engine, and what trains a round with it and returns its seconds, the sync at its end included."""
    torch.manual_seed(0)
    network = {"depth": settings["depth"], "width_multiplier": settings["width_multiplier"]}
    model = described(network, num_classes=10, in_features=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    steps = NEVER if way == "none" else settings["local_steps"]
    ahead = settings["overlap"] if way == "overlaps" else 0
    engine = Engine(model, [optimizer], Config(local_steps=steps, overlap=ahead, blocks=PAPER_BLOCKS))
    images, labels = torch.randn(settings["batch"], 3, 32, 32), torch.randint(10, (settings["batch"],))

    def train_round() -> float:
        start = time.perf_counter()
        for _ in range(settings["local_steps"]):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            engine.after_step()
        return time.perf_counter() - start

    return engine, train_round


def main(place: Place, settings: dict[str, Any]) -> None:
    """A worker: trains rounds in all ways, in turn."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    made = {way: rounds_of(way, settings) for way in WAYS}
    for engine, train_round in made.values():
        engine.start()
        train_round()  # memory is allocated, pages are touched
    place.ready()
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(settings["repeats"]):
        for way, (_, train_round) in made.items():
            dist.barrier()
            found[way].append(train_round())
    place.measured()
    sent = {way: sum(engine.collective.sent_bytes[kind] for kind in ("shared", "merge", "hand_over"))
            for way, (engine, _) in made.items()}  # fmt: skip
    place.report({"seconds": found, "sent_bytes": sent})
    for engine, _ in made.values():
        engine.abandon()
    dist.barrier()
    dist.destroy_process_group()


def run(_: Sequence[str], options: Options) -> None:
    if missing := why_no_namespaces():
        raise ConfigError(f"{missing}: the rounds need a shaped link, so root and iproute2")
    settings = options.take("depth", "width_multiplier", "batch", "local_steps", "overlap", "bandwidth_gbit", "repeats")
    with namespaces(2) as network, linked_workers(network, "experiments.links.overlap") as workers:
        told = workers.run(settings, gbit=options.bandwidth_gbit, timeout=options.timeout_seconds)["workers"]
    # Of each round, as the worker saw it that took the longest.
    seconds = {way: [max(pair) for pair in zip(*(one["seconds"][way] for one in told), strict=True)] for way in WAYS}
    sent = {way: [one["sent_bytes"][way] for one in told] for way in WAYS}
    write_record(
        Path(options.out) / "overlap.jsonl", {"settings": settings, "seconds": seconds, "sent_bytes": sent}, **kernel()
    )
    show(Path(options.out), {"overlap": (tables.overlap,)}, ["overlap"])


if __name__ == "__main__":
    sys.exit(cli.run(run, Options, __doc__))
