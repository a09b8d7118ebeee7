"""Assigns tests to jobs, where several run at once (pytest -n)."""

from __future__ import annotations

from xdist.scheduler import LoadFileScheduling

LOOK_AT_ALL_NAMESPACES = (
    "tests/experiments/test_auxnet_links.py",
    "tests/experiments/test_ist.py",
    "tests/experiments/test_links.py",
    "tests/experiments/test_time_to_accuracy.py",
)
"""Tests that make network namespaces and list those of the whole host; they share a job."""


class Files(LoadFileScheduling):
    """Assigns whole files, as their fixtures serve all of their tests, and some files together to one job.

    (Groups of xdist, `--dist loadgroup`, have no effect with xdist 3.8 and pytest 9.2.)
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "namespaces" if file in LOOK_AT_ALL_NAMESPACES else file
