"""Test accuracy against seconds: DDP, local SGD, ResIST and ResIST int8, over links of chosen bandwidth.

python experiments/time_to_accuracy/run.py folder=FOLDER          (train/<class>/*, test/<class>/*; ten minutes)
python experiments/time_to_accuracy/run.py size=smoke output=runs/time_to_accuracy

Every worker is a process in a network namespace of its own, and `tc` shapes its link, as in experiments/links. Prints a
table, and writes time_to_accuracy.jsonl and time_to_accuracy.png. Needs root and iproute2: without, it runs unshaped.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from omegaconf import DictConfig, OmegaConf

from experiments.app.launch import readable_errors
from experiments.harness.links.crew import crew, ended_in_one_line
from experiments.harness.links.namespaces import kernel
from experiments.harness.record import write_record
from experiments.harness.settings import ConfigError, limited
from experiments.links.options import Rig, check_rig, composed, network, settings_of
from experiments.links.tables import bandwidth
from experiments.time_to_accuracy import tables
from experiments.time_to_accuracy.plot import draw_curves
from experiments.time_to_accuracy.worker import MADE, ValidateOnTest, make_data

CONFIG = Path(__file__).parent / "config"


@dataclass
class Options(Rig):
    folder: str = limited()
    cache_dir: str = limited()
    limit: int | None = limited(least=1, hint="training images of each class; null takes all")
    limit_test: int | None = limited(least=1, hint="test images of each class; null takes all")
    steps: int = limited(least=1, hint="local steps of every worker")
    evaluate_every: int = limited(least=1, hint="local steps between two evaluations of the full model")
    lr: float = limited(above=0, hint="initial learning rate; it falls at 50 % and 75 % of the steps")


def check(cfg: DictConfig) -> None:
    """Raise a ConfigError where the run is impossible."""
    check_rig(cfg)
    if "none" in cfg.methods:
        raise ConfigError("methods: 'none' does not train one model; take ddp, local_sgd or resist")
    if cfg.steps % cfg.evaluate_every:
        raise ConfigError(
            f"steps={cfg.steps} must be a multiple of evaluate_every={cfg.evaluate_every}, so that the last model is seen"
        )
    try:
        data: Any = ValidateOnTest(make_data(resolved(cfg)))
        data.setup("fit")
    except ValueError as error:
        raise ConfigError(f"folder: {error}") from error
    images = len(data.data.parts["train"].labels)
    if images < cfg.batch * cfg.workers:
        raise ConfigError(
            f"batch={cfg.batch} for {cfg.workers} workers is above the {images} training examples; lower it, raise limit"
        )


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain data."""
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    return plain


def row_of(method: str, gbit: float | None, run: dict[str, Any]) -> dict[str, Any]:
    """The curve of a run: the slowest worker's seconds at every evaluation."""
    points = list(zip(*(worker["curve"] for worker in run["workers"]), strict=True))
    return {
        "method": method,
        "bandwidth_gbit": gbit,
        "steps": [point[0]["steps"] for point in points],
        "seconds": [max(worker["seconds"] for worker in point) for point in points],
        "accuracy": [point[0]["accuracy"] for point in points],
        "kernel_sent_bytes": [max(worker["kernel_sent_bytes"] for worker in point) for point in points],
    }


def main() -> None:
    with readable_errors():
        cfg = composed(CONFIG, "time_to_accuracy", Options, sys.argv[1:])
        check(cfg)
    settings, rows = resolved(cfg), []
    with (
        ended_in_one_line(),
        network(cfg) as (links, bandwidths),
        crew(links, "experiments.time_to_accuracy.worker", cfg.threads) as workers,
    ):
        for gbit, method in product(bandwidths, cfg.methods):
            run = workers.run({**settings, "method": method}, gbit=gbit, timeout=cfg.timeout_seconds)
            rows.append(row_of(method, gbit, run))
            last = f"{rows[-1]['seconds'][-1]:.0f} s, {rows[-1]['accuracy'][-1]:.1%}"
            print(f"{method}, {bandwidth(gbit)}: {last}", flush=True)
    data = cfg.folder if cfg.folder in MADE else "image folder"
    content = {"settings": {**settings_of(cfg), "data": data}, "rows": rows}
    tables.show(content)
    path = write_record(Path(cfg.output) / "time_to_accuracy.jsonl", content, **kernel())
    print(f"wrote {draw_curves(path.with_suffix('.png'), content)}")


if __name__ == "__main__":
    main()
