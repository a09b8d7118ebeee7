"""The picture of the soak: seconds from a fault to the end of the last survivor, by kind and place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.lines import Line2D

from experiments.faults.faults import KINDS, PLACES
from experiments.harness.figures import BLUE, GREEN, GREY, INK, LIGHT, ORANGE, PURPLE, SKY, VERMILION, drawn
from experiments.harness.tables import Content

COLOURS = dict(zip(PLACES, (BLUE, SKY, GREEN, ORANGE, PURPLE, VERMILION), strict=True))
NOTE: dict[str, Any] = {
    "xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": "center", "color": GREY, "fontsize": 10,
}  # fmt: skip
MARKERS = {"forked": "o", "popen": "^", "torchrun": "s"}


def draw_seconds(path: Path, content: Content) -> Path:
    """A row for each kind, a mark for each fault: colour by place, shape by launcher."""
    rows = [row for row in content["rows"] if row["seconds"] is not None]
    kinds = [kind for kind in KINDS if any(row["kind"] == kind for row in content["rows"])]
    title = f"{len(content['rows'])} faults: when the last survivor had ended"
    with drawn(path, 11, 2.0 + 0.72 * len(kinds), title) as figure:
        axes = figure.add_subplot()
        for row in rows:
            # Marks of one kind lie in rows by place; an end at once has no place on a logarithmic axis.
            offset = (PLACES.index(row["place"]) - (len(PLACES) - 1) / 2) * 0.12
            axes.plot(
                max(row["seconds"], 0.01), kinds.index(row["kind"]) + offset, MARKERS[row["launcher"]],
                color=COLOURS[row["place"]], markersize=6, alpha=0.8, markeredgewidth=0,
            )  # fmt: skip
        for border in range(len(kinds) - 1):
            axes.axhline(border + 0.5, color=LIGHT, linewidth=0.8)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_yticks(range(len(kinds)), [kind.replace("_", " ") for kind in kinds])
        axes.set(xlabel="seconds from the fault to the end of the last survivor", ylim=(len(kinds) - 0.5, -0.5))
        axes.tick_params(axis="y", length=0)
        axes.grid(True, axis="x")
        handles = [
            Line2D([], [], color=COLOURS[p], marker="o", linestyle="", label=p.replace("_", "-")) for p in PLACES
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
        shapes = [Line2D([], [], color=INK, marker=MARKERS[name], linestyle="", label=name) for name in MARKERS]
        figure.legend(handles=shapes, loc="outside upper right", ncols=len(shapes))
        settings = content["settings"]
        for name in ("silence", "timeout"):
            axes.axvline(settings[f"{name}_seconds"], color=GREY, linewidth=1.2, linestyle=(0, (4, 2)))
            axes.annotate(name, (settings[f"{name}_seconds"], 1), (0, 3), **NOTE)
    return path
