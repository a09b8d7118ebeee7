"""Measures the work of a sync with each format of `wire`: seconds of a worker's processor, and bytes.

Seconds are of the worker's own thread: waits for the link, or for another process on the same core, are not in them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any, get_args

sys.path.insert(0, os.environ.get("MEASURED_CHECKOUT", str(Path(__file__).resolve().parents[2])))

import torch
import torch.distributed as dist

from experiments.harness.workers import forked
from resist_lightning import Config, Engine
from resist_lightning.methods.config import WireName
from resist_lightning.models import preact_resnet


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """A row for each format; beside it the same of another checkout of this repository, if one is given."""
    here = forked(syncs, settings, 2)[0]
    before = settings["before"] and _of_another(settings)
    rows = [{"wire": wire, **row, "before": before.get(wire) if before else None} for wire, row in here.items()]
    return {"workers": 2, "rows": rows}


def _of_another(settings: dict[str, Any]) -> Any:
    """The result of :func:`syncs` with the package of the checkout ``before``."""
    environment = {**os.environ, "MEASURED_CHECKOUT": settings["before"], "PYTHONPATH": settings["before"]}
    command = [sys.executable, __file__, json.dumps(settings)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def syncs(worker: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Syncs of the paper's network without training between them, in which all parameters change."""
    found: dict[str, Any] = {}
    for wire in get_args(WireName):
        torch.manual_seed(0)
        model = preact_resnet(settings["depth"], num_classes=10, width_multiplier=settings["width"])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        engine = Engine(model, [optimizer], Config(local_steps=1, wire=wire))
        engine.start()
        seconds: list[float] = []
        sent = engine.collective.sent_bytes.copy()
        for _ in range(settings["turns"]):
            for parameter in model.parameters():
                if not parameter.is_meta:
                    parameter.data.mul_(1.001 + 0.001 * worker)
            dist.barrier()
            before = time.thread_time()
            engine.after_step()
            seconds.append(time.thread_time() - before)
        sent_bytes = sum(engine.collective.sent_bytes[kind] - sent[kind] for kind in ("shared", "hand_over"))
        found[wire] = {"seconds": median(seconds[1:]), "sent_bytes": sent_bytes / settings["turns"]}
    return found


if __name__ == "__main__":
    print(json.dumps(forked(syncs, json.loads(sys.argv[1]), 2)[0]))
