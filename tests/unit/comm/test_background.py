"""Background work in another thread, and its errors."""

from __future__ import annotations

import sys
import threading

import pytest
import torch

from resist_lightning.comm.background import Background

CPU = torch.device("cpu")


def test_it_works_while_the_caller_goes_on_and_without_gradients() -> None:
    go, seen = threading.Event(), []

    def work() -> None:
        assert go.wait(10)
        seen.append((threading.current_thread().name, torch.is_grad_enabled()))

    background = Background(work, CPU)
    assert seen == []
    go.set()
    background.wait()
    assert seen == [("sync", False)]
    assert torch.is_grad_enabled()


def test_on_a_gpu_it_works_in_the_callers_stream_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    # Where it left that stream, its thread returned to the first GPU, on which CUDA took memory of every worker.
    chosen: list[str] = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "set_stream", chosen.append)
    Background(lambda: None, torch.device("cuda:1")).wait()
    assert chosen == ["stream of cuda:1"]


def test_its_error_is_raised_at_each_wait_and_not_at_leaving() -> None:
    background = Background(lambda: 1 / 0, CPU)  # type: ignore[arg-type, return-value]
    background.leave(10)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            background.wait()


def test_leaving_waits_for_a_limited_time() -> None:
    go = threading.Event()
    background = Background(lambda: go.wait(10) or sys.exit(1), CPU)  # type: ignore[arg-type, return-value]
    background.leave(0.01)
    go.set()
    background.wait()
