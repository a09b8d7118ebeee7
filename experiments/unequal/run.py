"""Seconds per round with one slow worker: equal shares against shares that follow speed.

python experiments/unequal/run.py --workers 2
python experiments/unequal/run.py --workers 4
python experiments/unequal/run.py --workers 2 --smoke --output runs/unequal

Every worker is a process with a part of a core (a quota of its cgroup); the last one has a third of the others'. Both
settings train turn and turn about in one run. Prints a table, and writes unequal_N.jsonl and unequal.png.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.harness.record import write_record
from experiments.unequal import tables
from experiments.unequal.plot import draw_steps
from experiments.unequal.quota import quotas, why_no_quota
from resist_lightning.methods.resist.shares import Cost, slowest
from resist_lightning.schedule.partition import blocks_per_worker

REPOSITORY = Path(__file__).resolve().parents[2]
SMOKE = {"sections": [1, 1, 9, 1], "width": 1 / 16, "batch": 2, "local_steps": 4, "rounds": 2, "turns": 1}


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What the workers are told, and the record says."""
    cores = [args.cores or 1.2 / args.workers] * args.workers
    cores[-1] /= args.slowdown
    settings = {
        "workers": args.workers,
        "cores": cores,
        "sections": [1, 1, args.blocks + 1, 1],
        "width": args.width,
        "batch": args.batch,
        "local_steps": args.local_steps,
        "min_blocks": args.min_blocks,
        "rounds": args.rounds,
        "turns": args.turns,
    }
    return settings | SMOKE if args.smoke else settings


def measure(settings: dict[str, Any], timeout: float) -> list[list[dict[str, Any]]]:
    """The trainings of each worker, in real processes.

    Raises:
        SystemExit: if a worker fails or the time is up; with the end of its output.
    """
    with tempfile.TemporaryDirectory() as folder, quotas(settings["cores"]) as groups:
        place = Path(folder) / "settings.json"
        place.write_text(json.dumps({**settings, "groups": list(map(str, groups))}))
        workers: list[subprocess.Popen[bytes]] = []
        try:
            for worker in range(settings["workers"]):
                with (Path(folder) / f"output.{worker}").open("wb") as output:
                    command = [sys.executable, "-m", "experiments.unequal.worker", str(place), str(worker)]
                    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                    workers.append(
                        subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=output, stderr=output)
                    )
            _wait(workers, Path(folder), timeout)
        finally:
            for process in workers:
                process.kill()
                process.wait()
        return [json.loads((Path(folder) / f"result.{worker}").read_text()) for worker in range(len(workers))]


def _wait(workers: list[subprocess.Popen[bytes]], folder: Path, timeout: float) -> None:
    end = time.monotonic() + timeout
    while any(process.poll() is None for process in workers):
        for worker, process in enumerate(workers):
            if process.poll() or time.monotonic() > end:
                told = (folder / f"output.{worker}").read_text()[-2000:]
                raise SystemExit(f"worker {worker} failed, or {timeout:.0f} s were not enough:\n{told}")
        time.sleep(0.1)


def rows_of(settings: dict[str, Any], trainings: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row per training: blocks and seconds of each worker, and what the measured costs had promised."""
    blocks = settings["sections"][2] - 1
    equal = blocks_per_worker(blocks, settings["workers"], settings["min_blocks"])
    rows = []
    for turn, runs in enumerate(zip(*trainings, strict=True)):
        rounds = list(zip(*(run["rounds"] for run in runs), strict=True))
        row = {
            "turn": turn // 2,
            "shares": runs[0]["shares"],
            "blocks": [worker["blocks"] for worker in rounds[-1]],
            "round_seconds": [max(worker["seconds"] for worker in round) for round in rounds],
            "step_seconds": [mean(one["step_seconds"] for one in run["rounds"]) for run in runs],
            "table": runs[0]["table"],
        }
        costs = [Cost(**cost) for cost in runs[0]["costs"]]
        if costs:
            before = slowest(costs, equal)
            row["costs"] = runs[0]["costs"]
            row["predicted"] = before / slowest(costs, row["blocks"])
            row["bound"] = before / slowest(costs, [settings["min_blocks"]] * len(costs))
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--slowdown", type=float, default=3.0, help="how many times slower the last worker is")
    parser.add_argument("--cores", type=float, help="of each other worker; default: 1.2 / workers")
    parser.add_argument("--blocks", type=int, default=24, help="partitioned blocks")
    parser.add_argument("--min-blocks", type=int, default=2)
    parser.add_argument("--width", type=float, default=1 / 8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--local-steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=4, help="that count, of each training")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds")
    parser.add_argument("--smoke", action="store_true", help="small and quick")
    parser.add_argument("--output", type=Path, default=tables.RESULTS)
    args = parser.parse_args()
    reason = why_no_quota()
    if reason:
        raise SystemExit(f"error: a worker cannot be slowed down here: {reason}.")
    settings = settings_of(args)
    content = {"settings": settings, "rows": rows_of(settings, measure(settings, args.timeout))}
    path = write_record(args.output / f"unequal_{args.workers}.jsonl", content)
    print(tables.table([content]))
    print(f"wrote {draw_steps(path.parent / 'unequal.png', tables.records(path.parent))}")


if __name__ == "__main__":
    main()
