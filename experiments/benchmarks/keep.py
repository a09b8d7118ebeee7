"""Keeps the results of a run for the record, without the paths of this machine, and its pictures.

python experiments/benchmarks/keep.py run=RUN_DIR name=demo_resist pictures=docs/demo
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.benchmarks import tables
from experiments.harness import cli
from experiments.harness.record import as_lines
from experiments.harness.settings import option


@dataclass(kw_only=True)
class Options(cli.Command):
    out: str = option(str(tables.RESULTS), "folder of the result file")
    run: str = option(hint="folder of a run of train.py: run=RUN_DIR")
    name: str = option(hint="name of the result file: name=NAME")
    pictures: str | None = option(None, "folder of the pictures")


def run(_: Sequence[str], options: Options) -> None:
    results = json.loads((Path(options.run) / "results.json").read_text())
    results.pop("checkpoint", None)  # a path of this machine
    results["overrides"] = [override for override in results.get("overrides", []) if os.sep not in override]
    results["cores"] = os.cpu_count()
    (Path(options.out) / f"{options.name}.jsonl").write_text(as_lines(results))
    if options.pictures:
        Path(options.pictures).mkdir(parents=True, exist_ok=True)
        for picture in Path(options.run).glob("*.png"):
            shutil.copy(picture, Path(options.pictures) / picture.name)


if __name__ == "__main__":
    sys.exit(cli.run(run, Options, __doc__))
