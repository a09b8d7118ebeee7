"""Times steps over links: two workers in network namespaces, joined by links of chosen bandwidth; see experiments/links.

::

    start  first steps, not counted | steps                     | end
                              ready ┘                  measured ┘
                   links: unshaped  | shaped                    | unshaped
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from experiments.auxnet.cases import Case, LinkCase
from experiments.auxnet.training import Job, measure, prepared, work
from experiments.harness.links.workers import LinkedWorkers, Place, linked_workers
from experiments.harness.workers import PATIENCE
from experiments.links.rig import network

WORKERS = 2
# A shaper's bucket is full again after each step's computing, and its content is sent without a limit. A step sends
# half a megabyte and more at once. With less, 0.1 Gbit/s is reached less exactly, and 1 Gbit/s needs its 1 ms.
LEAST_BURST_BYTES = 32 * 1024
TIMEOUT_SECONDS = 300  # for one training over one link


@contextmanager
def over_links(options: Any) -> Iterator[tuple[Callable[[LinkCase], dict[str, Any]], Collection[float | None]]]:
    """The function that measures a case, and the possible bandwidths: without namespaces, unshaped links only."""
    with (
        network(WORKERS, options.bandwidths_gbit, least_burst=LEAST_BURST_BYTES) as (made, possible),
        linked_workers(made, "experiments.auxnet.links") as workers,
    ):
        yield partial(_measured, options=options, workers=workers), possible


def _measured(case: LinkCase, options: Any, workers: LinkedWorkers) -> dict[str, Any]:
    """Measure a case; a single process has no link."""
    trained = Case(**{item.name: getattr(case, item.name) for item in fields(Case)})
    if case.workers == 1:
        return measure(trained, options, steps=options.link_steps)

    def launch(job: Job) -> list[dict[str, Any]]:  # its images are random, and each worker makes them itself
        settings = {"case": asdict(job.case), "size": job.size, "steps": job.steps, "uncounted": job.uncounted}
        return workers.run(settings, gbit=case.bandwidth_gbit, timeout=TIMEOUT_SECONDS)["workers"]

    return measure(trained, options, steps=options.link_steps, launch=launch)


class Window:
    """Opens before the first step that is counted, and closes behind the last."""

    def __init__(self, place: Place, opens_at: int, closes_at: int) -> None:
        self.place, self.opens_at, self.closes_at = place, opens_at, closes_at
        # Bytes that the kernel counted; None where its counters are not this worker's.
        self.sent_by_step: float | None = None
        self._before: tuple[int, int] | None = None

    def __call__(self, steps: int) -> None:
        """Called with the number of steps done."""
        if steps == self.opens_at:
            self.place.ready()
            self._before = self.place.bytes()
        if steps == self.closes_at:
            after = self.place.measured()
            if after is not None and self._before is not None:
                self.sent_by_step = (after[0] - self._before[0]) / (self.closes_at - self.opens_at)


def main(place: Place, settings: dict[str, Any]) -> None:
    """A worker: trains once, and reports the result of `training.work`, and the kernel's count."""
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
