"""Keeps the results of a run for the record: python experiments/benchmarks/keep.py RUN_DIR NAME [--pictures FOLDER].

Copies results.json to experiments/benchmarks/results/NAME.jsonl without the paths of this machine, and the run's pictures
to FOLDER.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

from experiments.harness.record import as_lines

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    parser.add_argument("--pictures", type=Path)
    args = parser.parse_args()
    results = json.loads((args.run / "results.json").read_text())
    results.pop("checkpoint", None)
    results["overrides"] = [override for override in results.get("overrides", []) if os.sep not in override]
    results["cores"] = os.cpu_count()
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{args.name}.jsonl").write_text(as_lines(results))
    if args.pictures:
        args.pictures.mkdir(parents=True, exist_ok=True)
        for picture in args.run.glob("*.png"):
            shutil.copy(picture, args.pictures / picture.name)


if __name__ == "__main__":
    main()
