"""The tables of IST's experiments."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from experiments.harness.tables import (
    Content,
    Grid,
    Row,
    Rows,
    chosen,
    distinct,
    grouped,
    machine,
    mean_of,
    page_tables,
    seeds,
    values,
)  # fmt: skip
from experiments.harness.words import bytes_in_words
from experiments.ist.cases import ABLATED, HOLDERS, LOCAL_STEPS, RATES_SEED, TASKS, rate_of
from experiments.ist.memory import closed_form
from experiments.ist.shapes import BATCH, GBITS, speed_up
from experiments.links import tables as links
from experiments.time_to_accuracy import tables as time_to_accuracy

RESULTS = Path(__file__).parent / "results"
TITLES = {"single": "one process", "ddp": "DDP", "local_sgd": "local SGD", "ist": "IST"}
USUAL = {
    "local_steps": LOCAL_STEPS, "momentum": "reset", "sgd_momentum": 0.0, "norm": "batch", "output_norm": False,
    "schedule": "constant", "finish": False, "shares": "", "finish_rounds": 0,
}  # fmt: skip


def usual(rows: Rows, **wanted: Any) -> Rows:
    """Rows with the main table's settings, except ``wanted``; single and DDP have no rounds."""
    found = chosen(rows, **{**USUAL, **wanted})
    if "local_steps" not in wanted:
        found += chosen(rows, **{**USUAL, "local_steps": 0, **wanted})
    return [row for row in found if row["case"]["seed"] != RATES_SEED and row["case"]["lr"] == _rate(row["case"])]


def _rate(case: dict[str, Any]) -> float:
    return rate_of(case["task"], case["sgd_momentum"])


def conditions(content: Content) -> str:
    """The conditions of the accuracies."""
    size, lines = content["settings"]["size"], []
    for name in distinct(content["rows"], "task"):
        task, rows = TASKS[name], chosen(content["rows"], task=name)
        own = ", ".join(f"{title} {task.lr:g}" for title in TITLES.values())
        lines.append(
            f"- `{name}`: {task.title}; {task.depth} linear layers, hidden {task.width[size]}, batch norm; "
            f"{rows[0]['samples']:,} training samples for every method, {task.batch} per worker and local step; SGD "
            f"without momentum or decay, constant rate ({own}).\n"
        )
    seeded = seeds([row for row in content["rows"] if row["case"]["seed"] != RATES_SEED])
    lines.append(
        f"- Rounds of {LOCAL_STEPS} local steps where nothing else is said. Mean ± standard deviation over n = {seeded} "
        f"seeds. {machine(content)}.\n"
    )
    return "".join(lines)


def accuracy(content: Content) -> Grid:
    lines = []
    for (task, method, workers), rows in grouped(content["rows"], "task", "method", "workers", titles=TITLES):
        own = usual(rows)
        if not own:
            continue
        sent = mean(row["sent_bytes"] for row in own)
        base = usual(content["rows"], task=task, method="local_sgd", workers=workers)
        less = f"{base[0]['sent_bytes'] / sent:.1f}x" if method == "ist" and base and sent else "-"
        cells = [own[0]["local_steps_done"], mean_of(own, "last"), len(own)]
        lines.append([task, TITLES[method], workers, *cells, bytes_in_words(sent) if sent else "-", less])
    header = ["task", "method", "S", "local steps", "test, %", "n", "sent by a worker", "less than local SGD"]
    return Grid("Accuracy on equal samples", header, lines)


def finish(content: Content) -> Grid:
    lines = []
    for (task, workers), _ in grouped(chosen(content["rows"], finish=True), "task", "workers"):
        of = partial(usual, content["rows"], task=task, workers=workers)
        without, with_it = of(method="ist"), of(method="ist", finish=True)
        cells = [mean_of(rows, "last") for rows in (without, with_it, of(method="local_sgd"))]
        lines.append([task, workers, *cells, len(without), _sent(without), _sent(with_it)])
    header = ["task", "S", "IST, %", "IST, the last tenth as local SGD, %", "local SGD, %", "n"]
    return Grid("A finish", [*header, "sent by a worker: IST", "with the finish"], lines)


def holders(content: Content) -> Grid:
    lines = []
    for (task, workers), _ in grouped(chosen(content["rows"], method="ist", shares="0.5"), "task", "workers"):
        of = partial(usual, content["rows"], task=task, workers=workers)
        base = of(method="local_sgd")
        if base:
            lines.append([task, workers, "local SGD", mean_of(base, "last"), "-", len(base), _sent(base), "1.00"])
        for shares, last in (("", 0), *HOLDERS):
            own = of(method="ist", shares=shares, finish_rounds=last)
            if not own:
                continue
            lost, part = _against(base, own)
            cells = [mean_of(own, "last"), lost, len(own), _sent(own), part]
            lines.append([task, workers, _setting(shares, last), *cells])
    # Seeds of one task may have been trained before those of another.
    lines.sort(key=lambda line: list(TASKS).index(str(line[0])))
    header = ["task", "S", "IST with", "test, %", "points lost", "n", "sent by a worker", "part of local SGD's"]
    return Grid("Several holders for each neuron", header, lines)


