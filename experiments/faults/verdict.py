"""Compares the end of a broken training with the required one. Reads nothing, starts nothing."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from typing import Any

from experiments.faults.cases import Case
from experiments.faults.continuation import Left, lost_steps
from experiments.faults.training import SAVE_EVERY, on_save_error
from experiments.faults.workers import Ended

# The end of the struck worker, and its error, which another one must not hide.
OWN_END = {
    "kill": ("SIGKILL", ""),
    "segfault": ("SIGSEGV", ""),
    "raise_error": ("exit code 1", "Injected"),
    "raise_in_loader": ("exit code 1", "Injected"),
    "run_out_of_memory": ("exit code 1", "RuntimeError"),
    "fill_disk": ("exit code 1", "CheckpointNotWritten"),
    "terminate": ("exit code 143", "SIGTERMException"),
    "interrupt": ("exit code 1", "SystemExit"),
}
# The error of all workers, having agreed to end before the same batch, or that a checkpoint could not be written.
TOGETHER = {"fill_disk": "CheckpointNotWritten", "terminate": "SIGTERMException", "interrupt": "SystemExit"}
# Its last reported activity; a worker that is gone in a moment cannot have reported that moment.
DOING = r"last doing: (starting\.|(starting|local steps|handshake|averaging|hand-over|evaluation|saving|finishing), round \d+, local step \d+)"
# Faults that, struck in the middle of a file, may come out as the failure of the write that they break off.
IN_A_FILE = ("raise_error", "run_out_of_memory")
HANG, WRONG = "hang", "wrong continuation"  # how the findings begin that no run may have


def findings(case: Case, ended: Ended, left: Left, resumed: str | None) -> list[str]:
    """The findings of a run; each begins with its kind and a colon."""
    if ended.struck is None:
        return ["not tried: the fault did not strike"]
    return [
        *_of_ends(case, ended),
        *_of_the_struck(case, ended),
        *_of_errors(case, ended, left),
        *_of_files(case, ended, left, resumed),
    ]


def survived(case: Case, ended: Ended) -> bool:
    """Whether the fault was one that a training may survive, and it did."""
    came_to_the_end = not any(ended.errors) and all(end in ("exit code 0", "ended") for end in ended.ends)
    return on_save_error(case.fault) == "warn" and came_to_the_end


def _of_ends(case: Case, ended: Ended) -> Iterator[str]:
    for worker in ended.hung:
        yield f"{HANG}: worker {worker} still ran at the limit"
    if ended.left_over:
        yield f"left over: {len(ended.left_over)} processes, in the states {' '.join(sorted(ended.left_over))}"
    if ended.thawed == "running":
        yield f"{HANG}: worker {case.fault.worker} still ran after it was thawed"
    if ended.thawed == "exit code 0":
        yield f"{WRONG}: worker {case.fault.worker} went on to the end when it was thawed"
    if ended.returncode == 0 and not survived(case, ended):
        yield f"{WRONG}: the launcher ended with exit code 0"


def _of_the_struck(case: Case, ended: Ended) -> Iterator[str]:
    struck, kind = case.fault.worker, case.fault.kind
    if kind not in OWN_END or survived(case, ended):
        return
    end, error = ended.ends[struck], ended.errors[struck]
    found = (end if case.launcher == "forked" else OWN_END[kind][0], error["type"] if error else "")
    if found != OWN_END[kind] and not (_in_a_file(case) and found == OWN_END["fill_disk"]):
        yield f"own error: worker {struck} ended with {' '.join(found)}, not with {' '.join(OWN_END[kind])}"


def _of_errors(case: Case, ended: Ended, left: Left) -> Iterator[str]:
    if survived(case, ended):
        return
    struck = case.fault.worker
    for worker, (end, error) in enumerate(zip(ended.ends, ended.errors, strict=True)):
        if worker == struck or worker in ended.hung:
            continue
        if error is None and end in ("exit code 0", "ended") and case.launcher == "forked":
            yield f"{WRONG}: worker {worker} came to the end as if nothing had happened"
        elif error is None and end != "ended":
            yield f"no error: worker {worker} ended with {end}"
        elif error is not None:
            yield from _of_error(case, worker, error, left)
    if case.launcher != "forked" and case.fault.kind != "interrupt" and not _is_told(case, ended):
        yield f"not named: nothing that was said names worker {struck}"


def _of_error(case: Case, worker: int, error: dict[str, Any], left: Left) -> Iterator[str]:
    kind, text = error["type"], error["text"]
    if kind == "SIGTERMException" and case.launcher != "forked":
        return  # the launcher has ended the others
    if kind == TOGETHER.get(case.fault.kind) or (_in_a_file(case) and kind == TOGETHER["fill_disk"]):
        if kind == "CheckpointNotWritten" and not re.search(rf"\bworker {case.fault.worker}: ", text):
            yield f"not named: the error of worker {worker} does not name the worker"
        return
    if kind != "WorkerLost":
        yield f"other error: worker {worker} raised {kind}"
        return
    wanted = {
        "the worker": rf"\bworker {case.fault.worker}\b",
        "its host": re.escape(socket.gethostname()),
        "what it was doing": DOING,
        "how to resume": r"ckpt_path='[^']+\.ckpt'" if left.last is not None else r"resume|ckpt_path",
    }
    for what, pattern in wanted.items():
        if not re.search(pattern, text):
            yield f"not named: the error of worker {worker} does not name {what}"


def _in_a_file(case: Case) -> bool:
    return case.fault.place == "saving" and case.fault.kind in IN_A_FILE


def _is_told(case: Case, ended: Ended) -> bool:
    """Whether any survivor's error, or the launcher, names the worker."""
    told = "".join(error["text"] for error in ended.errors if error and error["type"] == "WorkerLost") + ended.output
    return bool(re.search(rf"\b(rank|worker)\W+{case.fault.worker}\b", told))


def _of_files(case: Case, ended: Ended, left: Left, resumed: str | None) -> Iterator[str]:
    assert ended.struck is not None
    lost = lost_steps(ended.struck["steps"], left)
    most = SAVE_EVERY - (case.fault.place != "saving")
    if lost > most:
        yield f"lost work: {lost} local steps; the checkpoint of at most {most} before should be there"
    if left.half_written:
        yield f"half-written: {', '.join(left.half_written)}"
    if not left.equal:
        yield f"{WRONG}: a checkpoint is not what the unbroken training saved then"
    if resumed is not None:
        yield resumed
