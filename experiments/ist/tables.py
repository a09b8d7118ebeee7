"""The tables of IST's experiments, from their result files: on the screen and in README.md (experiments/harness/tables.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from experiments.accuracy.tables import Rows, chosen, distinct, seeds, spread, values
from experiments.harness.record import read_if_made
from experiments.harness.words import bytes_in_words
from experiments.ist import links
from experiments.ist.cases import ABLATED, LOCAL_STEPS, RATES_SEED, rate_of
from experiments.ist.paper import paper_accuracy, paper_speed_up
from experiments.ist.size_tables import memory, shapes, speed, step_conditions
from experiments.ist.tasks import TASKS
from experiments.paper_tables.tables import Grid

RESULTS = Path(__file__).parent / "results"
TITLES = {"single": "one process", "ddp": "DDP", "local_sgd": "local SGD", "ist": "IST"}
USUAL = {
    "local_steps": LOCAL_STEPS, "momentum": "reset", "sgd_momentum": 0.0, "norm": "batch", "output_norm": False,
    "schedule": "constant", "finish": False,
}  # fmt: skip
NOT_YET = "Not measured yet.\n"

Content = dict[str, Any]


def usual(rows: Rows, **wanted: Any) -> Rows:
    """Rows of the main table's settings, but for what is wanted; of single and DDP there are no rounds."""
    found = chosen(rows, **{**USUAL, **wanted})
    if "local_steps" not in wanted:
        found += chosen(rows, **{**USUAL, "local_steps": 0, **wanted})
    return [row for row in found if row["case"]["seed"] != RATES_SEED and row["case"]["lr"] == _rate(row["case"])]


def accuracy(content: Content) -> Grid:
    lines = []
    for task, method, workers in _methods(content["rows"]):
        own = usual(content["rows"], task=task, method=method, workers=workers)
        sent = mean(row["sent_bytes"] for row in own)
        base = [row["sent_bytes"] for row in usual(content["rows"], task=task, method="local_sgd", workers=workers)]
        lines.append(
            [
                task,
                TITLES[method],
                str(workers),
                str(own[0]["local_steps_done"]),
                spread(values(own, "last")),
                str(len(own)),
                bytes_in_words(sent) if sent else "-",
                f"{base[0] / sent:.1f}x" if method == "ist" and base and sent else "-",
            ]
        )
    header = ["task", "method", "S", "local steps", "test, %", "n", "sent by a worker", "less than local SGD"]
    return Grid("Accuracy on equal samples", header, lines)


def finish(content: Content) -> Grid:
    lines = []
    for task in distinct(content["rows"], "task"):
        for workers in distinct(chosen(content["rows"], task=task, finish=True), "workers"):
            of = partial(usual, content["rows"], task=task, workers=workers)
            pair = of(method="ist"), of(method="ist", finish=True)
            sent = [bytes_in_words(mean(row["sent_bytes"] for row in rows)) for rows in pair]
            cells = [spread(values(rows, "last")) for rows in (*pair, of(method="local_sgd"))]
            lines.append([task, str(workers), *cells, str(len(pair[0])), *sent])
    header = [
        "task",
        "S",
        "IST, %",
        "IST, the last tenth as local SGD, %",
        "local SGD, %",
        "n",
        "sent by a worker: IST",
    ]
    return Grid("A finish", [*header, "with the finish"], lines)


def local_steps(content: Content) -> Grid:
    lines = []
    for task in distinct(content["rows"], "task"):
        rows = chosen(content["rows"], task=task, method="ist", workers=ABLATED)
        for length in distinct(rows, "local_steps"):
            of = partial(usual, content["rows"], task=task, workers=ABLATED, local_steps=length)
            cells = [spread(values(of(method=method), "last")) for method in ("ist", "local_sgd")]
            sent = mean(row["sent_bytes"] for row in of(method="ist"))
            lines.append([task, str(length), *cells, str(len(of(method="ist"))), bytes_in_words(sent)])
    header = ["task", "local steps per round", "IST, %", "local SGD, %", "n", "sent by a worker of IST"]
    return Grid(f"Length of a round, S = {ABLATED}", header, lines)


def schedule(content: Content) -> Grid:
    return _both(content, "schedule", "learning rate", ("constant", "multistep"))


def _both(content: Content, key: str, title: str, options: tuple[str, ...]) -> Grid:
    lines = []
    for task in distinct(content["rows"], "task"):
        for option in options:
            of = partial(usual, content["rows"], task=task, workers=ABLATED, **{key: option})
            cells = [spread(values(of(method=method), "last")) for method in ("ist", "local_sgd")]
            lines.append([task, option, *cells, str(len(of(method="ist")))])
    return Grid(f"{title.capitalize()}, S = {ABLATED}", ["task", title, "IST, %", "local SGD, %", "n"], lines)


