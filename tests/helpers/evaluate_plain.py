"""A user's program that evaluates checkpoints with Lightning, without this package.

``python -m tests.helpers.evaluate_plain WORKERS CLASS:PATH...`` prints the metrics of every checkpoint as JSON.
"""

from __future__ import annotations

import json
import sys

import torch

from tests.helpers.plain import Classifier, evaluate
from tests.helpers.small import Bottlenecks

MODULES = {"Classifier": Classifier, "Bottlenecks": Bottlenecks}


def main(workers: int, checkpoints: list[str]) -> None:
    torch.set_num_threads(1)
    metrics = {}
    for name, _, path in (checkpoint.partition(":") for checkpoint in checkpoints):
        made = MODULES[name]
        loaded = made.load_from_checkpoint(path, map_location="cpu", weights_only=True, strict=True)
        metrics[path] = evaluate(loaded, workers)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        by_hand = made(**checkpoint["hyper_parameters"])
        by_hand.load_state_dict(checkpoint["state_dict"], strict=True)
        assert evaluate(by_hand, workers) == metrics[path]
    assert not [name for name in sys.modules if name.split(".")[0] in ("resist_lightning", "hydra_plugins")]
    sys.stdout.write(json.dumps(metrics) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
