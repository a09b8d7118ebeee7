"""The tables of the experiments on links."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from experiments.harness.tables import Content, Grid, Row, page_tables
from experiments.links.link_model import step_seconds, sync_seconds
from experiments.networks import in_words
from resist_lightning.schedule.overlap import choose_overlap

RESULTS = Path(__file__).parent / "results"
TITLES = {
    "ddp": "DDP (Lightning's)", "local_sgd": "local SGD", "resist": "ResIST", "ist": "IST",
    "none": "no communication (the limit)", "parameter_server": "parameter server (computed)",
}  # fmt: skip

# Workers, width of the network, Gbit/s and local steps of a round, for which issue 16 has an aim.
AIMS = {(2, 1.0, 0.1, 50): 1.05, (2, 1.0, 1, 50): 1.01, (2, 1.0, 1, 5): 1.10}


def title(method: str) -> str:
    """A method in words; ``resist_int8`` is ResIST, int8."""
    if method in TITLES:
        return TITLES[method]
    base, _, wire = method.rpartition("_")
    return f"{TITLES.get(base, base)}, {wire}"


def bandwidth(gbit: float | None) -> str:
    """A link in words."""
    return "unshaped" if gbit is None else f"{gbit:g} Gbit/s"


def links_claim(content: Content) -> str:
    """The results against the aims, for the rows that have an aim."""
    rows = [row for row in content["rows"] if (row["bytes_per_sync"] or {}).get("counted")]
    equal = all(row["bytes_per_sync"]["counted"] == row["bytes_per_sync"]["closed_form"] for row in rows)
    sent = [row["bytes_per_sync"] for row in rows]
    extra = [found["kernel"] / found["counted"] - 1 for found in sent if found["kernel"] is not None]
    lines = [f"- {with_kernel(content)}", f"- {_work(content['settings'])}"]
    lines.append(f"- Our count of bytes {'equals' if equal else 'does NOT equal'} the closed form.")
    if extra:
        lines.append(f"- The kernel counted {100 * min(extra):.1f} to {100 * max(extra):.1f} % more than we.")
    for row in rows:
        if row["method"] in ("resist", "ist") and row["sync_over_ideal"]:
            lines.append(
                f"- {title(row['method'])} at {bandwidth(row['bandwidth_gbit'])}: a sync takes {row['sync_over_ideal']:.2f} of bytes / "
                f"bandwidth, a local step {row['step_over_ideal']:.2f} of what compute and link allow"
                f"{_against(row)}."
            )
    return "\n".join(lines) + "\n"


def _against(row: Row) -> str:
    found = [
        f"{row[key]:.2f} times as fast as {name}"
        for key, name in (("speed_up_over_ddp", "DDP"), ("speed_up_over_local_sgd", "local SGD"))
        if row[key]
    ]
    return f"; {' and '.join(found)}" if found else ""


def with_kernel(content: Content) -> str:
    """The hardware and the versions of a record, in words."""
    stamp = content["machine"]
    return (
        f"{stamp['cores']} CPU cores, {stamp['processor']}; torch {stamp['torch']}, Lightning {stamp['lightning']}, "
        f"Linux {stamp['kernel']}, TCP {stamp['tcp']}."
    )


def _work(settings: Mapping[str, Any]) -> str:
    return (
        f"{settings['workers']} workers of {settings['threads']} thread; {in_words(settings['network'])}, "
        f"batch {settings['batch']}. n = {settings['rounds']} syncs, each after "
        f"{settings['steps_per_round']} local steps that were really run; the table shows rounds of "
        f"{settings['local_steps']}. DDP: {settings['ddp_steps']} steps."
    )


def links_summary(content: Content) -> Grid:
    """Seconds per local step of every method over every link, and how many times as fast as DDP."""
    links = list(dict.fromkeys(row["bandwidth_gbit"] for row in content["rows"]))
    cells: dict[str, dict[float | None, str]] = {}
    sent: dict[str, str] = {}
    for row in content["rows"]:
        if row["method"] == "parameter_server":
            continue
        gain = "" if row["method"] in ("ddp", "none") else f" ({_number(row['speed_up_over_ddp'], 'x', 1)})"
        cells.setdefault(row["method"], {})[row["bandwidth_gbit"]] = f"{_seconds(row['seconds_per_step'])} s{gain}"
        found = row["bytes_per_sync"] or {"closed_form": 0}
        sent[row["method"]] = _megabytes(found["closed_form"] / row["local_steps"])
    rows = [[title(m), sent[m], *(by_link.get(link, "-") for link in links)] for m, by_link in cells.items()]
    return Grid("Summary", ["", "sent per local step", *map(bandwidth, links)], rows)


def links_speed(content: Content) -> Grid:
    """Seconds: a row's step and its parts."""

    def part(name: str) -> Any:
        return lambda row: _seconds(row["parts"][name] / row["local_steps"] if row["parts"] else None)

    return Grid.of("Speed", content["rows"], {
        "link": lambda row: bandwidth(row["bandwidth_gbit"]),
        "method": lambda row: title(row["method"]),
        "s per local step": lambda row: _seconds(row["seconds_per_step"]),
        "compute": lambda row: _seconds(row["compute_seconds"]),
        "sync": lambda row: _seconds(row["sync_seconds"] / row["local_steps"]),
        "of it averaging": part("averaging"),
        "hand-over": part("hand_over"),
        "packing": part("packing"),
        "faster than DDP": lambda row: _number(row["speed_up_over_ddp"], "x"),
        "than local SGD": lambda row: _number(row["speed_up_over_local_sgd"], "x"),
        "share of the limit": lambda row: "-" if row["share_of_limit"] is None else f"{100 * row['share_of_limit']:.1f} %",
        "sync / (bytes / bandwidth)": lambda row: _number(row["sync_over_ideal"]),
    })  # fmt: skip


