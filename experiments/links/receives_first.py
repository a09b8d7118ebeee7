"""Two workers send each other a buffer at once: what do receives posted before sends save?

python experiments/links/receives_first.py megabytes=37.8 bandwidth_gbit=0.1

Prints a table and writes receives_first.jsonl (docs/decisions/0004-receives-first.md).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rich.console import Console
from rich.table import Table

from experiments.app.launch import fail, readable_errors
from experiments.harness.links.crew import crew, ended_in_one_line
from experiments.harness.links.namespaces import kernel, namespaces, why_no_namespaces
from experiments.harness.record import write_record
from experiments.harness.settings import limited
from experiments.links.options import LEAST_GBIT, MOST_GBIT, composed

CONFIG = Path(__file__).parent / "config"


@dataclass
class Options:
    megabytes: float = limited(above=0, most=4000, hint="each way; 37.8 is a hand-over of the paper's network")
    bandwidth_gbit: float = limited(least=LEAST_GBIT, most=MOST_GBIT, hint="0.1 is a link of 100 Mbit/s")
    repeats: int = limited(least=1, hint="of every way, turn and turn about")
    output: str = limited()
    timeout_seconds: float = limited(above=0, hint="for all of it")


def main() -> None:
    with readable_errors():
        cfg = composed(CONFIG, "receives_first", Options, sys.argv[1:])
    if missing := why_no_namespaces():
        fail(f"{missing}: the exchange needs a shaped link, so root and iproute2")
    settings = {"megabytes": cfg.megabytes, "repeats": cfg.repeats}
    with (
        ended_in_one_line(),
        namespaces(2) as network,
        crew(network, "experiments.links.exchange_worker") as workers,
    ):
        run = workers.run(settings, gbit=cfg.bandwidth_gbit, timeout=cfg.timeout_seconds)
    payload = run["workers"][0]["payload_bytes"]
    ideal = payload * 8 / cfg.bandwidth_gbit / 1e9
    seconds = {
        name: [max(worker["ways"][name][i]["seconds"] for worker in run["workers"]) for i in range(cfg.repeats)]
        for name in run["workers"][0]["ways"]
    }
    table = Table("way", "seconds", "against the ideal", title=f"{payload / 1e6:.1f} MB each way, ideal {ideal:.2f} s")
    for name, values in seconds.items():
        table.add_row(name, f"{mean(values):.2f}", f"{mean(values) / ideal:.2f}")
    Console().print(table)
    content = {
        "settings": {**settings, "bandwidth_gbit": cfg.bandwidth_gbit},
        "payload_bytes": payload,
        "ideal_seconds": ideal,
        "seconds": seconds,
        "workers": run["workers"],
    }
    write_record(Path(cfg.output) / "receives_first.jsonl", content, **kernel())


if __name__ == "__main__":
    main()
