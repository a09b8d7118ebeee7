"""Test accuracy against seconds: DDP, local SGD, ResIST and ResIST int8, over links of chosen bandwidth.

python experiments/time_to_accuracy/run.py folder=FOLDER          (train/<class>/*, test/<class>/*; ten minutes)
python experiments/time_to_accuracy/run.py size=smoke out=runs/time_to_accuracy
python experiments/time_to_accuracy/run.py size=ist               (IST on a made task; half an hour)

Every worker is a process in a network namespace of its own, and `tc` shapes its link, as in experiments/links. Prints a
table, and writes time_to_accuracy.jsonl and time_to_accuracy.png. Needs root and iproute2: without, it runs unshaped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from experiments.harness import cli
from experiments.harness.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, panels
from experiments.harness.links.namespaces import kernel
from experiments.harness.links.workers import linked_workers
from experiments.harness.record import write_record
from experiments.harness.settings import ConfigError, option
from experiments.harness.tables import Content, Row, show
from experiments.links.rig import Rig, network
from experiments.links.tables import bandwidth, title
from experiments.networks import in_words
from experiments.time_to_accuracy import tables
from experiments.time_to_accuracy.worker import MADE, make_data

COLOURS = {"ddp": GREY, "local_sgd": ORANGE, "resist": BLUE, "ist": BLUE, "resist_int8": GREEN}
OTHERS = (PURPLE, SKY, VERMILION)


@dataclass(kw_only=True)
class Options(Rig):
    out: str = option(
        str(tables.RESULTS), "folder of the result files", ist="experiments/ist/results", smoke="runs/time_to_accuracy",
        ist_smoke="runs/ist",
    )  # fmt: skip
    folder: str = option(
        hint="set folder=FOLDER, with train/<class>/* and test/<class>/*",
        smoke="digits",
        ist="speech_shaped",
        ist_smoke="digits",
    )
    cache_dir: str = option("runs/cache", "folder for decoded images")
    limit: int | None = option(
        2000, "training images of each class; null: all", least=1, smoke=20, ist=None, ist_smoke=20
    )
    limit_test: int | None = option(
        200, "test images of each class; null: all", least=1, smoke=10, ist=None, ist_smoke=10
    )
    methods: list[str] = option(
        ["ddp", "local_sgd", "resist", "resist_int8"],
        smoke=["ddp", "resist"],
        ist=["ddp", "local_sgd", "ist"],
        ist_smoke=["ddp", "ist"],
    )
    bandwidths_gbit: list[Any] = option([0.1, 1], smoke=[0.1], ist_smoke=[0.1])
    network: Any = option(
        {"depth": 26, "width_multiplier": 0.25}, smoke={"depth": 14, "width_multiplier": 0.0625},
        ist={"depth": 3, "width": 1024}, ist_smoke={"depth": 3, "width": 32},
    )  # fmt: skip
    batch: int = option(32, "examples per local step of one worker", least=1, smoke=8, ist_smoke=8)
    steps: int = option(
        240, "local steps of every worker: equal samples for all", least=1, smoke=8, ist=400, ist_smoke=8
    )
    local_steps: int = option(20, "local steps per round", least=1, smoke=2, ist_smoke=2)
    evaluate_every: int = option(40, "local steps between two evaluations", least=1, smoke=4, ist_smoke=4)
    min_blocks: int | None = option(2, "null: 5, as in the paper", least=0, smoke=1, ist=None, ist_smoke=None)
    lr: float = option(0.05, "initial learning rate; it falls at 50 % and 75 % of the steps", above=0)
    timeout_seconds: float = option(1800.0, "limit for one method over one link", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if "none" in self.methods:
            raise ConfigError("methods: 'none' does not train one model; take ddp, local_sgd or resist")
        if self.steps % self.evaluate_every:
            raise ConfigError(
                f"steps={self.steps} must be a multiple of evaluate_every={self.evaluate_every}, so that the last "
                "model is evaluated"
            )
        # Before any worker starts: a wrong folder, or one with too few images, is one line.
        try:
            data = make_data(asdict(self))
            data.setup("fit")
        except ValueError as error:
            raise ConfigError(f"folder: {error}") from error
        images = len(data.parts["train"].labels)
        if images < self.batch * self.workers:
            raise ConfigError(
                f"batch={self.batch} for {self.workers} workers exceeds the {images} training examples; decrease it, "
                "increase limit"
            )


def row_of(method: str, gbit: float | None, run: dict[str, Any]) -> Row:
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


def draw_curves(path: Path, content: Content) -> Path:
    """Test accuracy of the full model against seconds of training: one panel per bandwidth, one line per method."""
    rows, settings = content["rows"], content["settings"]
    links = list(dict.fromkeys(row["bandwidth_gbit"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    rest = (method for method in methods if method not in COLOURS)
    colours = {**COLOURS, **{method: OTHERS[i % len(OTHERS)] for i, method in enumerate(rest)}}
    said = (
        f"{settings['workers']} workers, {in_words(settings['network'])}, {settings['steps']} local steps of batch "
        f"{settings['batch']}"
    )
    with panels(path, [bandwidth(gbit) for gbit in links], "Time to accuracy", said) as all_axes:
        for axes, gbit in zip(all_axes, links, strict=True):
            for row in (row for row in rows if row["bandwidth_gbit"] == gbit):
                colour = colours[row["method"]]
                axes.plot(row["seconds"], row["accuracy"], color=colour, marker="o", markersize=4)
                axes.plot(row["seconds"][-1], row["accuracy"][-1], "o", color=colour, markersize=8, clip_on=False)
            axes.set(xlabel="seconds of training", xlim=(0, None))
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axes.grid(True, axis="y")
        all_axes[0].set_ylabel("test accuracy of the full model")
        handles = [Line2D([], [], color=colours[method], marker="o", label=title(method)) for method in methods]
        axes.figure.legend(handles=handles, loc="outside lower center", ncols=len(methods))
    return path


def run(_: Sequence[str], options: Options) -> None:
    """Train every method over every link."""
    out, rows = Path(options.out), []
    with (
        network(options.workers, options.bandwidths_gbit, name=options.name, mtu=options.mtu) as (links, bandwidths),
        linked_workers(links, "experiments.time_to_accuracy.worker", options.threads) as workers,
    ):
        for gbit, method in product(bandwidths, options.methods):
            found = workers.run({**asdict(options), "method": method}, gbit=gbit, timeout=options.timeout_seconds)
            rows.append(row_of(method, gbit, found))
            last = f"{rows[-1]['seconds'][-1]:.0f} s, {rows[-1]['accuracy'][-1]:.1%}"
            print(f"{method}, {bandwidth(gbit)}: {last}", flush=True)
    data = options.folder if options.folder in MADE else "image folder"
    content = {"settings": {**options.recorded(), "data": data}, "rows": rows}
    write_record(out / "time_to_accuracy.jsonl", content, **kernel())
    show(out, tables.STUDIES, ["time_to_accuracy"])
    print(f"wrote {draw_curves(out / 'time_to_accuracy.png', content)}")


if __name__ == "__main__":
    sys.exit(cli.run(run, Options, __doc__))
