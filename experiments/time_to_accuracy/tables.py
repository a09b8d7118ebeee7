"""The table of the time to accuracy."""

from __future__ import annotations

from pathlib import Path

from experiments.harness.tables import Content, Grid, Row, Rows, page_tables
from experiments.links.tables import bandwidth, title, with_kernel
from experiments.networks import in_words

RESULTS = Path(__file__).parent / "results"


def reached(row: Row, accuracy: float) -> float | None:
    """Seconds until a test accuracy was first seen; None if it never was."""
    found = (s for s, a in zip(row["seconds"], row["accuracy"], strict=True) if a >= accuracy)
    return next(found, None)


def target(rows: Rows) -> float:
    """The accuracy that every method reached: the minimum of their best, rounded down to a whole per cent."""
    least_of_best = min(max(row["accuracy"]) for row in rows)
    return int(100 * least_of_best + 1e-9) / 100  # 0.29 times 100 is a little less than 29


def time_to_accuracy(content: Content) -> Grid:
    """A row per link and method; the goal is the accuracy that all of them reached."""
    rows = content["rows"]
    goal, lines = target(rows), []
    for row in rows:
        same_link = [other for other in rows if other["bandwidth_gbit"] == row["bandwidth_gbit"]]
        base = next((reached(other, goal) for other in same_link if other["method"] == "ddp"), None)
        own, sent = reached(row, goal), row["kernel_sent_bytes"][-1]
        lines.append([
            bandwidth(row["bandwidth_gbit"]),
            title(row["method"]),
            f"{row['seconds'][-1]:.1f}",
            f"{sent / 1e6:,.1f} MB" if sent else "-",
            f"{100 * row['accuracy'][-1]:.1f} %",
            "-" if own is None else f"{own:.1f}",
            f"{base / own:.2f}x" if base and own else "-",
        ])  # fmt: skip
    header = ["link", "method", "seconds of training", "sent by a worker", "last test accuracy"]
    return Grid("Time to accuracy", [*header, f"seconds to {goal:.0%}", "faster than DDP"], lines)


def time_to_accuracy_claim(content: Content) -> str:
    """The conditions of the trainings, in words."""
    settings = content["settings"]
    of_each = "all" if settings["limit"] is None else f"{settings['limit']:,}"
    return (
        f"- {with_kernel(content)}\n"
        f"- {settings['workers']} workers of {settings['threads']} thread, n = 1 training of each method; "
        f"{in_words(settings['network'])}; {settings['steps']} local steps of batch "
        f"{settings['batch']} for every worker and method, {settings['local_steps']} of a round. Data: {settings['data']}, "
        f"{of_each} training {'images' if 'image' in settings['data'] else 'examples'} of each class.\n"
    )


STUDIES = {"time_to_accuracy": (time_to_accuracy_claim, time_to_accuracy)}
TABLES = page_tables(RESULTS, STUDIES)