def links_bytes(content: Content) -> Grid:
    """Bytes and memory: of one worker."""
    lines = []
    for row in content["rows"]:
        sent = row["bytes_per_sync"] or {"kernel": None, "counted": None, "closed_form": 0}
        basis = sent["counted"] or sent["closed_form"]
        ratio = _number(sent["kernel"] / basis, digits=4) if sent["kernel"] and basis else "-"
        counts = [_megabytes(sent[key]) for key in ("kernel", "counted", "closed_form")]
        held = [_megabytes(sent["closed_form"] / row["local_steps"]), _megabytes(row["held_bytes"])]
        start = [bandwidth(row["bandwidth_gbit"]), title(row["method"]), str(row["local_steps"]) if basis else "-"]
        lines.append([*start, *counts, ratio, *held, _megabytes(row["peak_rss_bytes"])])
    header = ["link", "method", "local steps per sync", "sent per sync: kernel", "our count", "closed form"]
    header += ["kernel / count", "sent per local step", "held", "peak memory"]
    return Grid("Bytes and memory of one worker", header, lines)


def nodes_claim(content: Content) -> str:
    """The conditions, and whether counts, closed forms and kernel agree."""
    settings, rows = content["settings"], [row for row in content["rows"] if row["bytes_per_sync"]]
    nodes = settings["workers"] // settings["per_node"]
    equal = all(row["bytes_per_sync"]["counted"] in (None, row["bytes_per_sync"]["closed_form"]) for row in rows)
    sent = [row["bytes_per_sync"] for row in rows]
    extra = [found["kernel"] / found["crossing"] - 1 for found in sent if found["kernel"] is not None]
    lines = [
        f"- {with_kernel(content)}",
        f"- {nodes} nodes of {settings['per_node']} processes. In all rows: {_work(settings)}",
        f"- Our count of bytes {'equals' if equal else 'does NOT equal'} the closed form.",
    ]
    if extra:
        more = f"{100 * min(extra):.2f} to {100 * max(extra):.2f} % more"
        lines.append(f"- By the kernel, {more} crosses the slow link than by the closed form.")
    return "\n".join(lines) + "\n"


