"""The cost of a sync that runs beside the training, measured over links of chosen bandwidth, and predicted.

python experiments/links/overlap.py                     (ten minutes on two cores that are idle)
python experiments/links/overlap.py size=smoke
python experiments/links/overlap.py 'cases=[{workers: 2, gbit: 0.1, local_steps: 50, steps_per_round: 20, overlap: 18}]'

Rounds without communication, rounds that wait for their sync, rounds that overlap it by a number of steps, rounds that
have measured how many they need (`auto`), and shorter rounds whose syncs cover a fragment each take turns in the same
processes. Prints a table and writes overlap.jsonl (decisions 43, 58 and 60). Needs root and iproute2.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from torch import nn

from experiments.harness import cli
from experiments.harness.links.namespaces import LARGEST_WORKERS, kernel, namespaces, why_no_namespaces
from experiments.harness.links.workers import Place, linked_workers
from experiments.harness.record import write_record
from experiments.harness.settings import ConfigError, option
from experiments.harness.tables import show
from experiments.links import tables
from experiments.links.closed_form import closed_form
from experiments.links.rig import LEAST_GBIT, MOST_GBIT, NEVER
from experiments.networks import PAPER_BLOCKS, described
from resist_lightning import Config, Engine
from resist_lightning.comm.byte_formulas import TRAINING_KINDS
from resist_lightning.methods.resist.layout import BlockLayout
from resist_lightning.methods.resist.overview import costs, count_flops
from resist_lightning.schedule.overlap import waiting_rounds

Round = Callable[[], float]
WAYS = ("none", "waits", "overlap", "auto", "fragments")

# Local steps of a round in the table, those that are really run of it, and the overlap that is given by hand.
CASES: list[dict[str, Any]] = [
    {"workers": 2, "width_multiplier": 1.0, "gbit": 0.1, "local_steps": 50, "steps_per_round": 20, "overlap": 18},
    {"workers": 2, "width_multiplier": 1.0, "gbit": 1, "local_steps": 50, "steps_per_round": 6, "overlap": 3},
    {"workers": 2, "width_multiplier": 1.0, "gbit": 1, "local_steps": 5, "steps_per_round": 5, "overlap": 3},
    {"workers": 4, "width_multiplier": 0.5, "gbit": 0.1, "local_steps": 50, "steps_per_round": 8, "overlap": 6},
    {"workers": 8, "width_multiplier": 0.25, "gbit": 0.1, "local_steps": 50, "steps_per_round": 5, "overlap": 3},
]
SMOKE: list[dict[str, Any]] = [
    {"workers": 2, "width_multiplier": 0.125, "gbit": 0.1, "local_steps": 6, "steps_per_round": 3, "overlap": 1},
    {"workers": 3, "width_multiplier": 0.125, "gbit": 0.1, "local_steps": 2, "steps_per_round": 2, "overlap": 1},
]
USUAL = {"width_multiplier": 1.0}
LEAST = {"workers": 2, "width_multiplier": 0, "gbit": LEAST_GBIT, "local_steps": 2, "steps_per_round": 2, "overlap": 1}


@dataclass(kw_only=True)
class Options(cli.Command):
    out: str = option(str(tables.RESULTS), "folder of the result file", smoke="runs/links")
    cases: list[Any] = option(CASES, f"each must have {', '.join(LEAST)}", smoke=SMOKE)
    predicted_workers: list[int] = option([4, 8], "predicted, not measured, at the width of the first case", smoke=[4])
    depth: int = option(101, "depth of the network", least=14, smoke=26)
    fragments: int = option(5, "fragments of the network, in rounds that are long enough", least=2, smoke=2)
    batch: int = option(8, "images per local step of one worker", least=1, smoke=2)
    repeats: int = option(
        2, "rounds of every way over the slowest link, interleaved; twice as many over others", least=1, smoke=1
    )
    timeout_seconds: float = option(900.0, "limit for one case", above=0)

    def __post_init__(self) -> None:
        self.cases = [_checked(case) for case in self.cases]


def _checked(case: Any) -> dict[str, Any]:
    """A case with its usual values."""
    found = {**USUAL, **case} if isinstance(case, dict) else {}
    if found.keys() != LEAST.keys():
        raise ConfigError(f"cases: {case} must have exactly {', '.join(LEAST)}")
    for name, least in LEAST.items():
        kinds = int | float if name in ("gbit", "width_multiplier") else int
        if not isinstance(found[name], kinds) or found[name] < least:
            raise ConfigError(f"cases: {name}={found[name]} of {case} must be a number of at least {least}")
    if not found["overlap"] < found["steps_per_round"] <= found["local_steps"]:
        raise ConfigError(f"cases: {case} needs overlap < steps_per_round <= local_steps")
    for name, most in {"workers": LARGEST_WORKERS, "gbit": MOST_GBIT}.items():
        if found[name] > most:
            raise ConfigError(f"cases: {name}={found[name]} of {case} must be at most {most}")
    return {name: found[name] for name in LEAST}


def network_of(settings: Mapping[str, Any]) -> nn.Module:
    network = {"depth": settings["depth"], "width_multiplier": settings["width_multiplier"]}
    return described(network, num_classes=10, in_features=3)


def rounds_of(way: str, settings: Mapping[str, Any]) -> tuple[Engine, Round]:
    """An engine, and a function that trains a round with it and returns its seconds, the sync at its end included."""
    torch.manual_seed(0)
    model = network_of(settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    if way == "fragments":
        # As many bytes per local step as in whole rounds, and a sync is as much shorter.
        count = settings["fragments"]
        config = Config(
            local_steps=settings["local_steps"] // count, overlap=_overlap_of_fragment(settings), fragments=count,
            blocks=PAPER_BLOCKS,
        )  # fmt: skip
    else:
        steps = NEVER if way == "none" else settings["steps_per_round"]
        overlap: Any = {"overlap": settings["overlap"], "auto": "auto"}.get(way, 0)
        config = Config(local_steps=steps, overlap=overlap, blocks=PAPER_BLOCKS)
    engine = Engine(model, [optimizer], config)
    images, labels = torch.randn(settings["batch"], 3, 32, 32), torch.randint(10, (settings["batch"],))

    def train_round() -> float:
        start = time.perf_counter()
        for _ in range(measured_steps(way, settings)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            engine.after_step()
        return time.perf_counter() - start

    return engine, train_round


def ways_of(settings: Mapping[str, Any]) -> list[str]:
    """The ways of a case: fragments where their rounds are longer than their overlap."""
    cut = settings["local_steps"] // settings["fragments"] > _overlap_of_fragment(settings)
    return [way for way in WAYS if cut or way != "fragments"]


def measured_steps(way: str, settings: Mapping[str, Any]) -> int:
    """Local steps that are trained and timed at once: whole rounds."""
    steps = int(settings["steps_per_round"])
    if way != "fragments":
        return steps
    of_fragment = settings["local_steps"] // settings["fragments"]
    return int(of_fragment * max(1, steps // of_fragment))


def _overlap_of_fragment(settings: Mapping[str, Any]) -> int:
    return int(settings["overlap"] // settings["fragments"] + 1)


def main(place: Place, settings: dict[str, Any]) -> None:
    """A worker: trains rounds in all ways, in turn."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    made = {way: rounds_of(way, settings) for way in ways_of(settings)}
    for way, (engine, train_round) in made.items():
        engine.start()
        if way != "auto":
            train_round()  # memory is allocated, pages are touched
    place.ready()
    for _ in range(waiting_rounds(1)):  # it measures the link, which must be shaped by then
        made["auto"][1]()
    seconds: dict[str, list[float]] = {way: [] for way in made}
    for _ in range(settings["repeats"]):
        for way, (_, train_round) in made.items():
            dist.barrier()
            seconds[way].append(train_round())
    place.measured()
    place.report({way: told(engine, place.worker, seconds[way]) for way, (engine, _) in made.items()})
    for engine, _ in made.values():
        engine.abandon()
    dist.barrier()
    dist.destroy_process_group()