def _against(base: Rows, own: Rows) -> tuple[str, str]:
    """Points by which the base is better, and the sent bytes as a share of its own."""
    if not base:
        return "-", "-"
    lost = mean(values(base, "last")) - mean(values(own, "last"))
    part = mean(values(own, "sent_bytes")) / mean(values(base, "sent_bytes"))
    return f"{lost:.2f}", f"{part:.2f}"


def _setting(shares: str, finish_rounds: int) -> str:
    """The options of a setting, in words."""
    if not shares:
        return "one holder (the paper's)"
    text = f"`growth=[{shares}]`" if "," in shares else f"`min_share={shares}`"
    return f"{text}, `finish_rounds={finish_rounds}`" if finish_rounds else text


def _sent(rows: Rows) -> str:
    return bytes_in_words(mean(row["sent_bytes"] for row in rows)) if rows else "-"


def _pair(content: Content, task: str, **wanted: Any) -> list[object]:
    """Accuracies of IST and of local SGD with a setting changed, and n."""
    ist, local_sgd = (
        usual(content["rows"], task=task, workers=ABLATED, method=method, **wanted) for method in ("ist", "local_sgd")
    )
    return [mean_of(ist, "last"), mean_of(local_sgd, "last"), len(ist)]


def local_steps(content: Content) -> Grid:
    lines = []
    for (task, length), own in grouped(chosen(content["rows"], method="ist", workers=ABLATED), "task", "local_steps"):
        sent = _sent(usual(own, local_steps=length))
        lines.append([task, length, *_pair(content, task, local_steps=length), sent])
    header = ["task", "local steps per round", "IST, %", "local SGD, %", "n", "sent by a worker of IST"]
    return Grid(f"Length of a round, S = {ABLATED}", header, lines)


def schedule(content: Content) -> Grid:
    lines = [
        [task, option, *_pair(content, task, schedule=option)]
        for task in distinct(content["rows"], "task")
        for option in ("constant", "multistep")
    ]
    return Grid(f"Learning rate, S = {ABLATED}", ["task", "learning rate", "IST, %", "local SGD, %", "n"], lines)


def norm(content: Content) -> Grid:
    lines = [
        [task, kind, "yes" if output else "no", *_pair(content, task, norm=kind, output_norm=output)]
        for task in distinct(content["rows"], "task")
        for kind in ("batch", "layer", "none")
        for output in (False, True)
    ]
    header = ["task", "norm of hidden layers", "norm of the outputs", "IST, %", "local SGD, %", "n"]
    return Grid(f"Norms, S = {ABLATED}", header, lines)


def momentum(content: Content) -> Grid:
    lines = []
    for task in distinct(content["rows"], "task"):
        for policy in ("reset", "keep", "travel"):
            own = usual(content["rows"], task=task, method="ist", workers=ABLATED, sgd_momentum=0.9, momentum=policy)
            lines.append([task, f"`{policy}`", mean_of(own, "last"), len(own), _sent(own)])
    header = ["task", "momentum at a sync", "IST, %", "n", "sent by a worker"]
    return Grid(f"Momentum 0.9, S = {ABLATED}", header, lines)


def batch_norm(content: Content) -> Grid:
    lines = []
    for (task, workers), _ in grouped(chosen(content["rows"], finish=True), "task", "workers"):
        own = usual(content["rows"], task=task, method="ist", workers=workers)
        cells = [mean_of(own, policy) for policy in ("recalibrate", "running", "batch")]
        lines.append([task, workers, *cells, len(own)])
    header = ["task", "S", "`recalibrate`, %", "`running`, %", "`batch` (as in the authors' code), %", "n"]
    return Grid("Batch-norm statistics of the full model: evaluations of the same trainings", header, lines)


def rates(content: Content) -> Grid:
    rows = [row for row in content["rows"] if row["case"]["seed"] == RATES_SEED]
    lines = []
    found = distinct(rows, "lr")
    for (task, method, workers), own in grouped(rows, "task", "method", "workers", titles=TITLES):
        cells = [mean_of(chosen(own, lr=lr), "last_holdout") for lr in found]
        lines.append([task, f"{TITLES[method]}, S = {workers}", *cells])
    return Grid(
        "Learning rates", ["task", "hold-out accuracy, %, of one seed", *(f"rate {lr:g}" for lr in found)], lines
    )


