"""Which tests go to the same job where several run at once (pytest -n)."""

from __future__ import annotations

from xdist.scheduler import LoadFileScheduling

LOOK_AT_ALL_NAMESPACES = (
    "tests/experiments/test_auxnet_links.py",
    "tests/experiments/test_ist.py",
    "tests/experiments/test_links.py",
    "tests/experiments/test_time_to_accuracy.py",
)
"""They make network namespaces, and look at those of the whole host."""


class Files(LoadFileScheduling):
    """Files as wholes, as their fixtures are for all tests; and some files one after the other.

    (Groups of xdist, `--dist loadgroup`, have no effect with xdist 3.8 and pytest 9.2.)
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "namespaces" if file in LOOK_AT_ALL_NAMESPACES else file
