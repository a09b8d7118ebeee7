from __future__ import annotations

import pytest

from resist_lightning.comm.by_hand import check_port


@pytest.mark.parametrize(
    ("variables", "nodes", "said"),
    [
        # As a finished run leaves it in a shell's environment; the others were waited for until the timeout.
        ({"LOCAL_RANK": "0"}, 1, r"^LOCAL_RANK=0 is set.* one of 2 that were started by hand.*Unset LOCAL_RANK"),
        ({"MASTER_ADDR": "host-0"}, 3, r"^num_nodes=3, but MASTER_PORT is not set.*NODE_RANK to .* 0 to 2;"),
    ],
)
def test_processes_that_would_choose_different_ports_are_refused(
    variables: dict[str, str], nodes: int, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        check_port(variables, 2, nodes)
    check_port({**variables, "MASTER_PORT": "29500"}, 2, nodes)
    check_port({**variables, "STANDALONE_PORT": "29500"}, 2, nodes)


def test_lightning_chooses_a_port_for_processes_that_it_starts_and_for_one_alone() -> None:
    check_port({}, 2, 1)
    check_port({"LOCAL_RANK": "0"}, 1, 1)
