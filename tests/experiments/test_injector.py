"""The fault injector does what its sentence says, there, once, in that worker; a fault that never came is an error."""

from __future__ import annotations

import json
import os
import pickle
import signal
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint

from experiments.faults import faults, injections
from experiments.faults.faults import PLACES, Fault, Injector, NeverStruck
from resist_lightning.schedule.progress import Activity
from tests.helpers.plain import Classifier, held_out, stream
from tests.helpers.processes import run_workers
from tests.helpers.trainers import make_strategy, make_trainer, run_trainers, run_trainers_to_the_end

STEPS = 9  # three rounds
PATIENCE_SECONDS = 30.0


def fit(worker: int, folder: str, *faults: Fault, others: Sequence[L.Callback] = ()) -> None:
    """Train three rounds with their syncs, then an evaluation, then a checkpoint; then the same again."""
    injectors = [Injector(fault, Path(folder, f"{fault.place}-{fault.round}-{worker}")) for fault in faults]
    tempfile.tempdir = folder
    saving = ModelCheckpoint(Path(folder, "saved"), save_on_train_epoch_end=True)
    trainer = make_trainer(
        make_strategy(), max_epochs=2, callbacks=[saving, *injectors, *others], enable_checkpointing=True
    )
    trainer.fit(Classifier(), stream(worker, STEPS), held_out(worker))


# The sentences.


def test_a_sentence_reads_aloud_and_travels() -> None:
    fault = Fault("freeze", 0, "local steps", round=1, step=2)

    assert str(fault) == 'freeze(worker=0).at("local steps", round=1, step=2)'
    assert str(Fault("kill", 1, "hand_over", round=2)) == 'kill(worker=1).at("hand_over", round=2)'
    assert pickle.loads(pickle.dumps(fault)) == fault


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Fault("kill", 1, "lunch", round=0),
            "place='lunch' is not known; choose one of 'local steps', 'handshake'",
        ),
        (lambda: Fault("hug", 1, "saving", 0), "kind='hug' is not known; choose one of 'kill'"),
        (lambda: Fault("raise_in_loader", 1, "saving", round=0), "raise_in_loader cannot happen at 'saving'"),
        (
            lambda: Fault("kill", 1, "handshake", round=0, step=1),
            "step=1 has a meaning only at local steps and saving",
        ),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], Fault], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# Effects.


def strike_a_child(_: int, kind: str) -> str:
    """Strike a child process; returns the signal that ends or stops it, and after a thaw its exit code."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        injections.INJECTIONS[kind]("a sentence")
        os._exit(7)
    _, status = os.waitpid(child, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        stopped = signal.Signals(os.WSTOPSIG(status)).name
        faults.thaw(child)
        _, status = os.waitpid(child, 0)
        return f"{stopped}, then {os.WEXITSTATUS(status)}"
    return signal.Signals(os.WTERMSIG(status)).name


@pytest.mark.parametrize(
    ("kind", "end"),
    [
        ("kill", "SIGKILL"),
        ("terminate", "SIGTERM"),
        ("segfault", "SIGSEGV"),
        ("interrupt", "SIGINT"),
        ("freeze", "SIGSTOP, then 7"),
    ],
)
def test_a_blow_is_the_signal_that_it_says(kind: str, end: str) -> None:
    assert run_workers(strike_a_child, 1, kind) == [end]


@pytest.mark.parametrize(
    ("fault", "error", "message", "inside"),
    [
        (Fault("raise_error", 1, "local steps", round=1, step=1), "Injected", r"raise_error\(worker=1\)", "backward"),
        (Fault("raise_in_loader", 1, "local steps", round=2), "Injected", r"raise_in_loader\(worker=1\)", "fetch"),
        (Fault("run_out_of_memory", 1, "local steps", round=0), "RuntimeError", "allocate", "torch.empty"),
        (
            Fault("fill_disk", 0, "saving", round=3),
            "CheckpointNotWritten",
            "worker 0: File too large",
            "save_checkpoint",
        ),
    ],
    ids=lambda value: value.kind if isinstance(value, Fault) else "",
)
def test_an_error_is_raised_where_users_see_it(
    fault: Fault, error: str, message: str, inside: str, tmp_path: Path
) -> None:
    outcomes = run_trainers_to_the_end(fit, 2, str(tmp_path), fault, timeout=PATIENCE_SECONDS)

    struck = outcomes[fault.worker]
    assert type(struck.error).__name__ == error
    with pytest.raises(type(struck.error), match=message):  # type: ignore[arg-type]
        raise struck.error  # type: ignore[misc]
    assert inside in struck.traceback
    assert type(outcomes[1 - fault.worker].error).__name__ in ("WorkerLost", "CheckpointNotWritten")


def test_a_worker_that_is_killed_while_it_writes_leaves_half_a_file_on_the_disk(tmp_path: Path) -> None:
    fault = Fault("kill", 0, "saving", round=3)
    outcomes = run_trainers_to_the_end(fit, 2, str(tmp_path), fault, timeout=PATIENCE_SECONDS)

    assert outcomes[0].end == "SIGKILL"
    assert injections.HALF_A_FILE_BYTES in [path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()]


# In the right place, once, and in one worker only.


class Begun(L.Callback):
    """Counts the returns of a sending function since the worker's present activity began."""

    def __init__(self, name: str | None) -> None:
        self.times = 0
        if name is not None:
            setattr(dist, name, self.counted(getattr(dist, name)))

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.strategy.engine.activity.listeners.append(self.forget)  # type: ignore[attr-defined]

    def forget(self, _: Activity) -> None:
        self.times = 0

    def counted(self, send: Callable[..., Any]) -> Callable[..., Any]:
        def send_and_count(*args: Any, **kwargs: Any) -> Any:
            begun = send(*args, **kwargs)
            self.times += 1
            return begun

        return send_and_count


