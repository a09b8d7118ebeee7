"""Continued training: from a checkpoint, with other workers, or by fitting again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from resist_lightning import Config
from tests.helpers.plain import CLASSES, Classifier, held_out, stream
from tests.helpers.small import LateSmall, Small
from tests.helpers.trainers import QUIET, make_strategy, make_trainer, run_trainers, train_in_one_process
from tests.helpers.training import assert_equal_states, clone_state
from tests.integration.test_exact_resume import SavesAt

State = dict[str, Tensor]
EPOCH = 9  # three rounds, and more than the eight batches for re-estimating batch norm


CASES: dict[str, dict[str, Any]] = {
    "running statistics, warm-up": {"batch_norm": "running", "warmup_rounds": 1},
    "blocks with several holders": {"min_blocks": 3},
    "IST": {"face": "ist"},
}


def unbroken(worker: int, folder: str, options: dict[str, Any]) -> State:
    """Train two epochs, with a checkpoint after each."""
    module = Small(options.get("face", "resist"))
    saving = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    trainer = make_trainer(make_strategy(**options), max_epochs=2, enable_checkpointing=True, callbacks=[saving])
    trainer.fit(module, stream(worker, EPOCH))
    return clone_state(module)


def resumed(worker: int, folder: str, options: dict[str, Any]) -> tuple[State, tuple[int, int]]:
    """Train the second epoch, from the checkpoint after the first."""
    module = Small(options.get("face", "resist"), seed=1)  # the checkpoint's weights replace these
    trainer = make_trainer(make_strategy(**options), max_epochs=2)
    trainer.fit(module, stream(worker, EPOCH, start=EPOCH), ckpt_path=f"{folder}/epoch=0.ckpt")
    return clone_state(module), (trainer.global_step, trainer.strategy.engine.clock.total_steps)


def train_in_turn(worker: int, folder: str) -> dict[str, Any]:
    """All trainings of two workers, one after the other in the same processes."""
    ordinary = f"{folder}/ordinary"
    found: dict[str, Any] = {"ordinary": unbroken(worker, ordinary, {})}
    for name, options in CASES.items():
        own = f"{folder}/{name}"
        found[name] = unbroken(worker, own, options), resumed(worker, own, options)
    found["again"] = fit_again(worker)
    save_before_training_goes_on(worker, ordinary)
    return {**found, "second": unbroken(worker, f"{folder}/second", {})}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("trained")
    return folder, run_trainers(train_in_turn, 2, str(folder))


@pytest.fixture
def ordinary(trained: tuple[Path, Any]) -> Path:
    """The checkpoints of a run of two workers."""
    return trained[0] / "ordinary"


@pytest.mark.parametrize("name", CASES)
def test_a_run_resumed_on_the_border_of_a_round_is_the_unbroken_run(name: str, trained: tuple[Path, Any]) -> None:
    for found in trained[1]:
        expected, (state, steps) = found[name]
        assert_equal_states(state, expected, exactly=True)
        assert steps == (2 * EPOCH, 2 * EPOCH)


# Another number of workers.


def test_a_checkpoint_of_two_workers_resumes_with_three(ordinary: Path) -> None:
    config = Config(local_steps=3, min_blocks=1)

    results = run_trainers(resumed, 3, str(ordinary), {})

    # After a sync, every simulated worker has the means, unscaled; three of them resume in round 3.
    before = train_in_one_process(Small(), config, 2, EPOCH)
    module = Small()
    module.load_state_dict(before.workers[0].module.state_dict())
    after = train_in_one_process(module, config, 3, EPOCH, first_step=EPOCH)
    expected = after.full_model().state_dict()
    for state, _ in results:
        assert_equal_states(state, expected)
        assert_equal_states(state, results[0][0], exactly=True)


def test_a_checkpoint_resumes_in_plain_lightning(ordinary: Path) -> None:
    path = ordinary / "epoch=0.ckpt"
    module = Small(seed=1)

    trainer = L.Trainer(**QUIET, devices=1, max_epochs=2)
    trainer.fit(module, stream(0, EPOCH, start=EPOCH), ckpt_path=str(path))

    saved = torch.load(path, weights_only=True)["state_dict"]
    assert trainer.global_step == 2 * EPOCH
    assert not torch.equal(module.state_dict()["net.stem.1.weight"], saved["net.stem.1.weight"])


def resumed_from_plain(worker: int, folder: str) -> dict[str, dict[str, State]]:
    found: dict[str, dict[str, State]] = {"resist": {}, "ist": {}}
    for face, states in found.items():
        for name, module in (("whole", Small(face)), ("late", LateSmall(face)), ("without", Small(face))):
            path = f"{folder}/{face}-{'without' if name == 'without' else 'with'}.ckpt"
            trainer = make_trainer(make_strategy(face, momentum="keep"), max_epochs=2)
            trainer.fit(module, stream(worker, EPOCH, start=EPOCH), ckpt_path=path)
            states[name] = clone_state(module)
    return found


def test_a_checkpoint_of_plain_lightning_resumes_with_its_momentum_however_the_network_is_built(
    tmp_path: Path,
) -> None:
    for face in ("resist", "ist"):
        plain = L.Trainer(**QUIET, devices=1, max_epochs=1)
        plain.fit(Small(face), stream(0, EPOCH))
        plain.save_checkpoint(tmp_path / f"{face}-with.ckpt")
        saved = torch.load(tmp_path / f"{face}-with.ckpt", weights_only=True)
        assert saved["optimizer_states"][0]["state"].pop(0)["momentum_buffer"].abs().sum() > 0
        torch.save(saved, tmp_path / f"{face}-without.ckpt")

    for by_face in run_trainers(resumed_from_plain, 2, str(tmp_path)):
        for found in by_face.values():
            assert_equal_states(found["late"], found["whole"], exactly=True)
            first = next(iter(found["whole"]))
            assert not torch.equal(found["whole"][first], found["without"][first])


# Fitting again.


def fit_again(worker: int) -> tuple[State, State, State]:
    """Train an epoch, fit again with nothing left to do, and again with an epoch more."""
    module, data = Small(), stream(worker, EPOCH)
    trainer = make_trainer(make_strategy(), max_epochs=1)
    states = []
    for epochs in (1, 1, 2):
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(module, data)
        states.append(clone_state(module))
        trainer.validate(module, held_out(worker), verbose=False)
    first, idle, last = states
    return first, idle, last


def test_fitting_again_with_the_same_trainer_goes_on(trained: tuple[Path, Any]) -> None:
    for found in trained[1]:
        first, _, last = found["again"]
        assert_equal_states(last, found["ordinary"], exactly=True)
        assert not torch.equal(first["net.stem.1.weight"], last["net.stem.1.weight"])


def test_fitting_again_with_nothing_left_to_do_leaves_the_full_model(trained: tuple[Path, Any]) -> None:
    for found in trained[1]:
        first, idle, _ = found["again"]
        assert_equal_states(idle, first, exactly=True)


class SavesBeforeTraining(L.Callback):
    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        trainer.save_checkpoint(self.path)


def save_before_training_goes_on(worker: int, folder: str) -> None:
    trainer = make_trainer(make_strategy(), max_epochs=2, callbacks=[SavesBeforeTraining(f"{folder}/start.ckpt")])
    trainer.fit(Small(seed=1), stream(worker, EPOCH, start=EPOCH), ckpt_path=f"{folder}/epoch=0.ckpt")


def test_a_checkpoint_saved_before_training_goes_on_is_the_one_that_was_loaded(ordinary: Path) -> None:
    loaded, saved = (torch.load(ordinary / f"{name}.ckpt", weights_only=True) for name in ("epoch=0", "start"))
    assert_equal_states(saved["state_dict"], loaded["state_dict"], exactly=True)
    assert saved["resist_lightning"].keys() == loaded["resist_lightning"].keys()


def test_a_second_trainer_in_the_process_trains_the_same(trained: tuple[Path, Any]) -> None:
    for found in trained[1]:
        assert_equal_states(found["second"], found["ordinary"], exactly=True)


# Blocks whose first forward shows where their branches end.


class Block(nn.Module):
    """A block that does not declare ``out`` as the end of its branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inside, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(torch.tanh(self.inside(x)))


