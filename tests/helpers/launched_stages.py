"""A user's program that trains its network in stages.

With ``harm_after``, worker 1 is killed after that many steps, once per folder, and snapshots are written.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from tests.helpers.auxnet import CUTS, Metered, make_stages, pictures
from tests.helpers.restarted import Harm, Seen
from tests.helpers.trainers import QUIET

STEPS = 10


def train(start_method: Any, folder: str, harm_after: int = 0) -> dict[str, Any]:
    """Fit with two workers; returns the results."""
    seen = Seen()
    options = {"cuts": CUTS[2], "method": "al-net", "multiplier_every": 2, "start_method": start_method}
    callbacks: list[L.Callback] = [seen]
    if harm_after:
        callbacks.append(Harm(Path(folder), harm_after))
        options["snapshots"] = Path(folder, "snapshots")
    module = Metered()
    trainer = L.Trainer(
        **{**QUIET, "use_distributed_sampler": True},
        strategy=make_stages(**options),
        devices=2,
        max_epochs=2,
        callbacks=callbacks,
    )
    trainer.fit(module, pictures())
    state: dict[str, Tensor] = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    return {"state": state, "metrics": metrics, "steps": seen.steps, "left": torch.distributed.is_initialized()}


def main(folder: str, harm_after: int) -> None:
    """Train as a worker of torchrun; the results go to ``folder``."""
    torch.set_num_threads(1)
    torch.save(train("popen", folder, harm_after), Path(folder, f"worker{os.environ['LOCAL_RANK']}.pt"))
