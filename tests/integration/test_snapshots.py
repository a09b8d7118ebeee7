"""Snapshots at the borders of rounds, from which a run resumes when its workers were lost."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from resist_lightning import CheckpointError, Config, NeuronConfig, NeuronSimulator, WorkerLost
from resist_lightning.checkpoint.snapshots import SnapshotFolder
from tests.helpers.plain import held_out, stream
from tests.helpers.programs import run_torchrun
from tests.helpers.restarted import STEPS, main
from tests.helpers.small import Small
from tests.helpers.trainers import (
    make_strategy,
    make_trainer,
    run_trainers,
    run_trainers_to_the_end,
    train_in_one_process,
)
from tests.helpers.training import assert_equal_states, clone_state
from tests.integration.test_exact_resume import Noisy, Terminates, loader_of

State = dict[str, Tensor]
EPOCH = 14
STOP = 11  # in round 3: the newest snapshot is that of round 3, after 9 steps


class Stops(L.Callback):
    """Stops the run after some batches, by a KeyError."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self.after:
            raise KeyError("stopped")


def train(worker: int, snapshots: str, options: dict[str, Any], ckpt_path: str | None = None, stop: int = 0) -> State:
    L.seed_everything(1000 + worker if ckpt_path is None else 77, verbose=False)
    module = Noisy(seed=7 if ckpt_path is None else 8, face=options.get("face", "resist"))
    strategy = make_strategy(snapshots=snapshots, **options)
    trainer = make_trainer(strategy, max_epochs=3, callbacks=[Stops(stop)] if stop else [])
    try:
        trainer.fit(module, loader_of(worker, "shuffled"), ckpt_path=ckpt_path)
    except (KeyError, WorkerLost):
        assert stop
    return clone_state(module) if not stop else {}


CASES: dict[str, dict[str, Any]] = {
    "momentum that travels, int2": {"momentum": "travel", "wire": "int2"},
    "local SGD, every third round, overlap": {"face": "local_sgd", "snapshot_every_n_rounds": 3, "overlap": 2},
    "IST, momentum that travels": {"face": "ist", "momentum": "travel"},
}


def unbroken_stopped_and_resumed(worker: int, folder: str) -> dict[str, tuple[State, State]]:
    found = {}
    for name, options in CASES.items():
        own = f"{folder}/{name}"
        unbroken = train(worker, f"{own}/unbroken", options)
        train(worker, f"{own}/stopped", options, stop=STOP)
        found[name] = unbroken, train(worker, f"{own}/stopped", options, ckpt_path=f"{own}/stopped")
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, tuple[State, State]]]]:
    folder = tmp_path_factory.mktemp("cases")
    return folder, run_trainers(unbroken_stopped_and_resumed, 2, str(folder))


@pytest.mark.parametrize("name", CASES)
def test_a_run_resumed_from_its_snapshots_is_the_unbroken_run(name: str, trained: tuple[Path, Any]) -> None:
    for found in trained[1]:
        unbroken, resumed = found[name]
        assert_equal_states(resumed, unbroken, exactly=True)
    assert not (trained[0] / name / "stopped").exists()  # the run has come to its end


def stopped(worker: int, folder: str, face: str = "resist") -> None:
    module = Small(face)
    trainer = make_trainer(make_strategy(face, snapshots=folder), max_epochs=1, callbacks=[Stops(STOP)])
    # A worker that raises later than the others gets their error.
    with pytest.raises((KeyError, WorkerLost)):
        trainer.fit(module, stream(worker, EPOCH))


def resumed(worker: int, folder: str, face: str = "resist") -> State:
    module = Small(face, seed=1)
    strategy = make_strategy(face, snapshots=folder)
    make_trainer(strategy, max_epochs=1).fit(module, stream(worker, EPOCH, start=9), ckpt_path=folder)
    return clone_state(module)


@pytest.fixture(scope="module")
def stopped_by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped") / "snapshots"
    run_trainers(stopped, 2, str(folder))
    return folder


@pytest.fixture
def snapshots(stopped_by_two: Path, tmp_path: Path) -> Path:
    """A copy of the snapshots of two workers that were stopped."""
    return shutil.copytree(stopped_by_two, tmp_path / "snapshots")