def norm(content: Content) -> Grid:
    lines = []
    for task in distinct(content["rows"], "task"):
        for kind in ("batch", "layer", "none"):
            for output in (False, True):
                of = partial(usual, content["rows"], task=task, workers=ABLATED, norm=kind, output_norm=output)
                cells = [spread(values(of(method=method), "last")) for method in ("ist", "local_sgd")]
                lines.append([task, kind, "yes" if output else "no", *cells, str(len(of(method="ist")))])
    header = ["task", "norm of hidden layers", "norm of the outputs", "IST, %", "local SGD, %", "n"]
    return Grid(f"Norms, S = {ABLATED}", header, lines)


def momentum(content: Content) -> Grid:
    lines = []
    for task in distinct(content["rows"], "task"):
        for policy in ("reset", "keep", "travel"):
            own = usual(content["rows"], task=task, method="ist", workers=ABLATED, sgd_momentum=0.9, momentum=policy)
            sent = bytes_in_words(mean(row["sent_bytes"] for row in own)) if own else "-"
            lines.append([task, f"`{policy}`", spread(values(own, "last")), str(len(own)), sent])
    header = ["task", "momentum at a sync", "IST, %", "n", "sent by a worker"]
    return Grid(f"Momentum 0.9, S = {ABLATED}", header, lines)


def batch_norm(content: Content) -> Grid:
    lines = []
    for task in distinct(content["rows"], "task"):
        for workers in distinct(chosen(content["rows"], task=task, finish=True), "workers"):
            own = usual(content["rows"], task=task, method="ist", workers=workers)
            cells = [spread(values(own, policy)) for policy in ("recalibrate", "running", "batch")]
            lines.append([task, str(workers), *cells, str(len(own))])
    header = ["task", "S", "`recalibrate`, %", "`running`, %", "`batch` (as in the authors' code), %", "n"]
    return Grid("Batch-norm statistics of the full model: evaluations of the same trainings", header, lines)


def rates(content: Content) -> Grid:
    rows = [row for row in content["rows"] if row["case"]["seed"] == RATES_SEED]
    found = distinct(rows, "lr")
    lines = [
        [
            task,
            f"{TITLES[method]}, S = {workers}",
            *(spread(values(chosen(own, lr=lr), "last_holdout")) for lr in found),
        ]
        for task, method, workers in _methods(rows)
        for own in [chosen(rows, task=task, method=method, workers=workers)]
    ]
    header = ["task", "hold-out accuracy, %, of one seed", *(f"rate {lr:g}" for lr in found)]
    return Grid("Learning rates", header, lines)


def _methods(rows: Rows) -> Iterator[tuple[str, str, int]]:
    found = {(row["case"]["task"], row["case"]["method"], row["case"]["workers"]) for row in rows}
    tasks, methods = distinct(rows, "task"), list(TITLES)
    yield from sorted(found, key=lambda entry: (tasks.index(entry[0]), methods.index(entry[1]), entry[2]))


def _rate(case: dict[str, Any]) -> float:
    return rate_of(case["task"], case["method"], case["sgd_momentum"])


GRIDS: dict[str, tuple[Callable[[Content], Grid], ...]] = {
    "accuracy": (accuracy, finish, local_steps, schedule, norm, momentum, batch_norm, rates),
    "memory": (memory,),
    "shapes": (shapes, speed),
}


def grids(name: str, content: Content) -> list[Grid]:
    """All tables of a study."""
    return [make(content) for make in GRIDS[name]]


def read(name: str, folder: Path = RESULTS) -> Content | None:
    """A result file; None if it was not made."""
    return read_if_made(folder / f"{name}.jsonl")


def _written(name: str, make: Callable[[Content], Grid]) -> str:
    return _told(name, lambda content: make(content).markdown())


def _told(name: str, tell: Callable[[Content], str]) -> str:
    content = read(name)
    return tell(content) if content else NOT_YET


def conditions(content: Content) -> str:
    """What the accuracies were measured with."""
    size, machine, lines = content["settings"]["size"], content["machine"], []
    for name in distinct(content["rows"], "task"):
        task, rows = TASKS[name], chosen(content["rows"], task=name)
        own = ", ".join(f"{TITLES[method]} {lr:g}" for method, lr in task.lr.items())
        lines.append(
            f"- `{name}`: {task.title}; {task.depth} linear layers, hidden {task.width[size]}, batch norm; "
            f"{rows[0]['samples']:,} training samples for every method, {task.batch} per worker and local step; SGD "
            f"without momentum or decay, constant rate ({own}).\n"
        )
    seeded = seeds([row for row in content["rows"] if row["case"]["seed"] != RATES_SEED])
    lines.append(
        f"- Rounds of {LOCAL_STEPS} local steps where nothing else is said. Mean ± standard deviation over n = {seeded} "
        f"seeds. {machine['cores']} CPU cores ({machine['processor']}), torch {machine['torch']}.\n"
    )
    return "".join(lines)


TABLES: dict[str, Callable[[], str]] = {
    "ist_conditions": partial(_told, "accuracy", conditions),
    "ist_step_conditions": partial(_told, "shapes", step_conditions),
    **{f"ist_{make.__name__}": partial(_written, name, make) for name, makes in GRIDS.items() for make in makes},
    "ist_paper_accuracy": paper_accuracy,
    "ist_paper_speed_up": paper_speed_up,
    **links.TABLES,
}
