"""DDP, local SGD and ResIST over links of chosen bandwidth: seconds per local step, bytes, memory.

python experiments/links/run.py                          (the paper's network; half an hour)
python experiments/links/run.py size=smoke out=runs/links
python experiments/links/run.py methods=[local_sgd,resist] bandwidths_gbit=[1,unshaped] batch=8
python experiments/links/run.py size=ist                 (IST on the larger of its paper's networks)
python experiments/links/run.py size=nodes               (workers of several processes, nodes.jsonl)

Every worker is a process in a network namespace of its own, and `tc` shapes its link. Prints tables, and writes
links.jsonl and links.png. Needs root and iproute2: without, it runs the unshaped row only.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.harness import cli
from experiments.harness.links.namespaces import LARGEST_WORKERS, kernel
from experiments.harness.links.workers import linked_workers
from experiments.harness.record import write_record
from experiments.harness.settings import ConfigError, option
from experiments.harness.tables import show
from experiments.links import tables
from experiments.links.figure import draw_links
from experiments.links.rig import UNSHAPED, Rig, network
from experiments.links.summary import summarise


@dataclass(kw_only=True)
class Options(Rig):
    out: str = option(
        str(tables.RESULTS), "folder of the result files", ist="experiments/ist/results", smoke="runs/links",
        ist_smoke="runs/ist", nodes_smoke="runs/links",
    )  # fmt: skip
    methods: list[str] = option(
        ["ddp", "local_sgd", "resist", "resist_int8", "none"], smoke=["ddp", "local_sgd", "resist", "none"],
        ist=["ddp", "local_sgd", "ist", "none"], ist_smoke=["ddp", "local_sgd", "ist", "none"],
        nodes=["ddp", "resist", "local_sgd_node", "resist_node", "none_node"],
        nodes_smoke=["resist", "local_sgd_node", "resist_node"],
    )  # fmt: skip
    bandwidths_gbit: list[Any] = option(
        [0.1, 1, 10, UNSHAPED], smoke=[0.1, UNSHAPED], ist=[0.1, 1, UNSHAPED], ist_smoke=[0.1], nodes=[0.1, 1],
        nodes_smoke=[0.1],
    )  # fmt: skip
    network: Any = option(
        {"depth": 101, "width_multiplier": 1.0}, smoke={"depth": 26, "width_multiplier": 0.25},
        nodes={"depth": 101, "width_multiplier": 0.5}, nodes_smoke={"depth": 14, "width_multiplier": 0.25},
        ist={"depth": 3, "width": 8192}, ist_smoke={"depth": 3, "width": 256},
    )  # fmt: skip
    batch: int = option(
        8, "images per local step of one worker: little compute is a hard case for a link", least=1, smoke=2, ist=128,
        ist_smoke=4, nodes=2, nodes_smoke=2,
    )  # fmt: skip
    local_steps: int = option(50, "local steps per round in the table; 50 in the paper", least=1, ist=20, ist_smoke=20)
    min_blocks: int | None = option(None, "null: 5, as in the paper", least=0, smoke=2, nodes_smoke=1)
    steps_per_round: int = option(
        6, "local steps really run between two syncs; the table shows rounds of local_steps", least=2, smoke=3, ist=5,
        ist_smoke=3, nodes_smoke=2,
    )  # fmt: skip
    rounds: int = option(3, "measured syncs", least=1, smoke=2, ist_smoke=2, nodes_smoke=2)
    workers: int = option(2, "processes", least=2, most=LARGEST_WORKERS, nodes=4, nodes_smoke=4)
    per_node: int = option(1, "processes that share a namespace and its link", least=1, nodes=2, nodes_smoke=2)
    ddp_steps: int = option(3, "measured steps of DDP, each with its all-reduce", least=1, smoke=2, ist_smoke=2)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.workers % self.per_node or self.workers == self.per_node:
            raise ConfigError(f"per_node={self.per_node} must divide workers={self.workers} into two nodes or more")
        for method in self.methods if self.per_node > 1 else ():
            # For others, no closed form has the bytes that cross the links of nodes.
            if method not in ("ddp", "resist", "local_sgd") and not method.endswith("_node"):
                raise ConfigError(
                    f"methods: {method!r} needs per_node=1; with per_node={self.per_node} use ddp, resist, local_sgd "
                    "or a method with _node"
                )
        if self.steps_per_round > self.local_steps:
            raise ConfigError(
                f"steps_per_round={self.steps_per_round} is above local_steps={self.local_steps}: set it to "
                "local_steps or less"
            )


def run(_: Sequence[str], options: Options) -> None:
    """Measure every method over every link."""
    settings, runs, out = options.recorded(), [], Path(options.out)
    nodes = options.workers // options.per_node
    record = "links" if options.per_node == 1 else "nodes"
    with (
        network(nodes, options.bandwidths_gbit, name=options.name, mtu=options.mtu) as (links, bandwidths),
        linked_workers(links, "experiments.links.worker", options.threads, options.per_node) as workers,
    ):
        for gbit, method in product(bandwidths, options.methods):
            found = workers.run({**settings, "method": method}, gbit=gbit, timeout=options.timeout_seconds)
            runs.append({"method": method, "bandwidth_gbit": gbit, **found})
            print(f"{method}, {tables.bandwidth(gbit)}: measured", flush=True)
    content = {"settings": settings, "rows": summarise(settings, runs), "runs": runs}
    write_record(out / f"{record}.jsonl", content, **kernel())
    shown = {"links": (tables.links_speed, tables.links_bytes), "nodes": (tables.nodes_claim, tables.nodes)}
    show(out, shown, [record])
    if record == "links":
        print(f"wrote {draw_links(out / 'links.png', content)}")


if __name__ == "__main__":
    sys.exit(cli.run(run, Options, __doc__))
