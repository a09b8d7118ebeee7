"""The tables of the sweep: accuracy on the hold-out by one setting, or by two."""

from __future__ import annotations

from experiments.auxnet.cases import HYBRID, STEP_WORKERS, SWEEP_SEED, SWEEP_WORKERS, base, title
from experiments.harness.tables import Content, Grid, Rows, chosen, distinct, spread

ONE_AT_A_TIME = ("beta", "aux_width", "aux_learning_rate", "warmup_steps")


def betas(content: Content) -> Grid:
    """Of the penalty method: beta by the size of the auxiliary networks."""
    rows = _usual(_of_two(content), "aux_learning_rate", "warmup_steps")
    found, lines = distinct(rows, "beta"), []
    for task in distinct(rows, "task"):
        for width in distinct(rows, "aux_width"):
            cells = [_cell(chosen(rows, task=task, aux_width=width, beta=beta)) for beta in found]
            lines.append([task, str(width), *cells])
    return Grid("β and the auxiliary networks' width", ["task", "width", *(f"β = {beta:g}" for beta in found)], lines)


def betas_of_others(content: Content) -> Grid:
    rows = [row for row in content["rows"] if row["case"]["method"] not in ("penalty", HYBRID)]
    found = distinct(rows, "beta")
    lines = [
        [task, title(method), *(_cell(chosen(rows, task=task, method=method, beta=beta)) for beta in found)]
        for task in distinct(rows, "task")
        for method in distinct(rows, "method")
    ]
    return Grid("β of the other methods", ["task", "method", *(f"β = {beta:g}" for beta in found)], lines)


def aux_rates(content: Content) -> Grid:
    return _one(content, "aux_learning_rate", "rate of the auxiliary networks")


def warmups(content: Content) -> Grid:
    return _one(content, "warmup_steps", "warm-up steps")


def hybrids(content: Content) -> Grid:
    """Every so many steps one of back-propagation; never is the penalty method with its defaults."""
    never = _usual(_of_two(content), *ONE_AT_A_TIME)
    rows = chosen(content["rows"], method=HYBRID)
    found = sorted(distinct(rows, "serial_every"), reverse=True)
    lines = [
        [
            task,
            _cell(chosen(never, task=task)),
            *(_cell(chosen(rows, task=task, serial_every=every)) for every in found),
        ]
        for task in distinct(rows, "task")
    ]
    return Grid("Serial steps", ["task", "never", *(f"every {every} steps" for every in found)], lines)


def lambda_steps(content: Content) -> Grid:
    rows = chosen(content["rows"], workers=STEP_WORKERS)
    found = sorted(distinct(rows, "lambda_step"))
    lines = [
        [task, *(_cell(chosen(rows, task=task, lambda_step=step)) for step in found)] for task in distinct(rows, "task")
    ]
    return Grid(f"Step of the guesses, K = {STEP_WORKERS}", ["task", *(f"c = {step:g}" for step in found)], lines)


def _of_two(content: Content) -> Rows:
    return chosen(content["rows"], method="penalty", workers=SWEEP_WORKERS)


def _one(content: Content, key: str, name: str) -> Grid:
    others = [other for other in ONE_AT_A_TIME if other != key]
    rows = _usual(_of_two(content), *others)
    found = distinct(rows, key)
    lines = [
        [task, *(_cell(chosen(rows, task=task, **{key: value})) for value in found)] for task in distinct(rows, "task")
    ]
    return Grid(name.capitalize(), ["task", *(f"{value:g}" for value in found)], lines)


def _usual(rows: Rows, *keys: str) -> Rows:
    """Rows that have the defaults of these settings; of a smoke run, whose warm-up is shorter, its own."""
    kept = rows
    for key in keys:
        usual = [
            row
            for row in kept
            if row["case"][key] == base(row["case"]["task"], "penalty", SWEEP_WORKERS, SWEEP_SEED).key[key]
        ]
        kept = usual or kept
    return kept


def _cell(rows: Rows) -> str:
    if any(row.get("diverged") for row in rows):
        return "diverged"
    return spread(row["last_holdout"] for row in rows)


MADE = (betas, betas_of_others, aux_rates, warmups, hybrids, lambda_steps)