def nodes(content: Content) -> Grid:
    """Nodes of several processes: seconds, and the bytes of one node."""
    settings = content["settings"]

    def method(row: Row) -> str:
        if row["method"] == "ddp":
            return f"{title('ddp')}, {settings['workers']} processes"
        per_worker = settings["per_node"] if row["method"].endswith("_node") else 1
        return (
            f"{title(row['method'].removesuffix('_node'))}, {settings['workers'] // per_worker} workers of {per_worker}"
        )

    def sent(key: str) -> Any:
        return lambda row: _megabytes((row["bytes_per_sync"] or {}).get(key))

    def kernel_over_form(row: Row) -> str:
        found = row["bytes_per_sync"]
        return _number(found["kernel"] / found["crossing"], digits=4) if found and found["kernel"] else "-"

    return Grid.of("Workers of several processes", content["rows"], {
        "link": lambda row: bandwidth(row["bandwidth_gbit"]),
        "method": method,
        "s per local step": lambda row: _seconds(row["seconds_per_step"]),
        "compute": lambda row: _seconds(row["compute_seconds"]),
        "sync": lambda row: _seconds(row["sync_seconds"] / row["local_steps"]),
        "faster than DDP": lambda row: _number(row["speed_up_over_ddp"], "x"),
        "local steps per sync": lambda row: row["local_steps"] if row["bytes_per_sync"] else "-",
        "crosses per sync: kernel": sent("kernel"),
        "closed form": sent("crossing"),
        "kernel / closed form": kernel_over_form,
        "sent by the node's processes: our count": sent("counted"),
        "inside workers: per local step": lambda row: _megabytes(row.get("inside_bytes", {}).get("step")),
        "per sync": lambda row: _megabytes(row.get("inside_bytes", {}).get("sync")),
        "sync / (bytes / bandwidth)": lambda row: _number(row["sync_over_ideal"]),
    })  # fmt: skip


def receives_first(content: Content) -> Grid:
    """Seconds of an exchange, by the way of calling gloo."""
    return Grid.of("Ways to exchange", content["seconds"].items(), {
        "way": lambda way: f"`{way[0]}`",
        "seconds": lambda way: f"{mean(way[1]):.2f}",
        "against bytes / bandwidth": lambda way: f"{mean(way[1]) / content['ideal_seconds']:.2f}",
    })  # fmt: skip


def overlap_claim(content: Content) -> str:
    """The conditions, whether bytes and closed form agree, and the measurements against the aims."""
    settings, rows = content["settings"], content["rows"]
    equal = all(row["bytes_equal_closed_form"] for row in rows)
    lines = [
        f"- {with_kernel(content)}",
        f"- Workers of 1 thread; PreActResNet {settings['depth']}, batch {settings['batch']}.",
        f"- Our count of bytes {'equals' if equal else 'does NOT equal'} the closed form.",
    ]
    for none, row in _beside_none(content):
        aim = _aim(row["case"])
        if aim is not None and row["way"] != "waits":
            lines.append(
                f"- {bandwidth(row['case']['gbit'])}, rounds of {row['case']['local_steps']} steps, {_rounds(row)}: a local "
                f"step takes {mean(_ratios(row, none)):.3f} of one without communication; the aim is {aim:.2f}."
            )
    return "\n".join(lines) + "\n"


def overlap(content: Content) -> Grid:
    """Seconds of a local step, the share of a sync included, by way to overlap; and predicted."""
    lines: list[list[object]] = []
    header = ["workers", "width", "link", "local steps of a round", "rounds", "s per local step"]
    header += ["against no communication", "of single rounds", "predicted", "aim", "sent per sync"]
    for none, row in _beside_none(content):
        case, ratios, compute = row["case"], _ratios(row, none), _compute(none)
        sync = sync_seconds(row["link_bytes"], case["gbit"])
        predicted = step_seconds(compute, sync, row["local_steps"], row["overlap"]) / compute
        aim = _aim(case)
        lines.append([
            *_of_case(case), _rounds(row), _seconds(compute * mean(ratios)), f"{mean(ratios):.3f}",
            " ".join(f"{ratio:.3f}" for ratio in ratios), f"{predicted:.3f}",
            "-" if aim is None or row["way"] == "waits" else f"{aim:.2f}", _megabytes(row["sent_bytes"]),
        ])  # fmt: skip
    return Grid("A sync beside the training", header, lines + _predicted(content))


