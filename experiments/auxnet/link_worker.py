"""A worker in a network namespace: does what `training.work` says, over links that are shaped while steps are counted.

::

    start  first steps, not counted | steps                     | end
                              ready ┘                  measured ┘
                   links: unshaped  | shaped                    | unshaped
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from experiments.auxnet.cases import Case
from experiments.auxnet.examples import prepared
from experiments.auxnet.training import Job, work
from experiments.harness.links.crew import Place
from experiments.paper_tables.memory import PATIENCE


def settings_of(job: Job) -> dict[str, Any]:
    """A job as plain data, for `main`; its images are random, and each worker makes them itself."""
    return {"case": asdict(job.case), "size": job.size, "steps": job.steps, "uncounted": job.uncounted}


class Window:
    """Opens before the first step that is counted, and closes behind the last.

    Args:
        place: where this worker is.
        opens_at: steps before it.
        closes_at: steps until its end.
    """

    def __init__(self, place: Place, opens_at: int, closes_at: int) -> None:
        self.place = place
        self.opens_at = opens_at
        self.closes_at = closes_at
        self.sent_by_step: float | None = None
        """Bytes that the kernel counted; None where its counters are not this worker's."""
        self._before: tuple[int, int] | None = None

    def __call__(self, steps: int) -> None:
        """So many steps are done."""
        if steps == self.opens_at:
            self.place.ready()
            self._before = self.place.bytes()
        if steps == self.closes_at:
            after = self.place.measured()
            if after is not None and self._before is not None:
                self.sent_by_step = (after[0] - self._before[0]) / (self.closes_at - self.opens_at)


def main(place: Place, settings: dict[str, Any]) -> None:
    """Train once; report what `training.work` tells, and the kernel's count."""
    torch.set_num_threads(1)
    case = Case(**settings["case"])
    data = prepared(case.task, settings["size"], None, "")
    job = Job(case, settings["size"], data, settings["steps"], frozenset(), settings["uncounted"])
    window = Window(place, job.uncounted, job.steps)
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        told = work(place.worker, job, window)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    place.report({**told, "kernel_sent_by_step": window.sent_by_step})
