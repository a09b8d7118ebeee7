"""The tables of the accuracy study."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from experiments.accuracy.cases import MOMENTA, OUTER, TITLES
from experiments.harness.tables import Content, Grid, Rows, chosen, distinct, grouped, mean_of, page_tables, seeds
from experiments.real_processes import agreement
from resist_lightning import Config

RESULTS = Path(__file__).parent / "results"
JPEG = RESULTS / "jpeg"
QUARTER = RESULTS / "quarter"
SHORT = RESULTS / "short"
SETS = {"folder": "CIFAR-10, JPEG copy", "cifar10": "CIFAR-10", "digits": "digits of scikit-learn"}

SCHEDULES = {
    "steps": ", ÷10 at 50 % and 75 %",
    "one_cycle": " at the top of one cycle (up for a fifth, half a cosine down)",
}

# Numbers of the paper, in per cent: Table 2 (CIFAR-10); supplement, Fig. 1 (CIFAR-10), Fig. 2 (CIFAR-100, read off the
# plot), Table 3 (CIFAR-10; S = 4 and 8 bits downwards).
PAPER_MAIN = {
    ("local_sgd", 2): "92.36 ± .01", ("local_sgd", 4): "92.90 ± .06", ("local_sgd", 8): "92.00 ± .07",
    ("resist", 2): "91.95 ± .32", ("resist", 4): "92.35 ± .22", ("resist", 8): "91.45 ± .30",
}  # fmt: skip
PAPER_LOCAL_STEPS = {
    "local_sgd": {50: 70.8, 100: 71.1, 250: 70.8, 500: 71.9}, "resist": {50: 70.1, 100: 71.3, 250: 71.4, 500: 70.9},
}  # fmt: skip
PAPER_WIRE = {"int8": "92.14", "int6": "91.91", "int4": "76.33", "fp32": "92.35 (Table 2)"}


def conditions(content: Content) -> str:
    """Hardware, versions, data, network and n."""
    machine = content["machine"]
    settings = content["settings"]
    rows = content["rows"]
    size = (8 if settings["data"] == "digits" else 32) // settings["shrink"]
    test, train = ("all" if settings[key] is None else settings[key] for key in ("limit_test", "limit"))
    done = max(row["samples"] for row in rows)
    return (
        f"{SETS[settings['data']]} at {size} x {size} pixels ({train} training and {test} test images per class, "
        f"{100 * settings['holdout']:g} % of the training images held out); pre-activation network with "
        f"(1, 1, {settings['deep']}, 1) blocks at {settings['width']:g} of the paper's width, "
        f"{settings['deep'] - 1} of them partitioned; {done:,} training samples for every method, {settings['batch']} "
        f"per worker and local step, rounds of {settings['local_steps']} local steps, at least {settings['min_blocks']} blocks per worker, "
        f"lr {settings['lr']:g}{SCHEDULES[settings['schedule']]}{_recipe(settings)}; {machine['cores']} CPU cores ({machine['processor']}), python "
        f"{machine['python']}, torch {machine['torch']}; n = {seeds(rows)} seed{'s' if seeds(rows) > 1 else ''}.\n"
    )


def _recipe(settings: Mapping[str, Any]) -> str:
    """The settings' additions to the paper's SGD, in words."""
    words = [
        (settings["nesterov"], "Nesterov momentum"),
        (settings["smoothing"], f"labels smoothed by {settings['smoothing']:g}"),
        (settings["data"] != "digits", "flips"),
        (settings["crop_padding"], f"random crops that move an image by up to {settings['crop_padding']} pixels"),
        (settings["fast"], "a batch norm before the pooling, bf16 autocast, channels last"),
        (settings["zero_branches"], "residual branches that begin at zero"),
    ]
    return "".join(f", {word}" for present, word in words if present)


def main(content: Content) -> Grid:
    lines = []
    for (method, workers), own in grouped(content["rows"], "method", "workers", titles=TITLES):
        found = [mean_of(own, column) for column in ("last", "selected", "best_on_test")]
        start = [TITLES[method], workers, own[0]["local_steps_done"], len(own)]
        lines.append([*start, *found, PAPER_MAIN.get((method, workers), "-")])
    header = ["", "S", "local steps", "n", "last, %", "selected on hold-out, %"]
    header += ["best on test, % (for comparison with the paper only)", "the paper's, best on test, %"]
    return Grid("Accuracy on equal samples", header, lines)


def summary(content: Content) -> Grid:
    """The last accuracy of every method but growth, which refines another, by number of workers."""
    rows = [row for row in content["rows"] if row["case"]["method"] != "resist_growth"]
    workers = distinct(rows, "workers")
    lines = []
    for (method,), own in grouped(rows, "method", titles=TITLES):
        found = [mean_of(chosen(own, workers=count), "last") for count in workers]
        lines.append([TITLES[method], *found])
    header = [f"{count} worker{'s' if count > 1 else ''}" for count in workers]
    return Grid("Summary", ["test accuracy, %", *header], lines)


def check(content: Content) -> Grid:
    return agreement(content["rows"], lambda case: TITLES[case["method"]], "%", 2)


def design(content: Content) -> Grid:
    rows = content["rows"]
    two, eight = chosen(rows, workers=2), chosen(rows, workers=8)
    third = chosen(two, network="open_post", blocks="paper")
    usual = chosen(eight, local_steps=content["settings"]["local_steps"])
    others = [row for row in eight if row not in usual]
    steps: list[tuple[str, Rows, str, str]] = [
        ("S = 2: all blocks partitioned (naive)", chosen(two, blocks="naive"), "none", "66.3"),
        ("+ share the first block of each section", chosen(two, blocks="strided_shared"), "none", "68.3"),
        ("+ partition section 3 only", third, "none", "84.3"),
        ("+ scale at test", third, "held share", "91.5"),
        ("+ pre-activation", chosen(two, network="open_pre"), "held share", "92.0"),
    ]
    printed = {0: "86.5", content["settings"]["min_blocks"]: "89.9"}
    for least in distinct(usual, "min_blocks"):
        own = chosen(usual, min_blocks=least)
        steps.append((f"S = 8: at least {least} blocks", own, "held share", printed.get(least, "-")))
    for length in distinct(others, "local_steps"):
        own = chosen(eight, local_steps=length)
        steps.append((f"+ rounds of {length} local steps", own, "held share", "91.3"))
    return Grid.of("The paper's design steps", steps, {
        "": lambda step: step[0],
        "batch statistics, as in the paper, %": lambda step: mean_of(step[1], f"batch, {step[2]}"),
        "`recalibrate`, %": lambda step: mean_of(step[1], f"recalibrate, {step[2]}"),
        "n": lambda step: len(step[1]),
        "the paper's, %": lambda step: step[3],
    })  # fmt: skip


def local_steps(content: Content) -> Grid:
    lines = []
    for (length,), rows in grouped(content["rows"], "local_steps"):
        cells = [length]
        for method in ("resist", "local_sgd"):
            own = chosen(rows, method=method)
            cells += [mean_of(own, "last"), PAPER_LOCAL_STEPS[method].get(length, "-")]
        lines.append([*cells, rows[0]["local_steps_done"] // length, seeds(rows)])
    header = ["local steps per round", "ResIST, %", "the paper's (CIFAR-100)"]
    return Grid("Length of a round", [*header, "local SGD, %", "the paper's (CIFAR-100)", "rounds", "n"], lines)


def momentum(content: Content) -> Grid:
    lines = [
        [f"`{policy}`", mean_of(own, "last"), mean_of(own, "last_holdout"), len(own)]
        for (policy,), own in grouped(content["rows"], "momentum")
    ]
    return Grid("Momentum", ["momentum at a sync", "last, %", "hold-out, %", "n"], lines)


def batch_norm(content: Content) -> Grid:
    rows = content["rows"]
    workers = distinct(rows, "workers")
    lines = [
        [f"`{norm}`", *(mean_of(chosen(rows, workers=count), f"{norm}, held share") for count in workers)]
        for norm in ("recalibrate", "running", "batch")
    ]
    header = ["statistics of the full model", *(f"S = {count}, %" for count in workers)]
    return Grid("Batch-norm statistics", header, lines)


def scale(content: Content) -> Grid:
    blocks, lines = content["settings"]["deep"] - 1, []
    scales = {"held share": "k/N", "1/S": "1/S", "none": "unscaled"}
    columns = list(product(("recalibrate", "batch"), scales))
    for (least, workers), own in grouped(content["rows"], "min_blocks", "workers"):
        share = max(1 / workers, least / blocks)
        cells = [mean_of(own, f"{norm}, {scale}") for norm, scale in columns]
        lines.append([least, f"{share:.3f} / {1 / workers:.3f}", *cells, len(own)])
    named = [f"`{norm}`, {scales[scale]}, %" for norm, scale in columns]
    return Grid("Test-time scales", ["minimum blocks (S = 8)", "k/N / 1/S", *named, "n"], lines)


def _of_the_paper(method: str, bits: str) -> str:
    return PAPER_WIRE.get(bits, "-") if method == "resist" else "-"


def wire(content: Content) -> Grid:
    lines = [
        [TITLES[method], f"`{bits}`", mean_of(own, "last"), len(own), _of_the_paper(method, bits)]
        for (method, bits), own in grouped(content["rows"], "method", "wire", titles=TITLES)
    ]
    return Grid("Fewer bits", ["", "on the wire", "last, %", "n", "the paper's, %"], lines)


def overlap(content: Content) -> Grid:
    by_kind: dict[tuple[int, int, int], Rows] = {}
    for row in content["rows"]:
        case = row["case"]
        kind = (case.get("fragments", 1), case["local_steps"], case.get("overlap", 0))
        by_kind.setdefault(kind, []).append(row)
    lines = []
    for (fragments, length, steps), own in sorted(by_kind.items()):
        share = f"{steps / (fragments * length):.0%}"
        lines.append(
            [fragments, f"{steps} of {length}", share, mean_of(own, "last"), mean_of(own, "last_holdout"), len(own)]
        )
    header = ["`fragments`", "`overlap`, local steps", "of a fragment's steps", "last, %", "hold-out, %", "n"]
    return Grid("Syncs beside the training", header, lines)


def outer(content: Content) -> Grid:
    lines = []
    for (workers, steps), own in grouped(content["rows"], "workers", "local_steps"):
        default = Config(outer="nesterov").outer_momentum_of(workers)
        by_momentum: dict[float | None, Rows] = {}
        for row in own:
            momentum = row["case"].get("outer_momentum", default) if row["case"]["method"] in OUTER else None
            by_momentum.setdefault(momentum, []).append(row)
        cells = [mean_of(by_momentum.get(momentum, []), "last") for momentum in (None, *MOMENTA)]
        lines.append([workers, steps, f"{default:g}", *cells, min(map(len, by_momentum.values()))])
    momenta = [f"{momentum:g}, %" for momentum in MOMENTA]
    header = ["S", "local steps per round", "default", "no outer step, %", *momenta, "n, at least"]
    return Grid("Momenta of the outer optimizer", header, lines)


def optimizer(content: Content) -> Grid:
    lines = []
    for (method, workers), own in grouped(content["rows"], "method", "workers", titles=TITLES):
        by_optimizer = [[row for row in own if row["case"].get("optimizer", "sgd") == name] for name in ("sgd", "muon")]
        cells = [mean_of(rows, "last") for rows in by_optimizer]
        lines.append([TITLES[method], workers, *cells, min(map(len, by_optimizer))])
    return Grid("SGD and Muon in the local steps", ["", "S", "SGD, %", "Muon, %", "n, at least"], lines)


def rates(content: Content) -> Grid:
    return _by_rate(content, "Learning rates", "last_holdout", "hold-out accuracy, %")


def own_rate(content: Content) -> Grid:
    return _by_rate(content, "Own learning rates", "last", "test accuracy, %")


def _by_rate(content: Content, title: str, column: str, unit: str) -> Grid:
    found, lines = distinct(content["rows"], "lr"), []
    for (method, workers), own in grouped(content["rows"], "method", "workers", titles=TITLES):
        cells = [mean_of(chosen(own, lr=lr), column) for lr in found]
        lines.append([f"{TITLES[method]}, S = {workers}", *cells])
    return Grid(title, [unit, *(f"lr {lr:g}" for lr in found)], lines)


STUDIES = {"main": (conditions, summary, main)} | {
    make.__name__: (make,)
    for make in (
        check, design, local_steps, momentum, batch_norm, scale, wire, overlap, outer, optimizer, own_rate, rates,
    )
}  # fmt: skip
TABLES = (
    page_tables(RESULTS, STUDIES, "accuracy_")
    | page_tables(JPEG, STUDIES, "accuracy_jpeg_")
    | page_tables(QUARTER, STUDIES, "accuracy_quarter_")
    | page_tables(SHORT, STUDIES, "accuracy_short_")
)
