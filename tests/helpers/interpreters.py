"""Starts interpreters as forks, at no cost: importing torch and Lightning takes five seconds of CPU.

After `warm`, ``subprocess.Popen([sys.executable, ...])`` in this process forks a template that has imported all. The
template was forked before anything else happened here. It forks twice and lets the process between end, so that the
new process becomes a child of this one, which is a subreaper: launchers wait for it and kill it as usual::

    this process ─┬─ template ─── (between, ends) ─── the new one
                  └──────────────────────────────────────┘ adopts it

Exceptions: ``multiprocessing``'s ``spawn``, and commands without a ``.py`` file or ``-m``.
"""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing.process
import os
import pickle
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from lightning.fabric.utilities.rank_zero import _get_rank, rank_zero_only

_END_WITH_PARENT, _SUBREAPER = 1, 36  # PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER
_NEW_NETWORK, _NEW_MOUNTS = 0x40000000, 0x00020000  # CLONE_NEWNET, CLONE_NEWNS
_RECURSIVE, _SLAVE, _DETACH = 0x4000, 0x80000, 2  # MS_REC, MS_SLAVE, MNT_DETACH
_IN_NETWORK = ["ip", "netns", "exec"]

_execute = subprocess.Popen._execute_child  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _Start:
    """Arguments and environment of a new interpreter."""

    arguments: list[str]
    network: str  # network namespace; empty for the parent's
    folder: str
    variables: dict[str, str]
    group: int  # process group; 0 for a new session
    parent: int  # pid of the process that asked for it


def warm() -> None:
    """Let this process start interpreters as forks; call it before there are threads."""
    libc = ctypes.CDLL(None)
    libc.prctl(_SUBREAPER, 1)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        libc.prctl(_END_WITH_PARENT, signal.SIGKILL)
        os.setpgid(0, 0)  # so that signals to this process's group do not reach it
        ours.close()
        _be_template(theirs)
    theirs.close()

    def execute(popen: Any, args: Any, executable: Any, preexec: Any, close: Any, passed: Any, cwd: Any, env: Any,
                *rest: Any) -> None:  # fmt: skip
        network, arguments = _parsed(args)
        if not arguments or executable or preexec or passed:
            return _execute(popen, args, executable, preexec, close, passed, cwd, env, *rest)
        pipes = rest[3:9]
        variables = {str(name): str(value) for name, value in (os.environ if env is None else env).items()}
        group = 0 if rest[14] else os.getpgrp()
        start = _Start(arguments, network, str(cwd or os.getcwd()), variables, group, os.getpid())
        streams = [own if own != -1 else usual for usual, own in enumerate((pipes[0], pipes[3], pipes[5]))]
        socket.send_fds(ours, [pickle.dumps(start)], streams)
        popen.pid = int(ours.recv(32))
        popen._child_created = True
        popen._close_pipe_fds(*pipes)
        return None

    subprocess.Popen._execute_child = execute  # type: ignore[attr-defined]


def _parsed(command: Any) -> tuple[str, list[str]]:
    """The network namespace and the interpreter's arguments of a command; no arguments if it needs a real Popen."""
    words, network = [str(word) for word in command] if isinstance(command, list | tuple) else [], ""
    if words[:3] == _IN_NETWORK:
        network, words = words[3], words[4:]
    if words[:1] != [sys.executable]:
        return network, []
    arguments = [word for place, word in enumerate(words[1:]) if place or word != "-u"]
    known = len(arguments) > 0 and (arguments[0] == "-m" or arguments[0].endswith(".py"))
    return network, arguments if known else []


def _be_template(asked: socket.socket) -> NoReturn:
    while True:
        message, streams, _, _ = socket.recv_fds(asked, 1 << 20, 3)
        if not message:
            os._exit(0)
        read, write = os.pipe()
        between = os.fork()
        if between == 0:
            new = os.fork()
            if new == 0:
                for end in (asked.detach(), read, write):
                    os.close(end)
                _be_interpreter(pickle.loads(message), streams)
            os.write(write, str(new).encode())
            os._exit(0)
        os.waitpid(between, 0)  # only now is the new process a child of the one that asked
        asked.send(os.read(read, 32))
        for end in (read, write, *streams):
            os.close(end)


def _be_interpreter(start: _Start, streams: list[int]) -> NoReturn:
    code = 1
    try:
        _begin(start, streams)
        code = _run(start.arguments)
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException:  # noqa: BLE001 - no caller is left to handle it
        traceback.print_exc()
    finally:
        os._exit(code)


def _begin(start: _Start, streams: list[int]) -> None:
    """Set this process up as an interpreter that has just imported torch and Lightning with these variables."""
    deadline = time.monotonic() + 10
    while os.getppid() != start.parent and time.monotonic() < deadline:  # not yet adopted
        time.sleep(0.001)
    if start.group:
        os.setpgid(0, start.group)
    else:
        os.setsid()
    for usual, own in enumerate([os.dup(stream) for stream in streams]):
        os.dup2(own, usual)
        os.close(own)
    for stream in set(streams) - {0, 1, 2}:
        os.close(stream)
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    if start.network:
        _enter(start.network)
    os.environ.clear()
    os.environ.update(start.variables)
    os.chdir(start.folder)
    multiprocessing.process._parent_process = None  # type: ignore[attr-defined]
    multiprocessing.process._children = set()  # type: ignore[attr-defined]
    tempfile.tempdir = None
    random.seed()
    np.random.seed()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    rank_zero_only.rank = _get_rank() or 0
    warm()


def _run(arguments: list[str]) -> int:
    """Run the program; returns its exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    name = arguments[1] if arguments[0] == "-m" else arguments[0]
    more = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [os.getcwd() if arguments[0] == "-m" else os.path.dirname(os.path.abspath(name))]
    sys.path += [path for path in more if path and path not in sys.path]
    sys.argv = [name, *arguments[1 + (arguments[0] == "-m") :]]
    try:
        if arguments[0] == "-m":
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(name, run_name="__main__")
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return ended.code or 0
        sys.stderr.write(f"{ended.code}\n")
        return 1
    except BaseException as error:  # noqa: BLE001 - an interpreter prints any exception
        traceback.print_exc()
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        return 1
    return 0


def _enter(network: str) -> None:
    """Enter a network namespace like ``ip netns exec``, with its own /sys, for the counters of its interfaces."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{network}", "rb") as namespace:
        failed = (
            libc.setns(namespace.fileno(), _NEW_NETWORK)
            or libc.unshare(_NEW_MOUNTS)
            or libc.mount(b"none", b"/", None, _RECURSIVE | _SLAVE, None)
            or libc.umount2(b"/sys", _DETACH)
            or libc.mount(network.encode(), b"/sys", b"sysfs", 0, None)
        )
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
