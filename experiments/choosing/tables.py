"""The tables of the page docs/choosing.md and of the command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from experiments.choosing.accuracy import TITLES, Cost, Study, costs_of, studies_for
from experiments.choosing.footprint import Footprint, Setting, divide, footprints, operations
from experiments.choosing.prediction import Advice, Row, advise, bytes_per_second, predict, scaled
from experiments.harness import tables
from experiments.harness.tables import Content, Grid, machine, page_tables
from experiments.harness.words import bytes_in_words, seconds_in_words
from experiments.links import tables as links
from experiments.networks import described

RESULTS = Path(__file__).parent / "results"
MIB = 2**20
CHECKED = ("ddp", "local_sgd", "resist")


def rows_of(content: Content) -> list[Row]:
    """The predictions of a result file."""
    return [Row(**{key: value for key, value in row.items() if key != "seconds"}) for row in content["rows"]]


def studies_of(content: Content) -> list[Study]:
    """The studies that have the accuracy costs of a result file's methods."""
    methods = {row["method"] for row in content["rows"]}
    return studies_for(
        neurons_only="ist" in methods and "resist" not in methods, workers=content["settings"]["workers"]
    )


def example(content: Content) -> Grid:
    """A line for each method."""
    settings = content["settings"]
    costs = costs_of(studies_of(content), settings["workers"])
    title = (
        f"{settings['workers']} workers, link {settings['link']}, a sync every {settings['local_steps']} local steps"
    )
    return Grid.of(title, rows_of(content), {
        "": lambda row: TITLES[row.method],
        "held, M parameters": lambda row: f"{row.parameters / 1e6:.3g} ({percent(row.share)})",
        "with gradients and optimizer, MiB": lambda row: mebibytes(row.memory_bytes),
        "sent per local step": lambda row: bytes_in_words(row.sent_bytes),
        "compute": lambda row: duration(row.compute_seconds),
        "s per local step": lambda row: duration(row.seconds),
        "of it communication": lambda row: percent(row.communicating),
        "faster than DDP": lambda row: f"{row.speed:.2f}x",
        "accuracy, points against DDP": lambda row: cost_in_words(row.method, costs, settings["workers"]),
    })  # fmt: skip


def percent(share: float) -> str:
    """``61 %``."""
    return f"{100 * share:.0f} %"


def signed(share: float) -> str:
    """``+1.6 %``."""
    return f"{100 * share:+.1f} %"


def mebibytes(count: float) -> str:
    """``325``, ``0.334``."""
    return f"{count / MIB:,.0f}" if count >= 100 * MIB else f"{count / MIB:.3g}"


def duration(seconds: float) -> str:
    """``1.25 s``, ``12.3 ms``."""
    return f"{1000 * seconds:.3g} ms" if seconds < 0.1 else seconds_in_words(seconds)


def cost_in_words(method: str, costs: Mapping[str, Sequence[Cost]], workers: int) -> str:
    """A cell: points lost against DDP, in each study."""
    if method == "ddp":
        return "0"
    cells = []
    for cost in costs.get(method, ()):
        more = "" if cost.workers == workers else f", S = {cost.workers}"
        cells.append(f"{-cost.points:+.1f} ({cost.study}{more})")
    return ", ".join(cells) or "not measured"


def explained(content: Content) -> str:
    """The basis of the table, and the recommendation."""
    settings, studies = content["settings"], studies_of(content)
    costs = costs_of(studies, settings["workers"])
    lines = [f"- Compute: {_compute_in_words(content)}. Communication: bytes of the worker that sends most / bandwidth"]
    lines[0] += f", and {settings['latency']:g} s per message." if settings["latency"] else "."
    lines[0] += " Nothing is taken to be hidden behind compute; DDP hides some."
    if settings["wire"] != "fp32":
        lines.append(f"- Parameters are sent as {settings['wire']}, but for DDP and IST, which send fp32.")
    for study in studies:
        lines.append(
            f"- Accuracy, points against DDP on equal samples, {study.name}: {study.words}; {_seeds(study, settings)}."
        )
    if content["frozen"]:
        lines.append(f"- {content['frozen']:,} parameters are frozen, and counted as if they trained.")
    for part, reason in content["refused"].items():
        lines.append(f"- No {'IST' if part == 'neurons' else 'ResIST'}: {reason}.")
    lines += [
        "- AuxNet is not in the table: its bytes per step follow from its cuts, which it chooses when a training starts (docs/auxnet.md).",
        "",
    ]
    return "\n".join([*lines, in_words(content, costs)]) + "\n"


def _compute_in_words(content: Content) -> str:
    settings = content["settings"]
    if settings["step_seconds"] is not None:
        return f"step_seconds={settings['step_seconds']:g} as given for the whole network, scaled by the multiply-adds of what is held"
    threads = f"{settings['threads']} thread{'s' if settings['threads'] > 1 else ''}"
    return (
        f"forward, backward and step on a batch of {settings['batch']}, median of {settings['steps']}, on this machine with {threads} "
        f"({machine(content)})"
    )


def _seeds(study: Study, settings: Mapping[str, Any]) -> str:
    workers, costs = settings["workers"], study.costs(settings["workers"])
    counts = sorted({cost.seeds for cost in costs.values()})
    base = (
        ""
        if all(study.base(cost.workers) == cost.workers for cost in costs.values())
        else f"; DDP with {study.base(workers)} workers"
    )
    return f"n = {' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} seeds{base}"


