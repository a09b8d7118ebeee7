"""The tables of the sweep: accuracy on the hold-out by one setting, or by two."""

from __future__ import annotations

from collections.abc import Mapping

from experiments.auxnet.cases import HYBRID, STEP_WORKERS, SWEEP_SEED, SWEEP_WORKERS, TITLES, base, title
from experiments.harness.tables import Content, Grid, Rows, chosen, distinct, grouped, mean_of

ONE_AT_A_TIME = ("beta", "aux_width", "aux_learning_rate", "warmup_steps")


def betas(content: Content) -> Grid:
    """The penalty method: beta by the size of the auxiliary networks."""
    rows = _usual(_of_two(content), "aux_learning_rate", "warmup_steps")
    return _by(rows, "beta", "β = {:g}", "β and the auxiliary networks' width", {"task": "task", "aux_width": "width"})


def betas_of_others(content: Content) -> Grid:
    rows = [row for row in content["rows"] if row["case"]["method"] not in ("penalty", HYBRID)]
    return _by(rows, "beta", "β = {:g}", "β of the other methods", {"task": "task", "method": "method"})


def aux_rates(content: Content) -> Grid:
    return _one(content, "aux_learning_rate", "Rate of the auxiliary networks")


def warmups(content: Content) -> Grid:
    return _one(content, "warmup_steps", "Warm-up steps")


def hybrids(content: Content) -> Grid:
    """One step of back-propagation in every so many; never is the penalty method with its defaults."""
    never = _usual(_of_two(content), *ONE_AT_A_TIME)
    rows = chosen(content["rows"], method=HYBRID)
    found = sorted(distinct(rows, "serial_every"), reverse=True)
    lines = []
    for (task,), own in grouped(rows, "task"):
        lines.append([task, _cell(chosen(never, task=task)), *(_cell(chosen(own, serial_every=n)) for n in found)])
    return Grid("Serial steps", ["task", "never", *(f"every {every} steps" for every in found)], lines)


def lambda_steps(content: Content) -> Grid:
    rows = chosen(content["rows"], workers=STEP_WORKERS)
    return _by(rows, "lambda_step", "c = {:g}", f"Step of the guesses, K = {STEP_WORKERS}")


def _of_two(content: Content) -> Rows:
    return chosen(content["rows"], method="penalty", workers=SWEEP_WORKERS)


def _one(content: Content, key: str, name: str) -> Grid:
    others = [other for other in ONE_AT_A_TIME if other != key]
    return _by(_usual(_of_two(content), *others), key, "{:g}", name)


def _by(rows: Rows, key: str, form: str, name: str, lines: Mapping[str, str] | None = None) -> Grid:
    """A column for each value of a key, a line for each value of others, which are given with their headers."""
    lines = lines or {"task": "task"}
    found, made = distinct(rows, key), []
    for start, own in grouped(rows, *lines, titles=TITLES):
        words = [title(word) if word in TITLES else word for word in start]
        made.append([*words, *(_cell(chosen(own, **{key: value})) for value in found)])
    return Grid(name, [*lines.values(), *map(form.format, found)], made)


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
    return mean_of(rows, "last_holdout")


MADE = (betas, betas_of_others, aux_rates, warmups, hybrids, lambda_steps)
