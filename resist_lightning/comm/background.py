"""Runs a sync in a thread of its own, beside the training."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch


class Background:
    """Runs a function in another thread, at once.

    gloo and the kernels of torch release Python's lock, so the training goes on meanwhile.

    Args:
        work: the function. It must communicate over its own connections: see :meth:`Collective.beside`.
        device: of its tensors. On a GPU it works in the caller's current stream, behind the work queued there; by
            default a thread uses the default stream of the first GPU.
    """

    def __init__(self, work: Callable[[], None], device: torch.device) -> None:
        self._work = work
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._error: BaseException | None = None
        # A daemon: the program's end must not wait for it, as after an error it may wait for a worker that is gone.
        self._thread = threading.Thread(target=self._run, name="sync", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the function has returned; raises its error."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def leave(self, seconds: float) -> None:
        """Wait for at most so long, and ignore its error: the run already has another one."""
        self._thread.join(seconds)

    def _run(self) -> None:
        try:
            if self._stream is not None:
                # Not by `torch.cuda.stream`, at whose end this thread would return to the first GPU, and CUDA would
                # take some hundred MB there. This choice ends with the thread.
                torch.cuda.set_stream(self._stream)
            with torch.no_grad():
                self._work()
        except BaseException as error:  # noqa: BLE001  # raised again where it is waited for
            self._error = error
