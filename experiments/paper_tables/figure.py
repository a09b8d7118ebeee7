"""The picture: GB per round by number of workers, by the paper's accounting and as our workers send them."""

from __future__ import annotations

from pathlib import Path

from experiments.harness.figures import BLUE, GREY, INK, ORANGE, SKY, drawn
from experiments.harness.tables import Content

GB = 1e9
BAR = 0.2


def draw(path: Path, content: Content) -> Path:
    """Grouped bars, the number on each."""
    paper = content["volumes"]["table_1"]
    ours = content["volumes"]["peer_to_peer"]
    bars = [
        (GREY, "local SGD, printed in the paper", [row["printed_gb"]["local_sgd"] for row in paper]),
        (ORANGE, "local SGD, our all-reduce", [row["local_sgd"]["sent_bytes"] / GB for row in ours]),
        (SKY, "ResIST, printed in the paper", [row["printed_gb"]["resist"] for row in paper]),
        (BLUE, "ResIST, ours, from worker to worker", [row["same_blocks"]["sent_bytes"] / GB for row in ours]),
    ]
    shares = [mine / theirs for mine, theirs in zip(bars[3][2], bars[2][2], strict=True)]
    title = f"The paper's \"101\": ours sends {min(shares):.0%} to {max(shares):.0%} of the paper's ResIST volume"
    with drawn(path, 10, 5, title) as figure:
        axes = figure.add_subplot()
        for place, (colour, label, values) in enumerate(bars):
            left = [group + (place - 1.5) * BAR for group in range(len(values))]
            made = axes.bar(left, values, BAR * 0.92, color=colour, label=label)
            axes.bar_label(made, [f"{value:.3f}" for value in values], padding=2, fontsize=9, color=INK)
        counts = ["/".join(map(str, sorted(set(row["held"]), reverse=True))) for row in paper]
        labels = [f"S = {row['workers']}\n{count} blocks per worker" for row, count in zip(paper, counts, strict=True)]
        axes.set_xticks(range(len(labels)), labels)
        axes.tick_params(axis="x", length=0)
        axes.set_ylabel("GB per round, all workers")
        axes.grid(True, axis="y")
        axes.legend(loc="upper left")
    return path
