from __future__ import annotations

import pytest

from resist_lightning.faults.reasons import is_broken_connection, name_of_exit, timed_out


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("[/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:16308", True),
        ("Timed out waiting 8000ms for recv operation to complete", True),
        ("NCCL communicator was aborted", True),
        ("NCCL error in: NCCLUtils.cpp:94, remote process exited or there was a network error", True),
        ("ncclUnhandledCudaError: Call to CUDA function failed. Cuda failure 2 'out of memory'", False),
        ("NCCL error: invalid usage. Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 1000", False),
        ("mat1 and mat2 shapes cannot be multiplied (8x3 and 4x3)", False),
    ],
)
def test_errors_of_connections_are_told_from_the_users(text: str, broken: bool) -> None:
    assert is_broken_connection(text) == broken


def test_a_timeout_is_told_from_a_connection_that_was_closed() -> None:
    assert timed_out("Timed out waiting 8000ms")
    assert not timed_out("Connection closed by peer")


def test_exits_have_names() -> None:
    assert name_of_exit(-11) == "was killed by signal 11 (SIGSEGV)"
    assert name_of_exit(3) == "ended with exit code 3 without reporting an error"
    assert name_of_exit(-999) == "was killed by signal 999"
