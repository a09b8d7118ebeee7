"""The picture of one step whose stages train at the same time: measured times of computing and waiting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from experiments.harness.figures import BLUE, GREEN, GREY, LIGHT, ORANGE, PURPLE, SKY, YELLOW, drawn

Spans = Sequence[tuple[str, float, float]]  # name, begin and end in seconds, of all workers on the same clock

WAIT = "wait"
COLOURS: Mapping[str, str] = {
    "data": YELLOW, "aux forward": PURPLE, "forward": SKY, "loss": GREEN, "backward": BLUE, "optimizer": GREY,
    "aux backward": ORANGE, WAIT: LIGHT,
}  # fmt: skip
WORDS = {"data": "batch", "aux forward": "guess", "aux backward": "learning to guess", WAIT: "waiting"}
LABELLED = 0.04  # minimum share of the picture's width that a name needs


def kind(name: str) -> str:
    """The kind as which a span is drawn: all waits alike."""
    return WAIT if name.startswith(WAIT) else name


def shares(timeline: Sequence[Spans]) -> list[float]:
    """For each worker, the share of its own step in which it did not wait, 0 to 1."""
    found = []
    for spans in timeline:
        waits = [to - since for name, since, to in spans if kind(name) == WAIT]
        begin, end = _ends([spans])
        found.append(1 - sum(waits) / (end - begin))
    return found


def draw_timeline(path: Path, timeline: Sequence[Spans], title: str = "One step") -> Path:
    """A row for each worker with its spans in a step, from the first begin to the last end."""
    begin, end = _ends(timeline)
    busy = ", ".join(f"worker {worker} computes {share:.0%}" for worker, share in enumerate(shares(timeline)))
    said = f"{1000 * (end - begin):.3g} ms; of its own step, {busy}"
    with drawn(path, 11, 1.9 + 0.62 * len(timeline), title, said) as figure:
        axes = figure.add_subplot()
        for worker, spans in enumerate(timeline):
            for name, since, to in spans:
                _draw(axes, worker, name, since - begin, to - begin, end - begin)
        axes.set(xlim=(0, 1000 * (end - begin)), ylim=(len(timeline) - 0.5, -0.5), xlabel="milliseconds")
        axes.set_yticks(range(len(timeline)), [f"worker {worker}" for worker in range(len(timeline))])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        there = {kind(name) for spans in timeline for name, _, _ in spans}
        handles = [Patch(color=COLOURS[name], label=WORDS.get(name, name)) for name in COLOURS if name in there]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9.5, handlelength=1)
    return path


def _draw(axes: Axes, worker: int, name: str, since: float, to: float, whole: float) -> None:
    drawn = kind(name)
    axes.barh(worker, 1000 * (to - since), left=1000 * since, height=0.72, color=COLOURS[drawn], linewidth=0)
    if (to - since) / whole > LABELLED and drawn in ("forward", "backward", WAIT):
        words = "" if drawn == WAIT else drawn
        axes.text(500 * (since + to), worker, words, ha="center", va="center", fontsize=9, color="white")


def _ends(timeline: Sequence[Spans]) -> tuple[float, float]:
    spans = [span for of_worker in timeline for span in of_worker]
    return min(since for _, since, _ in spans), max(to for _, _, to in spans)