def in_words(content: Content, costs: Mapping[str, Sequence[Cost]]) -> str:
    """The recommendation for a result file, and its reason."""
    rows, point = rows_of(content), content["settings"]["point"]
    # Where several studies have a method, the highest cost counts.
    worst = {method: max(cost.points for cost in found) for method, found in costs.items()}
    return advice_in_words(advise(rows, worst, point), {row.method: row for row in rows}, worst, point)


def advice_in_words(advice: Advice, rows: Mapping[str, Row], costs: Mapping[str, float], point: float) -> str:
    """The recommendation in one or two sentences."""
    taken = rows[advice.method]
    price = f"a point of accuracy is taken to be worth {point:g} times the speed"
    if advice.method == "ddp":
        best = max((row for row in rows.values() if row.method != "ddp"), key=lambda row: row.speed)
        text = f"Take DDP: no other method is so much faster that it makes up for its accuracy: {_in_short(best, costs)}; {price}."
    else:
        text = (
            f"Take {TITLES[advice.method]}: it is {taken.speed:.1f} times as fast as DDP, holds {percent(taken.share)} of the "
            f"parameters and sends {bytes_in_words(taken.sent_bytes)} per local step; {_costing(advice.method, costs)} ({price})."
        )
    others = []
    if advice.more_accurate:
        others.append(f"{_in_short(rows[advice.more_accurate], costs)} is more accurate")
    if advice.faster and advice.method != "ddp":
        others.append(f"{_in_short(rows[advice.faster], costs)} is faster")
    if advice.smaller:
        row = rows[advice.smaller]
        others.append(
            f"{TITLES[row.method]} needs {mebibytes(row.memory_bytes)} MiB of memory, not {mebibytes(taken.memory_bytes)}"
        )
    return " ".join([text, *([f"Else: {'; '.join(others)}."] if others else [])])


def _costing(method: str, costs: Mapping[str, float]) -> str:
    if method not in costs:
        return "what it costs in accuracy is not measured"
    return f"it cost {costs[method]:.1f} points of accuracy" if costs[method] > 0 else "it cost no accuracy"


def _in_short(row: Row, costs: Mapping[str, float]) -> str:
    if row.method == "ddp":
        return TITLES["ddp"]
    return f"{TITLES[row.method]} ({row.speed:.1f} times as fast as DDP; {_costing(row.method, costs)})"


Pair = tuple[float, Row, tables.Row]


def check() -> str:
    """The prediction beside each measurement over real links."""
    lines = [_compared(*pair) for pair in pairs()]
    header = [
        "link",
        "method",
        "predicted, s per local step",
        "measured",
        "off",
        "of it compute: predicted",
        "measured",
    ]
    grid = Grid("Prediction", [*header, "faster than DDP: predicted", "measured"], lines)
    return grid.markdown() if lines else tables.NOT_YET


def off() -> str:
    """The errors of the predictions, in a sentence."""
    found: dict[str, list[float]] = {}
    for _, row, measured in pairs():
        found.setdefault(row.method, []).append(row.seconds / measured["seconds_per_step"] - 1)
    words = [f"{TITLES[method]} {signed(min(own))} to {signed(max(own))}" for method, own in found.items()]
    return f"Predicted seconds are off by: {'; '.join(words)}.\n" if words else tables.NOT_YET


@cache
def pairs() -> tuple[Pair, ...]:
    """By link and method, predictions and measurements, of the result file of experiments/links.

    Its own seconds of DDP's compute, without communication, are given as ``step_seconds``.
    """
    content = tables.read(links.RESULTS, "links")
    if content is None:
        return ()
    footprint, counted = closed_forms(content["settings"])
    found: list[Pair] = []
    for gbit in filter(None, dict.fromkeys(row["bandwidth_gbit"] for row in content["rows"])):
        measured = {row["method"]: row for row in content["rows"] if row["bandwidth_gbit"] == gbit}
        compute = scaled(measured["ddp"]["compute_seconds"], counted)
        rows = predict(footprint, compute, bytes_per_second(f"{gbit}gbit"))
        found += [(gbit, row, measured[row.method]) for row in rows if row.method in CHECKED]
    return tuple(found)


def closed_forms(settings: Mapping[str, Any]) -> tuple[list[Footprint], dict[str, int]]:
    """The methods' footprints and each part's operations, of a network of experiments/networks.py without memory."""
    setting = Setting(settings["workers"], settings["local_steps"], settings["min_blocks"])
    image = torch.empty(settings["batch"], 3, 32, 32, device="meta")
    with torch.device("meta"):
        parts, _ = divide(lambda: described(settings["network"], num_classes=10), image, setting)
    found = footprints(parts, setting)
    for part in parts.values():
        part.hold()
    return found, {name: operations(part.module, image) for name, part in parts.items()}


def _compared(gbit: float, row: Row, measured: Mapping[str, Any]) -> list[str]:
    seconds, compute = measured["seconds_per_step"], measured["compute_seconds"]
    return [
        links.bandwidth(gbit),
        TITLES[row.method],
        duration(row.seconds),
        duration(seconds),
        signed(row.seconds / seconds - 1),
        duration(row.compute_seconds),
        duration(compute),
        f"{row.speed:.2f}x",
        f"{measured['speed_up_over_ddp']:.2f}x",
    ]


STUDIES = {"advise": (example, explained)}
TABLES = {**page_tables(RESULTS, STUDIES, "choosing_"), "choosing_check": check, "choosing_off": off}