NEVER = Fault("raise_error", 1, "hand_over", round=99)

# Of each place: the round and step, the worker's activity and steps then, and what is in its stack, and what is not.
TRIED: dict[Any, tuple[int, int, str | None, int, str, str]] = {
    "local steps": (1, 2, "local steps", 5, "on_before_backward", "run_backward"),
    "handshake": (1, 0, "handshake", 6, "_meet", "_handshake.run"),
    "averaging": (1, 0, "averaging", 6, "start_mean", "in _wait"),
    "hand_over": (0, 0, "hand_over", 3, "in exchange", "in _wait"),
    "evaluation": (3, 0, "evaluation", 9, "begin_observation", "_assemble"),
    "saving": (3, 0, None, 9, "save_checkpoint", "barrier"),
}


def fit_with_marks(worker: int, folder: str, faults: list[Fault]) -> tuple[dict[str, list[tuple[str, int]]], str]:
    """Instead of each fault, note the worker's stack, and the number of such messages that it has begun to send there.

    Returns the notes of each fault, and the error of one that never came.
    """
    found: dict[str, list[tuple[str, int]]] = {str(fault): [] for fault in faults}
    begun = {str(fault): Begun(injections.SENDING.get(fault.place)) for fault in faults}

    def note(sentence: str) -> None:
        found[sentence].append(("".join(traceback.format_stack()), begun[sentence].times))

    injections.INJECTIONS["raise_error"] = note
    never = ""
    try:
        fit(worker, folder, *faults, NEVER, others=list(begun.values()))
    except NeverStruck as error:
        never = str(error)
    return found, never


def test_each_strikes_where_it_says_once_in_one_worker_and_one_that_never_came_is_an_error(tmp_path: Path) -> None:
    assert tuple(TRIED) == PLACES
    faults = {place: Fault("raise_error", 1, place, round=at[0], step=at[1]) for place, at in TRIED.items()}
    (others, no_error), (own, error) = run_trainers(fit_with_marks, 2, str(tmp_path), list(faults.values()))

    for place, (_, _, what, steps, inside, not_inside) in TRIED.items():
        sentence = str(faults[place])
        assert others[sentence] == [], place
        ((stack, begun),) = own[sentence]
        assert inside in stack, place
        assert not_inside not in stack, place
        assert begun == (1 if place in injections.SENDING else 0), place
        (note,) = tmp_path.glob(f"{place}-*")
        assert note.name.endswith("-1"), place
        noted = json.loads(note.read_text())
        assert noted["what"] == (what or noted["what"]), place
        assert noted["steps"] == steps, place
    assert no_error == ""
    assert error == (
        'raise_error(worker=1).at("hand_over", round=99) did not happen: '
        "the training ended before it reached that place."
    )
