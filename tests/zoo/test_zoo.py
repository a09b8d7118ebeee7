"""Any residual network trains partially by default, and its checkpoint is the model that was reported.

``pytest -m zoo`` trains all networks, those of transformers where it is installed; the ordinary suite a cheap sample.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from docs import networks
from tests.helpers import zoo
from tests.helpers.zoo_run import SHORT, Found, examine


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread, as the processes do: a sum in another order may round differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check(name: str, found: Found) -> None:
    assert found.blocks
    assert found.held < 1
    assert not found.hooked
    assert found.branches < networks.BRANCHES, "the scaled blocks compute something else than their references"
    assert found.difference < 1e-5, (found.reported, found.plain)
    wrong = abs(found.unscaled - found.plain)
    assert wrong > 100 * abs(found.reported - found.plain), "the loss does not tell whether the scale is folded"
    # Where rounding errors grow, two runs of the simulator differ as much.
    limit = 1e-2 if name in networks.SENSITIVE else 1e-4
    assert found.unlike < limit, "processes train something else than the simulator"
    assert found.resumed, "the training from a checkpoint in mid-round gave other bits"


@pytest.mark.parametrize("name", zoo.SAMPLE)
def test_a_network_of_the_sample(name: str) -> None:
    found = examine(name, SHORT)

    check(name, found)
    assert networks.same_row(networks.row(name, found), networks.rows()[name]), "run `python docs/networks.py`"


@pytest.mark.zoo
@pytest.mark.timeout(500)
@pytest.mark.parametrize("name", zoo.NETWORKS)
def test_a_network(name: str) -> None:
    if name.startswith("transformers"):
        pytest.importorskip("transformers")

    check(name, examine(name))
