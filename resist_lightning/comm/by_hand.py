"""Checks the environment variables of processes that no cluster starts. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping


def check_port(variables: Mapping[str, str], devices: int, nodes: int) -> None:
    """Check that processes which are not started by one another know a common port.

    Lightning would choose a free one in each of them, and all would wait for the others until the timeout.

    Args:
        variables: the environment of this process.
        devices: of ``Trainer(devices=...)``, for each host.
        nodes: of ``Trainer(num_nodes=...)``.

    Raises:
        ValueError: if there is none.
    """
    if "MASTER_PORT" in variables or "STANDALONE_PORT" in variables:  # the second one is Lightning's own
        return
    local_rank = variables.get("LOCAL_RANK")
    if local_rank is not None and devices * nodes > 1:
        raise ValueError(
            f"LOCAL_RANK={local_rank} is set, so Lightning takes this process for one of {devices * nodes} that were "
            "started by hand, but MASTER_PORT is not, so they cannot find one another. Unset LOCAL_RANK, and Lightning "
            "starts the others; or set MASTER_PORT to the same free port for all of them."
        )
    if nodes > 1:
        raise ValueError(
            f"num_nodes={nodes}, but MASTER_PORT is not set, so the hosts cannot find one another. On every host set "
            "MASTER_ADDR to the address of the first one, MASTER_PORT to a free port there, and NODE_RANK to its own "
            f"number, 0 to {nodes - 1}; or start the script by torchrun."
        )
