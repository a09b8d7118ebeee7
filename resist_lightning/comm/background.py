"""Runs a sync in a thread of its own, beside the training."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch


class Background:
    """Runs a function in another thread, at once.

    gloo and the kernels of torch release Python's lock, so the training goes on meanwhile.

    Args:
        work: the function. It must talk to others over connections of its own: see :meth:`Collective.beside`.
        device: on which it makes tensors. On a GPU it works in the stream that is the current one here, behind what
            was put there; a thread would begin with the default one of the first GPU.
    """

    def __init__(self, work: Callable[[], None], device: torch.device) -> None:
        self._work = work
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._error: BaseException | None = None
        # Not to be waited for at the end of the program: after an error it may wait for a worker that is gone.
        self._thread = threading.Thread(target=self._run, name="sync", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the function has returned; raises what it has raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def leave(self, seconds: float) -> None:
        """Wait for at most so long, and ignore its error: the run has another one."""
        self._thread.join(seconds)

    def _run(self) -> None:
        try:
            # None: the stream stays.
            with torch.no_grad(), torch.cuda.stream(self._stream):
                self._work()
        except BaseException as error:  # noqa: BLE001  # raised again where it is waited for
            self._error = error