def _predicted(content: Content) -> list[list[object]]:
    """Predicted rows for more workers: as fast as measured ones, in proportion to each worker's computing."""
    lines: list[list[object]] = []
    for more in content.get("beyond", []):
        alone = [
            none for none, _ in _beside_none(content) if none["case"]["width_multiplier"] == more["width_multiplier"]
        ]
        if not alone:
            continue
        compute = more["computed"] * mean(_compute(none) for none in alone)
        for gbit, local_steps in dict.fromkeys((none["case"]["gbit"], none["case"]["local_steps"]) for none in alone):
            sync = sync_seconds(more["link_bytes"], gbit)
            chosen = choose_overlap([compute], [sync], local_steps)
            for words, steps in (("waits", 0), (f"auto: {chosen}", chosen)):
                seconds = step_seconds(compute, sync, local_steps, steps)
                shown = _of_case({**more, "gbit": gbit, "local_steps": local_steps})
                lines.append(
                    [*shown, words, "-", "-", "-", f"{seconds / compute:.3f}", "-", _megabytes(more["link_bytes"])]
                )
    return lines


def _beside_none(content: Content) -> list[tuple[Row, Row]]:
    """Every row that communicates, behind the one of its case that does not."""
    alone: list[Row] = [row for row in content["rows"] if row["way"] == "none"]
    return [
        (none, row) for none in alone for row in content["rows"] if row["case"] == none["case"] and row["way"] != "none"
    ]


def _ratios(row: Row, none: Row) -> list[float]:
    """For each round, the ratio of a local step to one without communication, for rounds of the case's length.

    The time that a sync adds to a round does not depend on the steps before its border, so fewer are really run.
    """
    syncs = max(1, row["steps"] // row["local_steps"])
    ratios = []
    for mine, alone in zip(row["seconds"], none["seconds"], strict=True):
        step = alone / none["steps"]
        added = (mine - row["steps"] * step) / syncs
        ratios.append(1 + added / (row["local_steps"] * step))
    return ratios


def _compute(none: Row) -> float:
    """Seconds of a local step without communication."""
    return mean(none["seconds"]) / float(none["steps"])


def _aim(case: Mapping[str, Any]) -> float | None:
    return AIMS.get(tuple(case[key] for key in ("workers", "width_multiplier", "gbit", "local_steps")))


def _of_case(case: Mapping[str, Any]) -> list[object]:
    return [case["workers"], f"x {case['width_multiplier']:g}", bandwidth(case["gbit"]), case["local_steps"]]


def _rounds(row: Row) -> str:
    """The kind of rounds of a row: waiting, or with their overlap."""
    if row["way"] == "fragments":
        return f"fragments, each {row['local_steps']} steps, overlap={row['overlap']}"
    return {"waits": "waits", "auto": f"auto: {row['overlap']}"}.get(row["way"], f"overlap={row['overlap']}")


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if value >= 0.1 or value == 0 else f"{value:.4f}"


def _number(value: float | None, unit: str = "", digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def _megabytes(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value / 1e6:,.2f} MB" if value < 1e8 else f"{value / 1e6:,.0f} MB"


STUDIES = {
    "links": (links_claim, links_summary, links_speed, links_bytes),
    "nodes": (nodes_claim, nodes),
    "receives_first": (receives_first,),
    "overlap": (overlap_claim, overlap),
}
TABLES = page_tables(RESULTS, STUDIES)