def told(engine: Engine, worker: int, seconds: list[float]) -> dict[str, Any]:
    """A worker's report on one way: seconds of its rounds, bytes of all its syncs, and the last overlap."""
    syncs = closed_form(engine, range(engine.clock.round), [worker])
    return {
        "seconds": seconds,
        "counted": sum(engine.collective.sent_bytes[kind] for kind in TRAINING_KINDS),
        "syncs": syncs,
        "overlap": engine.clock.overlap,
        "chosen": engine.layout.overlaps.summary(),
    }


def rows_of(
    case: dict[str, Any], settings: Mapping[str, Any], workers: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """A row for each way, from the workers' reports."""
    rows = []
    for way in ways_of(settings):
        own = [worker[way] for worker in workers]
        syncs = list(zip(*(one["syncs"] for one in own), strict=True))
        form = [sum(sync["sent"] for sync in one["syncs"]) for one in own]
        rows.append({
            "case": case,
            "way": way,
            "steps": measured_steps(way, settings),
            "local_steps": case["local_steps"] // (settings["fragments"] if way == "fragments" else 1),
            # Of each round, as the worker saw it that took the longest.
            "seconds": [max(found) for found in zip(*(one["seconds"] for one in own), strict=True)],
            "overlap": own[0]["overlap"],
            "chosen": own[0]["chosen"],
            "bytes_equal_closed_form": form == [one["counted"] for one in own],
            "sent_bytes": mean(form) / max(len(syncs), 1),
            # Both directions at once: the longer one counts.
            "link_bytes": mean(max(max(one.values()) for one in sync) for sync in syncs) if syncs else 0.0,
        })  # fmt: skip
    return rows


def beyond(options: Options) -> list[dict[str, Any]]:
    """Bytes of a sync and the share of computing, to predict more workers at the first case's width."""
    first = options.cases[0]
    with torch.device("meta"):
        net = network_of({"depth": options.depth, **first})
        image = torch.empty(1, 3, 32, 32)
    layouts = {
        count: BlockLayout(net, Config(blocks=PAPER_BLOCKS), count)
        for count in (first["workers"], *options.predicted_workers)
    }
    flops = count_flops(net, layouts[first["workers"]].blocks, lambda: net(image))
    found = {count: costs(layout, flops) for count, layout in layouts.items()}
    computed = {count: cost.computed or 1.0 for count, cost in found.items()}
    return [
        {
            "workers": count,
            "width_multiplier": first["width_multiplier"],
            "computed": computed[count] / computed[first["workers"]],
            "link_bytes": found[count].slowest,
        }
        for count in options.predicted_workers
    ]


def run(_: Sequence[str], options: Options) -> None:
    """Measure every case."""
    if missing := why_no_namespaces():
        raise ConfigError(f"{missing}: the rounds need a shaped link, so root and iproute2")
    settings, rows = options.take("depth", "fragments", "batch", "repeats"), []
    slowest = min(case["gbit"] for case in options.cases)
    for count, cases in groupby(options.cases, key=lambda case: int(case["workers"])):
        with namespaces(count) as network, linked_workers(network, "experiments.links.overlap") as workers:
            for case in cases:
                repeats = options.repeats * (1 if case["gbit"] == slowest else 2)
                task = {**settings, **case, "repeats": repeats}
                found = workers.run(task, gbit=case["gbit"], timeout=options.timeout_seconds)["workers"]
                rows += rows_of(case, task, found)
                print(f"{case}: measured", flush=True)
    content = {"settings": settings, "rows": rows, "beyond": beyond(options)}
    write_record(Path(options.out) / "overlap.jsonl", content, **kernel())
    show(Path(options.out), {"overlap": (tables.overlap_claim, tables.overlap)}, ["overlap"])


if __name__ == "__main__":
    sys.exit(cli.run(run, Options, __doc__))
