"""The tables of memory and of the paper's networks."""

from __future__ import annotations

from typing import Any

from experiments.harness.words import bytes_in_words
from experiments.ist.cases import LOCAL_STEPS
from experiments.ist.memory import closed_form
from experiments.ist.shapes import BATCH, GBITS, speed_up
from experiments.paper_tables.tables import Grid

Content = dict[str, Any]


def memory(content: Content) -> Grid:
    lines = []
    for group in content["groups"]:
        steps = [step for worker in group["by_worker"] for step in worker["steps"]]
        parts = {key: max(step[key] for step in steps) for key in steps[0]}
        held, expected = sum(parts[key] for key in ("parameters", "gradients", "momentum")), closed_form(group)
        whole = 3 * (group["inner"] + group["outer"] + group["shared"])
        bare, peak = (max(worker[key] for worker in group["by_worker"]) for key in ("bare_resident", "peak_resident"))
        lines.append(
            [
                str(group["width"]),
                str(group["workers"]),
                *(bytes_in_words(parts[key]) for key in ("parameters", "gradients", "momentum")),
                f"{held / whole:.4f}",
                f"{held / expected['held']:.4f}",
                f"1/{3 * group['inner'] / parts['inner']:.2f}",
                bytes_in_words(parts["store"]),
                f"1/{group['inner'] / parts['store']:.2f}" if parts["store"] else "-",
                *(bytes_in_words(resident) for resident in (bare, parts["resident"], peak)),
            ]
        )
    header = [
        "hidden width",
        "S",
        "parameters",
        "gradients",
        "momentum",
        "share of the full model's",
        "measured / closed form",
    ]
    header += [
        "inner matrices: share",
        "store on the host",
        "share of the inner matrices",
        "resident: before the model",
        "in training",
        "peak",
    ]
    return Grid("Held by a worker, at most", header, lines)


def shapes(content: Content) -> Grid:
    lines = []
    for row in content["rows"]:
        for volume in row["by_workers"]:
            lines.append(
                [
                    _network(row),
                    str(volume["workers"]),
                    f"{volume['weights']:,} (1/{row['weights'] / volume['weights']:.1f})",
                    *(bytes_in_words(volume[key]) for key in ("ist_round", "local_sgd_round", "ddp_step")),
                    f"{volume['local_sgd_round'] / volume['ist_round']:.1f}x",
                    f"{volume['ddp_step'] * LOCAL_STEPS / volume['ist_round']:.0f}x",
                    f"{row['seconds'][str(volume['workers'])]:.3f} ({row['seconds']['1']:.3f})",
                ]
            )
    header = ["network", "S", "weights of a worker", "IST per round", "local SGD per round", "DDP per step"]
    header += ["less than local SGD", f"less than DDP in {LOCAL_STEPS} steps", "s per local step (full model)"]
    return Grid("The paper's networks: bytes that a worker sends, and compute", header, lines)


def speed(content: Content) -> Grid:
    lines = []
    for row in content["rows"]:
        for volume in row["by_workers"]:
            for gbit in GBITS:
                found = speed_up(row, volume, gbit)
                cells = [f"{found[key]:.3f}" for key in ("ist", "local_sgd", "ddp")]
                gains = [f"{found[key]:.1f}x" for key in ("over_local_sgd", "over_ddp")]
                lines.append([_network(row), str(volume["workers"]), f"{gbit:g} Gbit/s", *cells, *gains])
    header = ["network", "S", "link", "IST, s per local step", "local SGD", "DDP", "faster than local SGD", "than DDP"]
    return Grid("The paper's networks: seconds per local step, by formula", header, lines)


def _network(row: dict[str, Any]) -> str:
    return f"{row['depth']} layers, hidden {row['width']}"


def step_conditions(content: Content) -> str:
    """What the seconds of the paper's networks were measured with."""
    settings, machine = content["settings"], content["machine"]
    return (
        f"{settings['inputs']} inputs, 35 classes, batch {BATCH}, one thread; n = {settings['steps']} local steps "
        f"(median), {settings['rounds']} rounds (mean of bytes). {machine['cores']} CPU cores ({machine['processor']}), "
        f"torch {machine['torch']}.\n"
    )
