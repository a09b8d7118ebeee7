"""Tests over shaped links need network namespaces; whether there are any is tried once."""

from __future__ import annotations

import ctypes
import os
import socket

import pytest

from experiments.harness.links.namespaces import Namespaces, why_no_namespaces

_NEW_HOST_NAME, _NEW_NETWORK = 0x04000000, 0x40000000  # CLONE_NEWUTS, CLONE_NEWNET

MISSING = why_no_namespaces()
needs_namespaces = pytest.mark.skipif(bool(MISSING), reason=f"no network namespaces: {MISSING}")


def enter_host(network: Namespaces, number: int) -> None:
    """Move this process to a host of its own name, ``host-NUMBER``, in a namespace of the network.

    Call it before there are other threads: they would stay where they are.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{network.namespace(number)}", "rb") as namespace:
        entered = libc.setns(namespace.fileno(), _NEW_NETWORK)
    if entered or libc.unshare(_NEW_HOST_NAME):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    socket.sethostname(f"host-{number}")