def memory(content: Content) -> Grid:
    lines = []
    for group in content["groups"]:
        steps = [step for worker in group["by_worker"] for step in worker["steps"]]
        parts = {key: max(step[key] for step in steps) for key in steps[0]}
        held = sum(parts[key] for key in ("parameters", "gradients", "momentum"))
        expected = closed_form(group)
        whole = 3 * (group["inner"] + group["outer"] + group["shared"])
        bare, peak = (max(worker[key] for worker in group["by_worker"]) for key in ("bare_resident", "peak_resident"))
        lines.append([
            group["width"],
            group["workers"],
            *(bytes_in_words(parts[key]) for key in ("parameters", "gradients", "momentum")),
            f"{held / whole:.4f}",
            f"{held / expected['held']:.4f}",
            f"1/{3 * group['inner'] / parts['inner']:.2f}",
            bytes_in_words(parts["store"]),
            f"1/{group['inner'] / parts['store']:.2f}" if parts["store"] else "-",
            *(bytes_in_words(resident) for resident in (bare, parts["resident"], peak)),
        ])  # fmt: skip
    header = ["hidden width", "S", "parameters", "gradients", "momentum", "share of the full model's"]
    header += ["measured / closed form", "inner matrices: share", "store on the host", "share of the inner matrices"]
    return Grid("Held by a worker, at most", [*header, "resident: before the model", "in training", "peak"], lines)


def _volumes(content: Content) -> list[tuple[Row, Row]]:
    return [(row, volume) for row in content["rows"] for volume in row["by_workers"]]


def _network(row: Row) -> str:
    return f"{row['depth']} layers, hidden {row['width']}"


def shapes(content: Content) -> Grid:
    lines = []
    for row, volume in _volumes(content):
        weights = volume["weights"]
        seconds = row["seconds"]
        workers = str(volume["workers"])
        sent = [bytes_in_words(volume[key]) for key in ("ist_round", "local_sgd_round", "ddp_step")]
        less = f"{volume['local_sgd_round'] / volume['ist_round']:.1f}x"
        less_than_ddp = f"{volume['ddp_step'] * LOCAL_STEPS / volume['ist_round']:.0f}x"
        start = [_network(row), workers, f"{weights:,} (1/{row['weights'] / weights:.1f})"]
        lines.append([*start, *sent, less, less_than_ddp, f"{seconds[workers]:.3f} ({seconds['1']:.3f})"])
    header = ["network", "S", "weights of a worker", "IST per round", "local SGD per round", "DDP per step"]
    header += ["less than local SGD", f"less than DDP in {LOCAL_STEPS} steps", "s per local step (full model)"]
    return Grid("The paper's networks: bytes that a worker sends, and compute", header, lines)


def speed(content: Content) -> Grid:
    lines = []
    for row, volume in _volumes(content):
        for gbit in GBITS:
            found = speed_up(row, volume, gbit)
            cells = [f"{found[key]:.3f}" for key in ("ist", "local_sgd", "ddp")]
            gains = [f"{found[key]:.1f}x" for key in ("over_local_sgd", "over_ddp")]
            lines.append([_network(row), volume["workers"], f"{gbit:g} Gbit/s", *cells, *gains])
    header = ["network", "S", "link", "IST, s per local step", "local SGD", "DDP", "faster than local SGD", "than DDP"]
    return Grid("The paper's networks: seconds per local step, by formula", header, lines)


def step_conditions(content: Content) -> str:
    """The conditions of the measured seconds of the paper's networks."""
    settings = content["settings"]
    return (
        f"{settings['inputs']} inputs, 35 classes, batch {BATCH}, one thread; n = {settings['steps']} local steps "
        f"(median), {settings['rounds']} rounds (mean of bytes). {machine(content)}.\n"
    )


# Numbers of IST's paper, as its authors' project page gives them; none of them is ours. Source: the page of the project
# (GitHub akyrillidis/ist, IST.html, of July 2021), its text and its Table 3. The body of the paper was not available to us.


def paper_accuracy() -> str:
    """Final accuracy [page, Table 3]."""
    rows = [
        ["speech, 2 layers (hidden 4096)", "0.7938", "0.7998", "0.8153"],
        ["speech, 3 layers (hidden 8192)", "0.7950", "0.7992", "0.8327"],
    ]
    return Grid("", ["the paper's own", "data parallel", "local SGD", "IST"], rows).markdown()


def paper_speed_up() -> str:
    """Time to an accuracy [page, text]."""
    header = ["the paper's own", "time to", "IST faster than local SGD", "than data parallel"]
    rows = [["speech, 2 layers", "77 %", "4.2x", "10.6x"], ["speech, 3 layers", "77 %", "6.1x", "16.6x"]]
    return Grid("", header, rows).markdown()


STUDIES = {
    "accuracy": (conditions, accuracy, holders, finish, local_steps, schedule, norm, momentum, batch_norm, rates),
    "memory": (memory,),
    "shapes": (step_conditions, shapes, speed),
}
TABLES = {
    **page_tables(RESULTS, STUDIES, "ist_"),
    "ist_paper_accuracy": paper_accuracy,
    "ist_paper_speed_up": paper_speed_up,
    **page_tables(RESULTS, {"links": (links.links_claim, links.links_speed, links.links_bytes)}, "ist_"),
    **page_tables(RESULTS, time_to_accuracy.STUDIES, "ist_"),
}