class Unknown(Classifier):
    """A network with blocks of an unknown class."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed=seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            body = nn.Sequential(*(Block(12) for _ in range(5)))
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 12), body, nn.Linear(12, CLASSES))


def fit_unknown(worker: int, folder: str, start: int | None, **options: Any) -> State:
    """A run of two epochs that saves after some batches, or the rest of it from one of these."""
    module = Unknown(7 if start is None else 8)
    saves = (
        SavesAt(folder, (EPOCH, 2 * EPOCH)) if start is None else SavesBeforeTraining(f"{folder}/again-{start}.ckpt")
    )
    strategy = make_strategy(blocks="net.2.*", local_steps=4, **options)
    trainer = make_trainer(strategy, max_epochs=2, callbacks=[saves])
    path = None if start is None else f"{folder}/{start}.ckpt"
    trainer.fit(module, stream(worker, EPOCH, start=start or 0), ckpt_path=path)
    return clone_state(module)


BRANCHES: dict[str, dict[str, Any]] = {
    "several holders": {"min_blocks": 3},
    "growth": {"min_blocks": None, "growth": (0.4, 0.7, 1.0)},
}


def fit_unknown_three_times(worker: int, folder: str) -> dict[str, list[State]]:
    found = {}
    for name, options in BRANCHES.items():
        own = f"{folder}/{name}"
        found[name] = [fit_unknown(worker, own, start, **options) for start in (None, EPOCH, 2 * EPOCH)]
    return found


def test_branch_ends_that_were_seen_before_hold_from_the_first_step_of_a_resumed_run(tmp_path: Path) -> None:
    for found in run_trainers(fit_unknown_three_times, 2, str(tmp_path)):
        for unbroken, *others in found.values():
            for state in others:
                assert_equal_states(state, unbroken, exactly=True)

    for folder in (tmp_path / name for name in BRANCHES):
        for start in (EPOCH, 2 * EPOCH):
            loaded, saved = (torch.load(folder / f"{name}{start}.ckpt", weights_only=True) for name in ("", "again-"))
            assert_equal_states(saved["state_dict"], loaded["state_dict"], exactly=True)
