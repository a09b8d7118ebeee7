"""Tables from the result files: printed by run.py and put into README.md by experiments/harness/tables.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

from experiments.harness.record import read_if_made
from experiments.harness.tables import markdown

RESULTS = Path(__file__).parent / "results"
TITLES = {"single": "one process", "ddp": "DDP", "local_sgd": "local SGD", "resist": "ResIST"}
SETS = {"folder": "CIFAR-10, JPEG copy", "cifar10": "CIFAR-10", "digits": "digits of scikit-learn"}
NOT_YET = "Not measured yet.\n"

# Numbers of the paper, in per cent: Table 2 (CIFAR-10); supplement, Fig. 1 (CIFAR-10), Fig. 2 (CIFAR-100, read off the
# plot), Table 3 (CIFAR-10; S = 4 and 8 bits downwards).
PAPER_MAIN = {
    ("local_sgd", 2): "92.36 ± .01", ("local_sgd", 4): "92.90 ± .06", ("local_sgd", 8): "92.00 ± .07",
    ("resist", 2): "91.95 ± .32", ("resist", 4): "92.35 ± .22", ("resist", 8): "91.45 ± .30",
}  # fmt: skip
PAPER_LOCAL_STEPS = {
    "local_sgd": {50: 70.8, 100: 71.1, 250: 70.8, 500: 71.9},
    "resist": {50: 70.1, 100: 71.3, 250: 71.4, 500: 70.9},
}
PAPER_WIRE = {"int8": "92.14", "int6": "91.91", "int4": "76.33", "fp32": "92.35 (Table 2)"}

Rows = list[dict[str, Any]]
Content = dict[str, Any]


def spread(values: Iterable[float]) -> str:
    """Mean, spread over seeds (population standard deviation), and n where it is not clear from the claim."""
    found = list(values)
    if not found:
        return "-"
    return f"{mean(found):.2f} ± {pstdev(found):.2f}" if len(found) > 1 else f"{found[0]:.2f}"


def chosen(rows: Rows, **wanted: Any) -> Rows:
    """Rows whose case has these values."""
    return [row for row in rows if all(row["case"][key] == value for key, value in wanted.items())]


def values(rows: Rows, column: str) -> list[float]:
    """A column, or a policy such as ``batch, held share``."""
    return [row[column] if column in row else row["policies"][column] for row in rows]


def seeds(rows: Rows) -> int:
    return len({row["case"]["seed"] for row in rows})


def distinct(rows: Rows, key: str) -> list[Any]:
    """Values of ``key`` in the cases, in the order of their first appearance, numbers sorted."""
    found = list(dict.fromkeys(row["case"][key] for row in rows))
    return sorted(found) if all(isinstance(value, int | float) for value in found) else found


def claim(content: Content) -> str:
    """Hardware, versions, data, network and n."""
    machine, settings, rows = content["machine"], content["settings"], content["rows"]
    size = (8 if settings["data"] == "digits" else 32) // settings["shrink"]
    test = "all" if settings["limit_test"] is None else settings["limit_test"]
    train = "all" if settings["limit"] is None else settings["limit"]
    done = max(row["samples"] for row in rows)
    return (
        f"{SETS[settings['data']]} at {size} x {size} pixels ({train} training and {test} test images per class, "
        f"{100 * settings['holdout']:g} % of the training images held out); pre-activation network with "
        f"(1, 1, {settings['deep']}, 1) blocks at {settings['width']:g} of the paper's width, "
        f"{settings['deep'] - 1} of them partitioned; {done:,} training samples for every method, {settings['batch']} "
        f"per worker and local step, rounds of {settings['local_steps']} local steps, at least {settings['min_blocks']} blocks per worker, "
        f"lr {settings['lr']:g}, ÷10 at 50 % and 75 %; {machine['cores']} CPU cores ({machine['processor']}), python "
        f"{machine['python']}, torch {machine['torch']}; n = {seeds(rows)} seed{'s' if seeds(rows) > 1 else ''}.\n"
    )


def main(content: Content) -> str:
    rows = content["rows"]
    lines = []
    for method, workers in sorted({(row["case"]["method"], row["case"]["workers"]) for row in rows}, key=_place):
        own = chosen(rows, method=method, workers=workers)
        columns = [spread(values(own, column)) for column in ("last", "selected", "best_on_test")]
        lines.append(
            [
                TITLES[method],
                str(workers),
                str(own[0]["local_steps_done"]),
                str(len(own)),
                *columns,
                PAPER_MAIN.get((method, workers), "-"),
            ]
        )
    header = ["", "S", "local steps", "n", "last, %", "selected on hold-out, %"]
    header += ["best on test, % (for comparison with the paper only)", "the paper's, best on test, %"]
    return markdown(header, lines)


def _place(entry: tuple[str, int]) -> tuple[int, int]:
    return list(TITLES).index(entry[0]), entry[1]


def check(content: Content) -> str:
    lines = [
        [
            f"{TITLES[row['case']['method']]}, S = {row['case']['workers']}",
            str(row["local_steps"]),
            f"{row['equal_tensors']} of {row['tensors']}",
            f"{row['largest_difference']:.1e}",
            f"{row['largest_change_by_training']:.1e}",
            f"{row['test_simulated']:.2f}",
            f"{row['test_real']:.2f}",
        ]
        for row in content["rows"]
    ]
    header = ["", "local steps", "tensors equal bit for bit", "largest difference", "largest change by training"]
    return markdown([*header, "simulator, %", "real processes, %"], lines)


def design(content: Content) -> str:
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
        steps.append(
            (f"S = 8: at least {least} blocks", chosen(usual, min_blocks=least), "held share", printed.get(least, "-"))
        )
    for length in distinct(others, "local_steps"):
        steps.append((f"+ rounds of {length} local steps", chosen(eight, local_steps=length), "held share", "91.3"))
    lines = [
        [title, *(spread(values(own, f"{norm}, {scale}")) for norm in ("batch", "recalibrate")), str(len(own)), paper]
        for title, own, scale, paper in steps
    ]
    return markdown(["", "batch statistics, as in the paper, %", "`recalibrate`, %", "n", "the paper's, %"], lines)


def local_steps(content: Content) -> str:
    lines = []
    for length in distinct(content["rows"], "local_steps"):
        cells = [str(length)]
        for method in ("resist", "local_sgd"):
            own = chosen(content["rows"], method=method, local_steps=length)
            cells += [spread(values(own, "last")), str(PAPER_LOCAL_STEPS[method].get(length, "-"))]
        lines.append([*cells, str(own[0]["local_steps_done"] // length), str(len(own))])
    header = [
        "local steps per round",
        "ResIST, %",
        "the paper's (CIFAR-100)",
        "local SGD, %",
        "the paper's (CIFAR-100)",
        "rounds",
        "n",
    ]
    return markdown(header, lines)


def momentum(content: Content) -> str:
    lines = []
    for policy in distinct(content["rows"], "momentum"):
        own = chosen(content["rows"], momentum=policy)
        lines.append([f"`{policy}`", spread(values(own, "last")), spread(values(own, "last_holdout")), str(len(own))])
    return markdown(["momentum at a sync", "last, %", "hold-out, %", "n"], lines)


def batch_norm(content: Content) -> str:
    rows = content["rows"]
    workers = distinct(rows, "workers")
    lines = [
        [f"`{norm}`", *(spread(values(chosen(rows, workers=count), f"{norm}, held share")) for count in workers)]
        for norm in ("recalibrate", "running", "batch")
    ]
    return markdown(["statistics of the full model", *(f"S = {count}, %" for count in workers)], lines)


def scale(content: Content) -> str:
    blocks = content["settings"]["deep"] - 1
    lines = []
    for least in distinct(content["rows"], "min_blocks"):
        own = chosen(content["rows"], min_blocks=least)
        workers = own[0]["case"]["workers"]
        share = max(1 / workers, least / blocks)
        cells = [
            spread(values(own, f"{norm}, {label}"))
            for norm in ("recalibrate", "batch")
            for label in ("held share", "1/S", "none")
        ]
        lines.append([str(least), f"{share:.3f} / {1 / workers:.3f}", *cells, str(len(own))])
    columns = [f"`{norm}`, {label}, %" for norm in ("recalibrate", "batch") for label in ("k/N", "1/S", "unscaled")]
    return markdown(["least blocks (S = 8)", "k/N / 1/S", *columns, "n"], lines)


def wire(content: Content) -> str:
    lines = []
    for bits in distinct(content["rows"], "wire"):
        own = chosen(content["rows"], wire=bits)
        lines.append([f"`{bits}`", spread(values(own, "last")), str(len(own)), PAPER_WIRE.get(bits, "-")])
    return markdown(["on the wire", "last, %", "n", "the paper's, %"], lines)


def rates(content: Content) -> str:
    rows = content["rows"]
    lines = []
    for method, workers in sorted({(row["case"]["method"], row["case"]["workers"]) for row in rows}, key=_place):
        own = chosen(rows, method=method, workers=workers)
        cells = [spread(values(chosen(own, lr=lr), "last_holdout")) for lr in distinct(rows, "lr")]
        lines.append([f"{TITLES[method]}, S = {workers}", *cells])
    return markdown(["hold-out accuracy, %", *(f"lr {lr:g}" for lr in distinct(rows, "lr"))], lines)


GRIDS: dict[str, Callable[[Content], str]] = {
    grid.__name__: grid for grid in (main, check, design, local_steps, momentum, batch_norm, scale, wire, rates)
}


def read(name: str, folder: Path) -> Content | None:
    """A result file; None if there is none, or no row in it."""
    path = folder / f"{name}.jsonl"
    content: Content | None = read_if_made(path)
    return content if content and content["rows"] else None


def table(name: str, folder: Path = RESULTS) -> str:
    """The table of a study."""
    content = read(name, folder)
    return GRIDS[name](content) if content else NOT_YET


def machine(folder: Path = RESULTS) -> str:
    """The claim's conditions, from the main study."""
    content = read("main", folder)
    return claim(content) if content else NOT_YET


TABLES: dict[str, Callable[[], str]] = {
    "accuracy_conditions": machine,
    **{f"accuracy_{name}": partial(table, name) for name in GRIDS},
}
