"""Settings of precision and speed: each trains as it should, evaluates as reported, and stays in force.

The cells are those of the table in docs/precision-and-speed.md.
"""

from __future__ import annotations

import pytest
import torch

from docs import precision_and_speed as page
from resist_lightning.errors import BlockSelectionError
from resist_lightning.methods.resist.layout import BlockLayout
from tests.helpers import speedup_settings, speedups
from tests.helpers.speedup_settings import CELLS, METHODS, SETTINGS, WORKERS
from tests.helpers.speedups import Found
from tests.helpers.training import assert_equal_states


@pytest.fixture(scope="module")
def trained() -> dict[tuple[str, str], list[Found]]:
    return speedups.train_all(CELLS)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(("name", "method"), CELLS)
def test_a_setting_trains_what_the_simulator_trains_and_evaluates_as_a_plain_network(trained, name, method):
    mine, theirs = trained[name, method]
    assert mine.checked
    assert theirs.checked
    assert_equal_states(mine.state, theirs.state, exactly=True)
    expected = speedups.simulate(name, method)
    state = {key.replace("_orig_mod.", ""): value for key, value in mine.state.items()}
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        size = max(float(value.abs().max()), 1e-3)
        tolerance = SETTINGS[name].tolerance * size
        torch.testing.assert_close(state[key], value, rtol=0, atol=tolerance, msg=lambda text, key=key: key + text)
    plain = speedups.plain_outputs(name, method, state)
    torch.testing.assert_close(mine.reported, plain, rtol=0, atol=1e-6)
    if method == "resist":
        assert mine.blocks == 4
        assert len(mine.folded) == 2 * 2 + 2 * 4  # weight and bias of one branch, and of two


@pytest.mark.parametrize("name", ["compiled blocks", "wrapped blocks"])
def test_compiled_blocks_are_one_graph_of_their_kind_whatever_the_partition_is(trained, name):
    x = torch.randn(8, speedup_settings.WIDTH, 8, 8)
    expected = speedups.operations_of(speedup_settings.ImageBlock(None), x)
    expected += speedups.operations_of(speedup_settings.TokenBlock(), x.flatten(2).transpose(1, 2))
    for found in trained[name, "resist"]:
        assert found.compiled == speedups.Compiled(graphs=2, operations=expected, later=0, breaks=0)


@pytest.mark.parametrize(("method", "rescaled"), [("local_sgd", 0), ("ist", 2)])
def test_a_network_that_is_compiled_as_a_whole_is_one_graph_where_no_blocks_are_partitioned(trained, method, rescaled):
    expected = (
        speedups.operations_of(speedup_settings.make_network(method), speedup_settings.batch_of(0, 0)[0]) + rescaled
    )
    for found in trained["compiled network", method]:
        assert found.compiled == speedups.Compiled(graphs=1, operations=expected, later=0, breaks=0)


def test_a_network_that_is_compiled_as_a_whole_is_refused_where_blocks_are_partitioned() -> None:
    net = speedups.prepared("compiled network", "resist")
    config = speedups.config_for("resist", SETTINGS["compiled network"])
    with pytest.raises(BlockSelectionError, match=r"compiled as a whole.*block\.compile\(\)"):
        BlockLayout(net, config, WORKERS)
    assert BlockLayout(net, config, 1).blocks


@pytest.mark.parametrize("name", SETTINGS)
def test_the_page_shows_what_was_found(trained, name):
    found = {method: trained[name, method][0] for method in METHODS if (name, method) in trained}
    row = page.row(name, found)
    assert page.rows()[SETTINGS[name].says] == row, "run `python -m docs.precision_and_speed`"


def test_the_page_has_no_other_rows() -> None:
    assert list(page.rows()) == [setting.says for setting in SETTINGS.values()]
