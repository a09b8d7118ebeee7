"""The tasks of the accuracy study: the digits, and a wider and harder one of the shape of Speech Commands."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """A data set, and the network that learns it; some values are by size of the study (full or sample).

    Args:
        title: in words.
        depth: linear layers.
        width: neurons of a hidden layer, by size.
        batch: examples per local step of one worker.
        passes: over the training examples, of all workers together, by size.
        lr: initial learning rate by method: the best of `cases.RATES` on the hold-out, with four workers.
    """

    title: str
    depth: int
    width: dict[str, int]
    batch: int
    passes: dict[str, int]
    lr: dict[str, float]


TASKS = {
    "digits": Task(
        "digits of scikit-learn, 64 inputs",
        depth=3,
        width={"full": 256, "sample": 16},
        batch=16,
        passes={"full": 48, "sample": 8},
        lr={"single": 0.1, "ddp": 0.1, "local_sgd": 0.1, "ist": 0.1},
    ),
    "speech_shaped": Task(
        "made task of the shape of Speech Commands, 4096 inputs, 35 classes",
        depth=3,
        width={"full": 1024, "sample": 16},
        batch=32,
        passes={"full": 8, "sample": 16},
        lr={"single": 0.2, "ddp": 0.2, "local_sgd": 0.2, "ist": 0.2},
    ),
}
