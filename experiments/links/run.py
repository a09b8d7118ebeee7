"""DDP, local SGD and ResIST over links of chosen bandwidth: seconds per local step, bytes, memory.

python experiments/links/run.py                          (the paper's network; half an hour)
python experiments/links/run.py size=smoke output=runs/links
python experiments/links/run.py methods=[local_sgd,resist] bandwidths_gbit=[1,unshaped] batch=8

Every worker is a process in a network namespace of its own, and `tc` shapes its link. Prints a table, and writes
links.jsonl and links.png. Needs root and iproute2: without, it runs the unshaped row only.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from omegaconf import DictConfig

from experiments.app.launch import readable_errors
from experiments.harness.links.crew import crew, ended_in_one_line
from experiments.harness.links.namespaces import kernel
from experiments.harness.record import write_record
from experiments.harness.settings import ConfigError, limited
from experiments.links import tables
from experiments.links.options import Rig, check_rig, composed, network, settings_of
from experiments.links.plot import draw_links
from experiments.links.summary import summarise

CONFIG = Path(__file__).parent / "config"


@dataclass
class Options(Rig):
    steps_per_round: int = limited(least=2, hint="really run between two syncs; local_steps is what the table shows")
    rounds: int = limited(least=1, hint="syncs that are measured")
    ddp_steps: int = limited(least=1, hint="steps of DDP that are measured")


def check(cfg: DictConfig) -> None:
    """Raise a ConfigError where the run is impossible."""
    check_rig(cfg)
    if cfg.steps_per_round > cfg.local_steps:
        raise ConfigError(
            f"steps_per_round={cfg.steps_per_round} is above local_steps={cfg.local_steps}: really run at most as many"
        )


def main() -> None:
    with readable_errors():
        cfg = composed(CONFIG, "links", Options, sys.argv[1:])
        check(cfg)
    settings, runs = settings_of(cfg), []
    with (
        ended_in_one_line(),
        network(cfg) as (links, bandwidths),
        crew(links, "experiments.links.worker", cfg.threads) as workers,
    ):
        for gbit, method in product(bandwidths, cfg.methods):
            run = workers.run({**settings, "method": method}, gbit=gbit, timeout=cfg.timeout_seconds)
            runs.append({"method": method, "bandwidth_gbit": gbit, **run})
            print(f"{method}, {tables.bandwidth(gbit)}: measured", flush=True)
    content = {"settings": settings, "rows": summarise(settings, runs), "runs": runs}
    tables.show(content)
    path = write_record(Path(cfg.output) / "links.jsonl", content, **kernel())
    print(f"wrote {draw_links(path.with_suffix('.png'), content)}")


if __name__ == "__main__":
    main()
