"""The tables of the transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from experiments.accuracy.tables import SETS
from experiments.harness.tables import (
    Content,
    Grid,
    Rows,
    chosen,
    distinct,
    grouped,
    mean_of,
    page_tables,
    seeds,
    spread,
)
from experiments.harness.words import bytes_in_words
from experiments.real_processes import agreement
from experiments.transformers.cases import TITLES, outer_momentum_of

RESULTS = Path(__file__).parent / "results"
LONG = RESULTS / "long"


def _named(case: Mapping[str, Any]) -> str:
    """``ResIST, keep``."""
    return ", ".join(filter(None, [TITLES[case["method"]], case["momentum"]]))


def _network(content: Content) -> str:
    settings, row = content["settings"], content["rows"][0]
    return (
        f"{settings['depth']} blocks of width {settings['width']} with {settings['heads']} heads, {row['parameters']:,} parameters, "
        f"{settings['depth'] - 1} blocks partitioned"
    )


def _recipe(content: Content, lr: float) -> str:
    settings, machine = content["settings"], content["machine"]
    count = seeds(content["rows"])
    return (
        f"{settings['batch']} per worker and local step, rounds of {settings['local_steps']} local steps; AdamW (0.9, 0.95, decay 0.1), "
        f"lr {lr:g} at the top of one cycle (up for a fifth, half a cosine down), the same for all methods; "
        f"{machine['cores']} CPU cores ({machine['processor']}), python {machine['python']}, torch {machine['torch']}; "
        f"n = {count} seed{'s' if count > 1 else ''}.\n"
    )


def language_conditions(content: Content) -> str:
    """Text, network, recipe, machine and n."""
    settings, rows = content["settings"], content["rows"]
    return (
        f"Bytes of the standard library's modules (sha256 {settings['text']}...), hold-out and test by position, 3 % each; "
        f"{_network(content)}; {rows[0]['samples']:,} sequences of {settings['context']} bytes for every method, "
        f"{_recipe(content, settings['lr'])}"
    )


def images_conditions(content: Content) -> str:
    """Images, network, recipe, machine and n."""
    settings, rows = content["settings"], content["rows"]
    return (
        f"{SETS[settings['data']]}; timm's ViT with patches of 4 x 4, {_network(content)}; {rows[0]['samples']:,} images for every "
        f"method, flips and crops, {_recipe(content, settings['image_lr'])}"
    )


def baselines(content: Content) -> str:
    """The baselines that the language model should beat."""
    found = content["rows"][0]["baselines"]
    words = [f"{name} {bits:.2f}" for name, bits in found.items()]
    return f"Bits per byte of the test text by counting n-grams in the whole training text: {', '.join(words)}.\n"


def _main(title: str, content: Content, columns: Mapping[str, Any]) -> Grid:
    rows = content["rows"]
    lines = []
    for (method, workers, momentum), alike in grouped(rows, "method", "workers", "momentum", titles=TITLES):
        for outer, own in _by_outer_momentum(alike).items():
            lines.append([
                TITLES[method], momentum or "-", "-" if outer is None else f"{outer:g}", workers, own[0]["local_steps_done"],
                *(cell(own) for cell in columns.values()),
                f"{mean(row['held'] / row['parameters'] for row in own):.0%}",
                bytes_in_words(mean(row["sent_bytes"] for row in own)) if workers > 1 else "0",
            ])  # fmt: skip
    settings = ["", "Adam's state at a sync", "outer momentum", "S", "local steps"]
    return Grid(title, [*settings, *columns, "parameters in a worker", "sent by a worker"], lines)


def _by_outer_momentum(rows: Rows) -> dict[float | None, Rows]:
    found: dict[float | None, Rows] = {}
    for row in sorted(rows, key=lambda row: outer_momentum_of(row["case"]) or 0.0):
        found.setdefault(outer_momentum_of(row["case"]), []).append(row)
    return found


def _perplexity(rows: Rows) -> str:
    return spread(2 ** row["test"] for row in rows)


def language(content: Content) -> Grid:
    return _main("The language model", content, {
        "bits per byte": lambda own: _three(row["test"] for row in own), "perplexity of a byte": _perplexity, "n": len,
    })  # fmt: skip


def images(content: Content) -> Grid:
    return _main("The ViT", content, {"test accuracy, %": lambda own: mean_of(own, "test"), "n": len})


def _three(found: Any) -> str:
    """A mean of three digits, in a cell: differences between methods are of hundredths."""
    listed = list(found)
    apart = f" ± {max(listed) / 2 - min(listed) / 2:.3f}" if len(listed) > 1 else ""
    return f"{mean(listed):.3f}{apart}"


def rates(content: Content) -> Grid:
    rows = content["rows"]
    found, lines = distinct(rows, "lr"), []
    for (_, workers, _), own in grouped(rows, "method", "workers", "momentum", titles=TITLES):
        if own:
            cells = [_three(row["holdout"] for row in chosen(own, lr=lr)) for lr in found]
            lines.append([f"{_named(own[0]['case'])}, S = {workers}", *cells])
    return Grid("Learning rates", ["hold-out, bits per byte", *(f"lr {lr:g}" for lr in found)], lines)


def check(content: Content) -> Grid:
    return agreement(content["rows"], _named, "bits per byte", 4)


STUDIES = {
    "check": (check,), "rates": (rates,), "language": (language_conditions, baselines, language),
    "images": (images_conditions, images),
}  # fmt: skip
TABLES = page_tables(RESULTS, STUDIES, "transformers_") | page_tables(LONG, STUDIES, "transformers_long_")
