"""The tables of the paper's own accounting."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import mean

from experiments.harness.tables import Content, Grid, Row, page_tables

RESULTS = Path(__file__).parent / "results"
MB, GB, G = 1e6, 1e9, 1e9

BY_HAND_GMACS = {22: 2.443, 11: 1.612, 6: 1.235, 5: 1.159, 4: 1.084}
"""Section 3 of the specification, derived there by hand; the paper itself prints none."""


def table_1(content: Content) -> Grid:
    rows = []
    for row in content["volumes"]["table_1"]:
        cells = [str(row["workers"]), _counts(row["held"])]
        for method in ("local_sgd", "resist"):
            ours, printed = row[f"{method}_bytes"] / GB, row["printed_gb"][method]
            cells += [f"{ours:.5f}", f"{printed:.3f}{'' if round(ours, 3) == printed else _difference(ours, printed)}"]
        rows.append(cells)
    header = ["S", "blocks per worker", "local SGD, ours", "printed", "ResIST, ours", "printed"]
    return Grid("Table 1 of the paper: GB per round", header, rows)


def peer_to_peer(content: Content) -> Grid:
    rows = []
    for row, paper in zip(content["volumes"]["peer_to_peer"], content["volumes"]["table_1"], strict=True):
        same, defaults, workers = row["same_blocks"], row["defaults"], row["workers"]
        rows.append(
            [
                str(workers),
                f"{paper['resist_bytes'] / GB:.3f}",
                f"{same['sent_bytes'] / GB:.3f} ({same['sent_bytes'] / paper['resist_bytes']:.2f})",
                f"{same['sent_bytes'] / workers / GB:.3f}",
                f"{defaults['sent_bytes'] / GB:.3f} ({defaults['sent_bytes'] / paper['resist_bytes']:.2f})",
                f"{defaults['sent_bytes'] / workers / GB:.3f}",
                f"{row['local_sgd']['sent_bytes'] / GB:.3f}",
            ]
        )
    header = [
        "S",
        "paper's accounting",
        "ours, the paper's blocks",
        "per worker",
        "ours, our defaults",
        "per worker",
        "local SGD, our all-reduce",
    ]
    return Grid("What a round sends peer to peer, GB (share of the paper's accounting)", header, rows)


def parameters(content: Content) -> Grid:
    rows = []
    for row in content["networks"]:
        counted, stated = row["parameters"], row["stated"].get("parameters")
        (block,) = counted["by_block"]
        rows.append(
            [
                row["network"],
                f"{counted['all']:,}",
                "" if stated is None else f"{stated:,}",
                str(row["blocks"]),
                f"{counted['shared']:,}",
                f"{block:,}",
                f"{1 - counted['shared'] / counted['all']:.1%}",
            ]
        )
    header = [
        "network",
        "parameters",
        "torchvision states",
        "partitionable blocks",
        "shared",
        "per block",
        "partitioned",
    ]
    return Grid("Parameters", header, rows)


def macs_of_101(content: Content) -> Grid:
    network = content["networks"][0]
    full = network["macs"]["all"]
    measured = {network["blocks"]: full}
    for subnet in network["subnets"]:
        if len(set(subnet["held"])) == 1:
            measured[subnet["held"][0]] = subnet["macs"]
    rows = [
        [str(blocks), f"{measured[blocks] / G:.3f}", f"{by_hand:.3f}", f"{measured[blocks] / full:.3f}"]
        for blocks, by_hand in BY_HAND_GMACS.items()
    ]
    header = ["blocks of the worker", "GMAC, counted", "by hand", "share of the full network"]
    return Grid(f"Multiply-adds of a sub-network of the paper's {network['network']}", header, rows)


def _macs(content: Content, minimum: str) -> Grid:
    rows = []
    for row in content["networks"]:
        stated, subnets = row["stated"].get("gmacs"), _subnets(row, minimum)
        rows.append(
            [
                row["network"],
                f"{row['blocks']}: {_means(subnets)}",
                f"{row['macs']['partitioned_share']:.3f}",
                f"{row['macs']['all'] / G:.3f}",
                "" if stated is None else f"{stated:.3f}",
                *(f"{subnet['macs'] / G:.3f} ({subnet['ratio']:.3f})" for subnet in subnets),
                f"{max(abs(subnet['ratio'] - subnet['ratio_by_formula']) for subnet in subnets):.6f}",
            ]
        )
    sizes = " / ".join(map(str, content["workers"]))
    header = ["network", f"N: mean k for S = {sizes}", "f", "full", "torchvision states"]
    header += [f"S = {workers} (r)" for workers in content["workers"]]
    return Grid(
        f"GMAC per image, mean sub-network, {_minimum_in_words(minimum)}", [*header, "r off the formula by"], rows
    )


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
        rows.append(
            [
                str(group["workers"]),
                f"{group['width_multiplier']:g}",
                _counts([worker["steps"][0]["blocks"] for worker in group["by_worker"]]),
                f"{held / MB:,.3f}",
                f"{bound / MB:,.3f}",
                f"{held / group['full_bytes']:.3f}",
                f"{exact} of {len(steps)}",
            ]
        )
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
        sent, formula = (
            sum(worker[key] for worker in group["by_worker"]) for key in ("sent_bytes", "sent_bytes_by_formula")
        )
        exact = sum(worker["sent_bytes"] == worker["sent_bytes_by_formula"] for worker in group["by_worker"])
        each = group["rounds"] * MB
        workers = group["workers"]
        rows.append([str(workers), f"{sent / each:,.3f}", f"{formula / each:,.3f}", f"{exact} of {workers}"])
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
