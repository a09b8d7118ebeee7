"""A user's script that cuts its network: ``python -m tests.helpers.launched_stages START_METHOD FOLDER [HARM_AFTER]``.

Every process that comes to the end writes what it has to FOLDER. With HARM_AFTER, worker 1 is killed after so many
steps, once in the life of FOLDER, and snapshots are written.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from tests.helpers.auxnet import Metered, make_stages, pictures
from tests.helpers.restarted import Harm, Seen
from tests.helpers.trainers import QUIET

STEPS = 10


def train(start_method: Any, folder: str, harm_after: int = 0) -> dict[str, Any]:
    """Fit with two workers; what came of it."""
    seen = Seen()
    options = {"cuts": ["section2"], "method": "al-net", "multiplier_every": 2, "start_method": start_method}
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    given, path, *after = sys.argv[1:]
    result = train(given, path, int(after[0]) if after else 0)
    torch.save(result, os.path.join(path, f"{given}-worker{os.environ.get('LOCAL_RANK', '0')}.pt"))
