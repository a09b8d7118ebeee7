"""Makes a fault happen in this process, also in the middle of a message or a file, of which no listener hears."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch.utils.data._utils.fetch import _MapDatasetFetcher

Disarm = Callable[[], None]

# The places in the middle of a message, and the function that sends it.
SENDING = {"averaging": "all_reduce", "hand_over": "batch_isend_irecv"}

HALF_A_FILE_BYTES = 16_384  # below the size of any checkpoint that is written here


class Injected(RuntimeError):
    """The error that ``raise_error`` and ``raise_in_loader`` raise."""


def _signal(number: signal.Signals, _: str) -> None:
    os.kill(os.getpid(), number)


def _raise(sentence: str) -> None:
    raise Injected(sentence)


def _allocate(_: str) -> None:
    torch.empty(2**60, dtype=torch.uint8)


def _nothing_more(_: str) -> None:
    """A no-op: the disk is full already when this is called."""


INJECTIONS: dict[str, Callable[[str], None]] = {
    "kill": partial(_signal, signal.SIGKILL),
    "terminate": partial(_signal, signal.SIGTERM),
    "segfault": partial(_signal, signal.SIGSEGV),
    "freeze": partial(_signal, signal.SIGSTOP),
    "interrupt": partial(_signal, signal.SIGINT),
    "raise_error": _raise,
    "raise_in_loader": _raise,
    "run_out_of_memory": _allocate,
    "fill_disk": _nothing_more,
}


def after_next_message(place: str, strike: Callable[[], None]) -> Disarm:
    """Strike at this process's next send: posted, and not waited for."""
    name = SENDING[place]
    send = getattr(dist, name)

    def disarm() -> None:
        setattr(dist, name, send)

    def send_and_strike(*args: Any, **kwargs: Any) -> Any:
        disarm()
        begun = send(*args, **kwargs)
        strike()
        return begun

    setattr(dist, name, send_and_strike)
    return disarm


def in_loader(trainer: L.Trainer, is_now: Callable[[], bool], strike: Callable[[], None]) -> Disarm:
    """Strike when a loader of this process next reads a training sample."""
    fetch = _MapDatasetFetcher.fetch

    def disarm() -> None:
        _MapDatasetFetcher.fetch = fetch

    def fetch_or_strike(self: Any, index: Any) -> Any:
        if trainer.training and is_now():
            strike()
        return fetch(self, index)

    _MapDatasetFetcher.fetch = fetch_or_strike
    return disarm


def while_saving(strategy: Any, is_now: Callable[[], bool], strike: Callable[[], None], kind: str) -> Disarm:
    """Strike in the middle of a file: the kernel stops the write at :data:`HALF_A_FILE_BYTES` and says so by a signal.

    Whatever writes the file, some of it is on the disk then. Worker 0 is struck in the model's file, which comes last,
    the others in their own. A fault that the program may outlive, or report in its own words, strikes before the write:
    a write stopped by the kernel would fail, too.
    """
    writer = strategy.checkpoint_io if strategy.global_rank == 0 else strategy
    save = writer.save_checkpoint

    def disarm() -> None:
        with suppress(AttributeError):
            del writer.save_checkpoint

    def save_and_strike(*args: Any, **kwargs: Any) -> None:
        if is_now() and kind in ("terminate", "interrupt", "raise_error", "run_out_of_memory"):
            strike()
        if is_now():
            with _limited_files(lambda: is_now() and strike()):
                save(*args, **kwargs)
        else:
            save(*args, **kwargs)
        if is_now() and kind != "fill_disk":
            strike()

    writer.save_checkpoint = save_and_strike
    return disarm


@contextmanager
def _limited_files(at_limit: Callable[[], Any]) -> Iterator[None]:
    """Inside, no file grows above :data:`HALF_A_FILE_BYTES`; called whenever one would."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, lambda *_: at_limit())
    resource.setrlimit(resource.RLIMIT_FSIZE, (HALF_A_FILE_BYTES, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
