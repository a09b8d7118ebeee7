"""The study of links: two workers in network namespaces, joined by links of chosen bandwidth; see experiments/links."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from typing import Any

from omegaconf import DictConfig, OmegaConf

from experiments.auxnet import link_worker
from experiments.auxnet.cases import Case, LinkCase
from experiments.auxnet.training import Job, measure
from experiments.harness.links.crew import Crew, crew, ended_in_one_line
from experiments.links.options import network

PROGRAM = link_worker.__name__
WORKERS, MTU = 2, 1500
LEAST_BURST_BYTES = 32 * 1024
"""Of a shaper's bucket, which is full again after each step's computing: what it holds is sent without a limit. A step
sends half a megabyte and more at once. With less, 0.1 Gbit/s is reached less exactly, and 1 Gbit/s needs its 1 ms."""
TIMEOUT_SECONDS = 300
"""For one training over one link."""


@contextmanager
def over_links(cfg: DictConfig) -> Iterator[tuple[Callable[[LinkCase], dict[str, Any]], Collection[float | None]]]:
    """What measures a case, and the bandwidths that links can have here: without namespaces, unshaped ones only.

    Args:
        cfg: the settings.
    """
    links = OmegaConf.create({"workers": WORKERS, "bandwidths_gbit": cfg.bandwidths_gbit, "name": None, "mtu": MTU})
    with ended_in_one_line(), network(links, LEAST_BURST_BYTES) as (made, possible), crew(made, PROGRAM) as workers:
        yield partial(_measured, cfg=cfg, workers=workers), possible


def _measured(case: LinkCase, cfg: DictConfig, workers: Crew) -> dict[str, Any]:
    """One process alone has no link."""
    trained = Case(**{item.name: getattr(case, item.name) for item in fields(Case)})
    if case.workers == 1:
        return measure(trained, cfg, steps=cfg.link_steps)

    def launch(job: Job) -> list[dict[str, Any]]:
        run = workers.run(link_worker.settings_of(job), gbit=case.bandwidth_gbit, timeout=TIMEOUT_SECONDS)
        told: list[dict[str, Any]] = run["workers"]
        return told

    return measure(trained, cfg, steps=cfg.link_steps, launch=launch)