def break_file(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def test_only_the_newest_two_rounds_are_kept_and_a_broken_newest_falls_back(snapshots: Path) -> None:
    assert [snapshot.round for snapshot in SnapshotFolder(snapshots).newest_first()] == [3, 2]

    break_file(SnapshotFolder(snapshots).newest_first()[0].files[1])
    rounds = run_trainers(begun_in_round, 2, str(snapshots))

    assert rounds == [2, 2]


def begun_in_round(worker: int, folder: str) -> int:
    rounds = []

    class Notes(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            rounds.append(trainer.strategy.engine.clock.round)

    module = Small(seed=1)
    trainer = make_trainer(make_strategy(snapshots=folder), max_epochs=1, callbacks=[Notes()])
    trainer.fit(module, stream(worker, EPOCH, start=6), ckpt_path=folder)
    return int(rounds[0])


def test_where_no_round_is_whole_all_workers_say_so(snapshots: Path) -> None:
    for snapshot in SnapshotFolder(snapshots).newest_first():
        break_file(snapshot.files[1])

    for outcome in run_trainers_to_the_end(resumed, 2, str(snapshots)):
        assert isinstance(outcome.error, CheckpointError)
        assert "no snapshot that all workers can read; rounds: worker 0 [2, 3]; worker 1 none" in str(outcome.error)


@pytest.mark.parametrize(("face", "before", "after"), [("resist", 2, 1), ("resist", 2, 3), ("ist", 3, 2)])
def test_other_workers_go_on_from_what_all_had(face: str, before: int, after: int, snapshots: Path) -> None:
    folder = snapshots
    if face == "ist":
        folder = snapshots.with_name("ist")
        run_trainers(stopped, before, str(folder), face)

    results = run_trainers(resumed, after, str(folder), face)

    config = NeuronConfig(local_steps=3) if face == "ist" else Config(local_steps=3, min_blocks=1)
    module = Small(face)
    begun = train_in_one_process(module, config, before, 9)  # to the border of round 3
    module.load_state_dict(full_state(begun))
    expected = train_in_one_process(module, config, after, EPOCH - 9, first_step=9).full_model().state_dict()
    assert len(results) == after
    for state in results:
        assert_equal_states(state, results[0], exactly=True)
        # Batch norm is re-estimated on the batches since the restart, the simulator's on the last eight.
        for name, value in expected.items():
            if "running" not in name and "tracked" not in name:
                torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)


def full_state(simulator: Any) -> State:
    """The unscaled full model, as its holders have it at a border."""
    if isinstance(simulator, NeuronSimulator):
        return simulator.full
    return {name: value.clone() for name, value in simulator.workers[0].module.state_dict().items()}


def starts_anew(worker: int, folder: str) -> None:
    make_trainer(make_strategy(snapshots=folder), max_epochs=1).fit(Small(), stream(worker, EPOCH))


def test_a_new_run_does_not_write_over_the_snapshots_of_a_broken_one(snapshots: Path) -> None:
    for outcome in run_trainers_to_the_end(starts_anew, 2, str(snapshots)):
        assert isinstance(outcome.error, ValueError)
        assert "a run that did not finish" in str(outcome.error)
        assert "ckpt_path=" in str(outcome.error)
    assert len(SnapshotFolder(snapshots).newest_first()) == 2


def test_what_else_is_in_the_folder_stays_when_the_run_has_come_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "round=best").mkdir()
    (tmp_path / "thesis.tex").write_text("years of work")

    run_trainers(starts_anew, 2, str(tmp_path))

    assert sorted(path.name for path in tmp_path.iterdir()) == ["round=best", "thesis.tex"]


def ends_by_signals(worker: int, folder: str) -> None:
    """Two trainings: one learns of the signal in a validation, in its second round; the other in its last sync."""
    strategy = make_strategy(snapshots=f"{folder}/validated", snapshot_every_n_rounds=10)
    trainer = make_trainer(strategy, max_epochs=1, callbacks=[Terminates(3)], val_check_interval=4)
    with pytest.raises(SIGTERMException):
        trainer.fit(Small(), stream(worker, 8), held_out(worker))
    trainer = make_trainer(make_strategy(snapshots=f"{folder}/ended"), max_epochs=1, callbacks=[Terminates(7)])
    trainer.fit(Small(), stream(worker, 8))


def test_a_signal_leaves_a_snapshot_of_the_round_that_it_ends(tmp_path: Path) -> None:
    """The first run stopped in mid-round and lost up to ten rounds; the second, started again, repeats its last one."""
    outcomes = run_trainers_to_the_end(ends_by_signals, 2, str(tmp_path))
    assert [type(outcome.error) for outcome in outcomes] == [SIGTERMException] * 2
    for name in ("validated", "ended"):
        assert [snapshot.round for snapshot in SnapshotFolder(tmp_path / name).newest_first()][:1] == [2], name


class Odd(L.Callback):
    """Has an object in its state that is not plain data, and puts one into the optimizer."""

    def state_dict(self) -> dict[str, Any]:
        return {"odd": argparse.Namespace(a=1)}

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.optimizers[0].param_groups[0]["odd"] = argparse.Namespace(a=1)
        with pytest.raises(ValueError, match=r"refuses 'optimizers' \(argparse.Namespace\)"):
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "odd.ckpt")


def keeps_an_object(worker: int, folder: str) -> None:
    trainer = make_trainer(make_strategy(snapshots=folder), max_epochs=1, callbacks=[Odd()], default_root_dir=folder)
    trainer.fit(Small(), stream(worker, EPOCH))


def test_what_could_not_be_loaded_again_is_refused_when_the_first_file_is_written(tmp_path: Path) -> None:
    (outcome,) = run_trainers_to_the_end(keeps_an_object, 1, str(tmp_path))
    assert isinstance(outcome.error, ValueError)
    assert "'callbacks' (argparse.Namespace)" in str(outcome.error)
    assert "'optimizers' (argparse.Namespace)" in str(outcome.error)
    assert SnapshotFolder(tmp_path).newest_first() == []
    assert not (tmp_path / "odd.ckpt").exists()


# Under torchrun, which restarts the workers.


@pytest.mark.parametrize(
    ("harm_after", "first_step"), [(7, 7), (1, 1)], ids=["in round 2", "before there is a snapshot"]
)
def test_torchrun_starts_killed_workers_again_and_the_run_goes_on_by_itself(
    harm_after: int, first_step: int, tmp_path: Path
) -> None:
    said = run_torchrun(main, tmp_path, harm_after, max_restarts=1)

    results = [torch.load(tmp_path / f"result-{worker}.pt", weights_only=True) for worker in (0, 1)]
    simulator = train_in_one_process(Small(), Config(local_steps=3, min_blocks=1), 2, STEPS)
    assert (tmp_path / "harmed").exists(), said
    for result in results:
        assert result["steps"][0] == first_step, said  # after the snapshot of round 2, or anew
        assert_equal_states(result["state"], simulator.full_model().state_dict(), exactly=False)
