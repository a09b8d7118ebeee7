"""Strikes one of two workers that share a device, and records the ends and the errors of both."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from experiments.faults.cases import Case
from experiments.faults.continuation import Unbroken, look
from experiments.faults.training import Settings
from experiments.faults.verdict import findings
from experiments.faults.workers import run_training
from experiments.gpu.cases import Struck
from experiments.gpu.hardware import nccl_variables
from experiments.gpu.limits import Skipped
from experiments.harness.record import hiding

WORKERS = 2
TIMEOUT_SECONDS = 20.0  # of the strategy
SILENCE_SECONDS = 6.0  # starting CUDA keeps a process busy for seconds
LIMIT_SECONDS = 35.0  # from the strike to the end of the survivor


def strike(case: Struck, device: str, backend: str, *, classic: bool) -> dict[str, Any]:
    """Train, strike, check.

    Args:
        case: the fault, and the backend that is wanted.
        device: of both workers.
        backend: that two ranks on this device have.
        classic: whether that is the older one of torch.
    """
    if case.backend not in ("gloo", backend):
        raise Skipped(f"{WORKERS} ranks on one device have no {case.backend} here")
    struck = Case(case.fault, "resist", WORKERS)
    variables = [nccl_variables(worker, classic) if case.backend == "nccl" else {} for worker in range(WORKERS)]
    settings = Settings(
        "resist", WORKERS, TIMEOUT_SECONDS, SILENCE_SECONDS, case.fault, device=device, backend=case.backend,
        variables=variables,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        ended = run_training(settings, folder, limit=LIMIT_SECONDS)
        left = look(folder, Unbroken({}, {}))
        hide = hiding(folder)
    seconds = None
    if ended.struck is not None and ended.survived_until is not None:
        seconds = round(max(ended.survived_until - ended.struck["at"], 0.0), 3)
    return {
        "fault": str(case.fault),
        "ends": ended.ends,
        "errors": [error and {"type": error["type"], "text": hide(error["text"])} for error in ended.errors],
        "survivor_seconds": seconds,
        "resumed_from": left.last,
        "findings": [hide(finding) for finding in findings(struck, ended, left, None)],
        "said": None if ended.struck else hide(ended.output, end=True),
    }
