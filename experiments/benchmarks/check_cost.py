"""What does it cost to look for unequal tensors after a sync, and for NaN before one?

torchrun --nproc-per-node 2 experiments/benchmarks/check_cost.py

Syncs of the paper's network of 41 million parameters without training in between, real processes over loopback; an
engine for each setting of `check`, turn and turn about in one run. Beside the whole sync: the seconds of the hashes and
of the search for NaN alone (there is no setting without it). Prints a table and writes
experiments/benchmarks/results/check_cost.jsonl.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from experiments.benchmarks.keep import RESULTS
from experiments.harness.record import write_record
from resist_lightning import Config, Engine
from resist_lightning.checks.header import Purpose
from resist_lightning.models import preact_resnet

CHECKS = ("off", "sampled", "full")
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def engine_with(check: str) -> Engine:
    torch.manual_seed(0)
    model = preact_resnet(101, num_classes=10).to(DEVICE)
    engine = Engine(
        model,
        [torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)],
        Config(local_steps=1, check=check),  # type: ignore[arg-type]
    )
    engine.start()
    return engine


def seconds_of(act: Callable[[], object]) -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    act()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=20)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    engines = {check: engine_with(check) for check in CHECKS}
    sync, hashes, search = defaultdict(list), defaultdict(list), []
    for _ in range(args.turns + 2):
        for check, engine in engines.items():
            watch, equal = engine._handshake.divergence, engine.sync.replicated_tensors(engine.clock.round)
            dist.barrier()
            sync[check].append(seconds_of(engine.after_step))
            if check != "off":
                hashes[check].append(
                    seconds_of(lambda: (watch.note(equal, engine.clock.round), watch.numbers(Purpose.HOST)))  # noqa: B023
                )
            search.append(seconds_of(watch._first_not_finite))
    if dist.get_rank() == 0:
        report({check: median(sync[check][2:]) for check in CHECKS}, {c: median(hashes[c][2:]) for c in CHECKS[1:]},
               median(search[2 * len(CHECKS):]), args)  # fmt: skip
    dist.barrier()
    dist.destroy_process_group()


def report(sync: dict[str, float], hashes: dict[str, float], search: float, args: argparse.Namespace) -> None:
    table = Table(
        "check", "median sync", "ratio", "of it hashes", title=f"n = {args.turns}, search for NaN {search:.4f} s"
    )
    for check, value in sync.items():
        table.add_row(check, f"{value:.4f} s", f"{value / sync['off']:.3f}", f"{hashes.get(check, 0):.4f} s")
    Console().print(table)
    content = {"settings": vars(args), "device": DEVICE.type, "median_sync_seconds": sync,
               "median_hash_seconds": hashes, "median_search_seconds": search}  # fmt: skip
    write_record(RESULTS / f"check_cost{'_gpu' if DEVICE.type == 'cuda' else ''}.jsonl", content)


if __name__ == "__main__":
    main()
