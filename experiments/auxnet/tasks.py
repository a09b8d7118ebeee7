"""What is trained: data, network, and where it is cut; small enough for two cores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Size = Literal["full", "smoke"]


@dataclass(frozen=True)
class Scale:
    """How large a task is.

    Args:
        blocks: residual blocks of each of the three sections.
        width: channels of the first section.
        batch: images per step, of all workers: they all see the same.
        epochs: passes over the training images.
        limit: training images of each class before the hold-out is taken; None for all.
        limit_test: test images of each class; None for all.
        cuts: for each number of workers, behind which modules the network is cut.
    """

    blocks: int
    width: int
    batch: int
    epochs: int
    limit: int | None
    limit_test: int | None
    cuts: Mapping[int, tuple[str, ...]]


@dataclass(frozen=True)
class Task:
    """Images and a network.

    Args:
        title: in words.
        images: ``digits`` (scikit-learn's), ``folder`` (the command line names it) or ``random`` (for timing only).
        pixels: height and width of an image.
        holdout: share of the training images that is kept from training; settings are chosen by it.
        lr: initial learning rate.
        scales: by size of the study.
    """

    title: str
    images: Literal["digits", "folder", "random"]
    pixels: int
    holdout: float
    lr: float
    scales: Mapping[str, Scale]


def _smoke(batch: int = 8) -> Scale:
    cuts = {2: ("section2.0",), 3: ("section1.1", "section2.1")}
    return Scale(blocks=2, width=4, batch=batch, epochs=2, limit=20, limit_test=5, cuts=cuts)


def _timed(pixels: int, blocks: int, width: int, batch: int, cuts: Mapping[int, tuple[str, ...]]) -> Task:
    full = Scale(blocks, width, batch, epochs=1, limit=None, limit_test=None, cuts=cuts)
    scales = {"full": full, "smoke": _smoke()}
    return Task(f"random images of {pixels} x {pixels}", "random", pixels, holdout=0.1, lr=0.01, scales=scales)


def _cifar(
    shape: str, blocks: int, width: int, cuts: Mapping[int, tuple[str, ...]], *, epochs: int, limit: int
) -> Task:
    full = Scale(blocks, width, batch=32, epochs=epochs, limit=limit, limit_test=500, cuts=cuts)
    scales = {"full": full, "smoke": _smoke()}
    return Task(f"CIFAR-10, JPEG copy, {shape}", images="folder", pixels=16, holdout=0.1, lr=0.1, scales=scales)


# Cuts are those that balance measured seconds of forward and backward, an auxiliary network being on every stage but the
# first; they are fixed here, so that all seeds and all methods have the same.
TASKS = {
    "digits": Task(
        "digits of scikit-learn",
        images="digits",
        pixels=8,
        holdout=0.1,
        lr=0.1,
        scales={
            "full": Scale(
                blocks=6,
                width=16,
                batch=32,
                epochs=20,
                limit=None,
                limit_test=None,
                cuts={2: ("section2.2",), 3: ("section1.5", "section3.0")},
            ),
            "smoke": _smoke(),
        },
    ),
    "cifar_deep": _cifar(
        "deep and thin", 3, 16, {2: ("section2.0",), 3: ("section1.2", "section2.2")}, epochs=6, limit=1000
    ),
    "cifar_wide": _cifar(
        "shallow and wide", 2, 24, {2: ("section2.0",), 3: ("section1.1", "section2.1")}, epochs=5, limit=500
    ),
}
TIMED = {
    "resnet_38": _timed(16, 6, 16, 64, {2: ("section2.0",), 3: ("section1.4", "section2.4")}),
    "resnet_110": _timed(32, 18, 16, 32, {2: ("section2.1",), 3: ("section1.12", "section2.9")}),
    "wrn_16_4": _timed(16, 2, 64, 64, {2: ("section2.0",), 3: ("section1.1", "section2.1")}),
}
"""Networks whose steps are timed, and that are not trained to the end."""
ALL = {**TASKS, **TIMED}
