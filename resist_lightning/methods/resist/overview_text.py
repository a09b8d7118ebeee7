"""Overviews of a partition as text: a table, and a few lines to print before training."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from resist_lightning.methods.resist.overview import Alternative, Costs, Row

_GLOBS, _KIND, _ENDS = 30, 20, 18
"""Widths of the columns whose cells are wrapped or cut."""


def table(rows: Sequence[Row]) -> str:
    """A table of at most 100 columns."""
    lines = _line(["blocks="], "class", "blocks", "MB", "FLOPs", "chosen", ["scale"])
    for row in rows:
        flops = "" if row.flops is None else f"{row.flops:.0%}"
        chosen = "yes" if row.chosen else "no"
        lines += _line(_shown(row), row.kind, str(row.blocks), f"{row.bytes / 1e6:.3g}", flops, chosen, _scale(row))
    return "\n".join(lines)


def costs_in_words(costs: Costs) -> str:
    """A sentence, on a few lines, about a worker's memory, messages and computing."""
    lines = [f"A worker {_held(costs)}", _sent(costs)]
    if costs.computed is None:
        lines[-1] += "."
    else:
        lines[-1] += ","
        lines.append(f"and computes {costs.computed:.0%} of the forward on average.")
    return "\n".join([*lines, evaluation_in_words(costs)])


def list_of(alternatives: Sequence[Alternative]) -> str:
    """The other choices, two lines each; empty if there are none."""
    lines = ["Other choices:"] if alternatives else []
    for other in alternatives:
        lines.append(f"  blocks={_option(other.globs)}")
        lines.append(f"    {other.blocks} block(s), a worker then holds {other.held:.0%}: {other.rule}")
    return "\n".join(lines)


def brief(costs: Costs, alternatives: Sequence[Alternative]) -> str:
    """At most six lines, to be printed before training."""
    lines = [f"  A worker {_held(costs)}", f"  and {_sent(costs)}.", f"  {evaluation_in_words(costs)}"]
    for other in alternatives:
        line = f"  Or blocks={_option(other.globs)}: {other.blocks} blocks, a worker holds {other.held:.0%}"
        lines.append(f"{line} ({other.rule}).")
    return "\n".join(lines)


def brief_of_shared(costs: Costs) -> str:
    """A line to be printed before a training in which every worker holds everything."""
    return f"  A worker sends {costs.sent[0] / 1e6:.3g} MB per sync. {evaluation_in_words(costs)}"


def _held(cost: Costs) -> str:
    """A clause about the memory of a worker."""
    mean, least, most = cost.held
    spread = "" if least == most else f", from {least / 1e6:.3g} to {most / 1e6:.3g} M"
    total = cost.parameters / 1e6
    share = mean / max(cost.parameters, 1)
    return f"holds {mean / 1e6:.3g} of {total:.3g} M parameters ({share:.0%}) on average{spread},"


def _sent(cost: Costs) -> str:
    """A clause about the messages of a worker."""
    mean, least, most = cost.sent
    spread = "" if least == most else f", from {least / 1e6:.3g} to {most / 1e6:.3g} MB"
    return f"sends {mean / 1e6:.3g} MB per sync on average{spread} (local SGD: {cost.local_sgd / 1e6:.3g} MB)"


def evaluation_in_words(cost: Costs) -> str:
    """A sentence about the bytes of an evaluation."""
    everywhere, first = (sent / 1e6 for sent in cost.evaluation)
    if cost.evaluate_on == "first":
        return f"For an evaluation it sends {first:.3g} MB on average, worker 0 nothing (evaluate_on='first')."
    return f"For an evaluation it sends {everywhere:.3g} MB (with evaluate_on='first' {first:.3g} MB on average)."


def _option(globs: Sequence[str]) -> str:
    """The value of ``blocks`` as Python; of a long list the first four entries."""
    if len(globs) == 1:
        return f'"{globs[0]}"'
    shown = [f'"{glob}"' for glob in globs[:4]]
    return f"[{', '.join([*shown, '...'] if len(globs) > len(shown) else shown)}]"


def _line(
    globs: Sequence[str], kind: str, blocks: str, size: str, flops: str, chosen: str, ends: Sequence[str]
) -> list[str]:
    """A row of the table, on as many lines as its first and last cell need."""
    middle = f"{_cut(kind, _KIND):{_KIND}} {blocks:>6} {size:>7} {flops:>6} {chosen:>6}"
    lines = []
    for index, (glob, end) in enumerate(zip_longest(globs, ends, fillvalue="")):
        between = middle if index == 0 else " " * len(middle)
        lines.append(f"{glob:{_GLOBS}} {between}  {end}".rstrip())
    return lines


def _shown(row: Row) -> list[str]:
    """The globs of a row, one a line, but for the end of a long list."""
    globs = [_cut(glob, _GLOBS) for glob in row.globs]
    return globs if len(globs) <= 4 else [*globs[:3], f"... ({len(globs)})"]


def _scale(row: Row) -> list[str]:
    if not row.keeps_shape:
        return ["changes the shape"]
    if row.folds is None:
        return ["not seen" if row.chosen else ""]
    if not row.folds:
        return ["hook (no fold)"]
    return ["folds into", *(_cut(end, _ENDS) for end in row.ends)] if len(row.ends) > 1 else [f"folds: {row.ends[0]}"]


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."
