"""The tables of the paper's own accounting."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import mean

from experiments.harness.tables import Content, Grid, Row, page_tables

RESULTS = Path(__file__).parent / "results"
MB, GB, G = 1e6, 1e9, 1e9

# Derived by hand from the widths and the numbers of blocks; the paper itself prints none.
BY_HAND_GMACS = {22: 2.443, 11: 1.612, 6: 1.235, 5: 1.159, 4: 1.084}


def table_1(content: Content) -> Grid:
    def printed(row: Row, method: str) -> str:
        ours, theirs = row[f"{method}_bytes"] / GB, row["printed_gb"][method]
        return f"{theirs:.3f}{'' if round(ours, 3) == theirs else _difference(ours, theirs)}"

    rows = [
        [
            str(row["workers"]), _counts(row["held"]), f"{row['local_sgd_bytes'] / GB:.5f}", printed(row, "local_sgd"),
            f"{row['resist_bytes'] / GB:.5f}", printed(row, "resist"),
        ]
        for row in content["volumes"]["table_1"]
    ]  # fmt: skip
    header = ["S", "blocks per worker", "local SGD, ours", "printed", "ResIST, ours", "printed"]
    return Grid("Table 1 of the paper: GB per round", header, rows)


def peer_to_peer(content: Content) -> Grid:
    rows = []
    for row, paper in zip(content["volumes"]["peer_to_peer"], content["volumes"]["table_1"], strict=True):
        cells = [str(row["workers"]), f"{paper['resist_bytes'] / GB:.3f}"]
        for key in ("same_blocks", "defaults"):
            sent = row[key]["sent_bytes"]
            cells += [f"{sent / GB:.3f} ({sent / paper['resist_bytes']:.2f})", f"{sent / row['workers'] / GB:.3f}"]
        rows.append([*cells, f"{row['local_sgd']['sent_bytes'] / GB:.3f}"])
    header = ["S", "paper's accounting", "ours, the paper's blocks", "per worker", "ours, our defaults", "per worker"]
    title = "What a round sends peer to peer, GB (share of the paper's accounting)"
    return Grid(title, [*header, "local SGD, our all-reduce"], rows)


def parameters(content: Content) -> Grid:
    def stated(row: Row) -> str:
        return f"{row['stated']['parameters']:,}" if row["stated"] else ""

    return Grid.of("Parameters", content["networks"], {
        "network": lambda row: row["network"],
        "parameters": lambda row: f"{row['parameters']['all']:,}",
        "torchvision states": stated,
        "partitionable blocks": lambda row: row["blocks"],
        "shared": lambda row: f"{row['parameters']['shared']:,}",
        "per block": lambda row: f"{row['parameters']['by_block'][0]:,}",
        "partitioned": lambda row: f"{1 - row['parameters']['shared'] / row['parameters']['all']:.1%}",
    })  # fmt: skip


def macs_of_101(content: Content) -> Grid:
    network = content["networks"][0]
    full = network["macs"]["all"]
    even = [one for one in network["subnets"] if len(set(one["held"])) == 1]
    measured = {network["blocks"]: full} | {subnet["held"][0]: subnet["macs"] for subnet in even}
    return Grid.of(f"Multiply-adds of a sub-network of the paper's {network['network']}", BY_HAND_GMACS.items(), {
        "blocks of the worker": lambda item: item[0],
        "GMAC, counted": lambda item: f"{measured[item[0]] / G:.3f}",
        "by hand": lambda item: f"{item[1]:.3f}",
        "share of the full network": lambda item: f"{measured[item[0]] / full:.3f}",
    })  # fmt: skip


def _macs(content: Content, minimum: str) -> Grid:
    rows = []
    for row in content["networks"]:
        stated, subnets = row["stated"].get("gmacs"), _subnets(row, minimum)
        off = max(abs(subnet["ratio"] - subnet["ratio_by_formula"]) for subnet in subnets)
        start = [row["network"], f"{row['blocks']}: {_means(subnets)}", f"{row['macs']['partitioned_share']:.3f}"]
        start += [f"{row['macs']['all'] / G:.3f}", "" if stated is None else f"{stated:.3f}"]
        cells = [f"{subnet['macs'] / G:.3f} ({subnet['ratio']:.3f})" for subnet in subnets]
        rows.append([*start, *cells, f"{off:.6f}"])
    sizes = " / ".join(map(str, content["workers"]))
    header = ["network", f"N: mean k for S = {sizes}", "f", "full", "torchvision states"]
    header += [f"S = {workers} (r)" for workers in content["workers"]]
    title = f"GMAC per image, mean sub-network, {_minimum_in_words(minimum)}"
    return Grid(title, [*header, "r off the formula by"], rows)


def _memory(content: Content, minimum: str) -> Grid:
    rows = []
    for row in content["networks"]:
        full = 3 * 4 * row["parameters"]["all"]
        shares = [f"{s['memory_bytes'] / MB:,.1f} ({s['memory_share']:.3f})" for s in _subnets(row, minimum)]
        rows.append([row["network"], f"{full / MB:,.1f}", *shares])
    header = ["network", "full, MB", *(f"S = {workers}, MB (share)" for workers in content["workers"])]
    return Grid(f"(2 + m)(Q + k b), computed, m = 1, mean worker, {_minimum_in_words(minimum)}", header, rows)


def memory_measured(content: Content) -> Grid:
    rows = []
    for group in content["measured"]:
        steps = [step for worker in group["by_worker"] for step in worker["steps"]]
        held, bound = (mean(step[key] for step in steps) for key in ("held_bytes", "bound_bytes"))
        exact = sum(step["held_bytes"] == step["bound_bytes"] for step in steps)
        blocks = _counts([worker["steps"][0]["blocks"] for worker in group["by_worker"]])
        cells = [f"{held / MB:,.3f}", f"{bound / MB:,.3f}", f"{held / group['full_bytes']:.3f}"]
        start = [str(group["workers"]), f"{group['width_multiplier']:g}", blocks]
        rows.append([*start, *cells, f"{exact} of {len(steps)}"])
    header = [
        "S",
        "width",
        "blocks per worker",
        "held, MB",
        "3 (Q + k b), MB",
        "share of the full",
        "equal to the byte",
    ]
    return Grid("Held by real workers after each local step: parameters, gradients and momentum", header, rows)


def bytes_measured(content: Content) -> Grid:
    rows = []
    for group in content["measured"]:
        workers, each = group["by_worker"], group["rounds"] * MB
        sent, formula = (sum(one[key] for one in workers) / each for key in ("sent_bytes", "sent_bytes_by_formula"))
        exact = sum(one["sent_bytes"] == one["sent_bytes_by_formula"] for one in workers)
        rows.append([str(len(workers)), f"{sent:,.3f}", f"{formula:,.3f}", f"{exact} of {len(workers)}"])
    header = ["S", "counted, MB per round", "closed form, MB per round", "workers equal to the byte"]
    return Grid("Sent by the same workers, all together", header, rows)


def machine(content: Content) -> str:
    found = content["machine"]
    gpu = found["gpu"] or "no GPU"
    versions = ", ".join(f"{name} {found[name]}" for name in ("python", "torch"))
    versions += f", torchvision {found['torchvision']}"
    rounds = content["settings"]["rounds"]
    return f"{found['cores']} CPU cores ({found['processor']}), {gpu}; {versions}; bytes sent: mean of n = {rounds} rounds' plans.\n"


def macs(content: Content) -> Grid:
    return _macs(content, "default")


def macs_even(content: Content) -> Grid:
    return _macs(content, "none")


def memory(content: Content) -> Grid:
    return _memory(content, "default")


def memory_even(content: Content) -> Grid:
    return _memory(content, "none")


def _subnets(row: Row, minimum: str) -> list[Row]:
    return [subnet for subnet in row["subnets"] if subnet["minimum"] == minimum]


def _minimum_in_words(minimum: str) -> str:
    return "default minimum of blocks" if minimum == "default" else "no minimum (min_blocks=0)"


def _means(subnets: list[Row]) -> str:
    """Mean blocks per worker, for each number of workers."""
    return " / ".join(f"{mean(subnet['held']):g}" for subnet in subnets)


def _counts(held: list[int]) -> str:
    """``6, 6, 5, 5``; equal ones once."""
    return str(held[0]) if len(set(held)) == 1 else ", ".join(map(str, held))


def _difference(ours: float, printed: float) -> str:
    return " (cut off, not rounded)" if math.floor(ours * 1000) == round(printed * 1000) else " (differs)"


STUDIES = {
    "paper_tables": (
        machine, table_1, peer_to_peer, parameters, macs_of_101, macs, macs_even, memory, memory_even, memory_measured,
        bytes_measured,
    )
}  # fmt: skip
TABLES = page_tables(RESULTS, STUDIES, "paper_")
