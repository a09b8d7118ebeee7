"""Costs: memory, seconds of a step and of a sync; and which policies train best.

python experiments/benchmarks/run.py                             (all studies)
python experiments/benchmarks/run.py held_memory workers=[2,4]   (some of them)
python experiments/benchmarks/run.py policies folder=FOLDER      (train/<class>/*, test/<class>/*; digits by default)
python experiments/benchmarks/run.py size=smoke out=FOLDER       (to see that it works)

Studies: held_memory check_cost wires step_time overhead policies speech_shaped. Options are key=value: see `Options`.
Prints tables and writes a result file for each study. Snapshots and checkpoints are measured by recovery.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.benchmarks import policies, speech_shaped, steps, tables, wires
from experiments.harness import cli
from experiments.harness.record import write_record
from experiments.harness.settings import option
from experiments.harness.tables import show_and_write
from experiments.harness.workers import forked


@dataclass(kw_only=True)
class Options(cli.Command):
    out: str = option(str(tables.RESULTS), "folder of the result files", smoke="runs/benchmarks")
    workers: list[int] = option([2, 4], "numbers of workers whose memory is measured", least=2, smoke=[2])
    depth: int = option(101, "depth of the paper's network", choices=(14, 26, 38, 101, 152, 200), smoke=14)
    width: float = option(1.0, "1.0 is the paper's; of memory, checks and formats", above=0, smoke=0.25)
    rounds: int = option(3, "rounds in which memory is measured", least=1, smoke=1)
    turns: int = option(20, "repetitions of the measured syncs", least=1, smoke=2)
    step_turns: int = option(4, "repetitions of the step times", least=1, smoke=1)
    steps: int = option(12, "timed local steps per repetition", least=4, smoke=4)
    before: str | None = option(
        None, "another checkout of this repository, whose syncs are measured for comparison (wires)"
    )
    folder: str = option("digits", "folder of images for the policies; digits: scikit-learn's")
    cache_dir: str = option("runs/cache", "folder for decoded images")
    limit: int | None = option(None, "training images per class", least=1, smoke=20)
    epochs: int = option(12, "epochs of the policies' trainings", least=1, smoke=1)
    seeds: int = option(3, "seeds of the policies and of the synthetic task", least=1, smoke=1)
    examples: int = option(8192, "examples of the synthetic task", least=128, smoke=256)


def run(names: Sequence[str], options: Options) -> None:
    """Measure; studies that fork come first."""
    measured: dict[str, Any] = {}
    settings = vars(options)
    if "held_memory" in names:
        for workers in options.workers:
            found = forked(steps.held_memory, settings, workers)
            measured[f"held_memory_{workers}"] = {"workers": workers, **found[0]}
    if "check_cost" in names:
        measured["check_cost"] = forked(steps.check_cost, settings, 2)[0]
    if "wires" in names:
        measured["wires"] = wires.measure(settings)
    if "step_time" in names:
        measured["step_time"] = forked(steps.step_time, settings, 2)[0]
    if "overhead" in names:
        measured["overhead"] = forked(steps.overhead, settings, 1)[0]
    if "policies" in names:
        name = "digits" if options.folder == "digits" else "image_folder"
        measured[f"policies_{name}"] = {"rows": policies.measure(settings)}
    if "speech_shaped" in names:
        measured["speech_shaped"] = {
            "rows": [speech_shaped.measure(seed, options.examples) for seed in range(options.seeds)]
        }
    out = Path(options.out)
    kept = {
        key: value for key, value in settings.items() if key not in ("out", "size", "folder", "cache_dir", "before")
    }
    for name, content in measured.items():
        write_record(out / f"{name}.jsonl", {"settings": kept, **content})
    show_and_write(out, tables.RESULTS, tables.STUDIES, [name for name in measured if name in tables.STUDIES], [])


if __name__ == "__main__":
    studies = ["held_memory", "check_cost", "wires", "step_time", "overhead", "policies", "speech_shaped"]
    sys.exit(cli.run(run, Options, __doc__, studies))
