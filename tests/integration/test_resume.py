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
from tests.helpers.plain import CLASSES, Classifier, Late, held_out, stream
from tests.helpers.trainers import QUIET, kind_for, make_strategy, make_trainer, run_trainers, train_in_one_process
from tests.helpers.training import assert_equal_states, clone_state
from tests.integration.test_exact_resume import SavesAt

State = dict[str, Tensor]
EPOCH = 9  # three rounds, and more than the eight batches for re-estimating batch norm


def unbroken(worker: int, folder: str, options: dict[str, Any]) -> State:
    """Train two epochs, with a checkpoint after each."""
    module = Classifier(kind_for(**options))
    saving = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    trainer = make_trainer(make_strategy(**options), max_epochs=2, enable_checkpointing=True, callbacks=[saving])
    trainer.fit(module, stream(worker, EPOCH))
    return clone_state(module)


def resumed(worker: int, folder: str, options: dict[str, Any]) -> tuple[State, tuple[int, int]]:
    """Train the second epoch, from the checkpoint after the first."""
    module = Classifier(kind_for(**options), seed=1)  # the checkpoint's weights replace these
    trainer = make_trainer(make_strategy(**options), max_epochs=2)
    trainer.fit(module, stream(worker, EPOCH, start=EPOCH), ckpt_path=f"{folder}/epoch=0.ckpt")
    return clone_state(module), (trainer.global_step, trainer.strategy.engine.clock.total_steps)


def assert_resumes(workers: int, folder: Path, options: dict[str, Any]) -> None:
    expected = run_trainers(unbroken, workers, str(folder), options)[0]

    for state, steps in run_trainers(resumed, workers, str(folder), options):
        assert_equal_states(state, expected, exactly=True)
        assert steps == (2 * EPOCH, 2 * EPOCH)


@pytest.mark.parametrize(
    ("workers", "options"),
    [
        (2, {"batch_norm": "running", "warmup_rounds": 1}),
        *((3, {"min_blocks": 3}), (3, {"face": "ist"})),
    ],
    ids=["running statistics, warm-up", "blocks with several holders", "IST"],
)
def test_a_run_resumed_on_the_border_of_a_round_is_the_unbroken_run(
    workers: int, options: dict[str, Any], tmp_path: Path
) -> None:
    assert_resumes(workers, tmp_path, options)


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State]:
    """A run of two workers: its checkpoints and its weights."""
    folder = tmp_path_factory.mktemp("ordinary")
    return folder, run_trainers(unbroken, 2, str(folder), {})[0]


# Another number of workers.


def test_a_checkpoint_of_two_workers_resumes_with_three(ordinary: tuple[Path, State]) -> None:
    config = Config(local_steps=3, min_blocks=1)

    results = run_trainers(resumed, 3, str(ordinary[0]), {})

    # After a sync, every simulated worker has the means, unscaled; three of them resume in round 3.
    before = train_in_one_process(Classifier(), config, 2, EPOCH)
    module = Classifier()
    module.load_state_dict(before.workers[0].module.state_dict())
    after = train_in_one_process(module, config, 3, EPOCH, first_step=EPOCH)
    expected = after.full_model().state_dict()
    for state, _ in results:
        assert_equal_states(state, expected)
        assert_equal_states(state, results[0][0], exactly=True)


def test_a_checkpoint_resumes_in_plain_lightning(ordinary: tuple[Path, State]) -> None:
    path = ordinary[0] / "epoch=0.ckpt"
    module = Classifier(seed=1)

    trainer = L.Trainer(**QUIET, devices=1, max_epochs=2)
    trainer.fit(module, stream(0, EPOCH, start=EPOCH), ckpt_path=str(path))

    saved = torch.load(path, weights_only=True)["state_dict"]
    assert trainer.global_step == 2 * EPOCH
    assert not torch.equal(module.net.stem.weight, saved["net.stem.weight"])


def resumed_from_plain(worker: int, face: str, folder: str) -> dict[str, State]:
    found, kind = {}, kind_for(face)
    for name, module in (("whole", Classifier(kind)), ("late", Late(kind)), ("without", Classifier(kind))):
        path = f"{folder}/{'without' if name == 'without' else 'with'}.ckpt"
        trainer = make_trainer(make_strategy(face, momentum="keep"), max_epochs=2)
        trainer.fit(module, stream(worker, EPOCH, start=EPOCH), ckpt_path=path)
        found[name] = clone_state(module)
    return found


@pytest.mark.parametrize("face", ["resist", "ist"])
def test_a_checkpoint_of_plain_lightning_resumes_with_its_momentum_however_the_network_is_built(
    face: str, tmp_path: Path
) -> None:
    plain = L.Trainer(**QUIET, devices=1, max_epochs=1)
    plain.fit(Classifier(kind_for(face)), stream(0, EPOCH))
    plain.save_checkpoint(tmp_path / "with.ckpt")
    saved = torch.load(tmp_path / "with.ckpt", weights_only=True)
    assert saved["optimizer_states"][0]["state"].pop(0)["momentum_buffer"].abs().sum() > 0
    torch.save(saved, tmp_path / "without.ckpt")

    for found in run_trainers(resumed_from_plain, 2, face, str(tmp_path)):
        assert_equal_states(found["late"], found["whole"], exactly=True)
        first = next(iter(found["whole"]))
        assert not torch.equal(found["whole"][first], found["without"][first])


# Fitting again.


def fit_twice(worker: int, first: int, then: int) -> tuple[State, State, bool]:
    module, data = Classifier(), stream(worker, EPOCH)
    trainer = make_trainer(make_strategy(), max_epochs=first)
    trainer.fit(module, data)
    between = clone_state(module)
    trainer.validate(module, held_out(worker), verbose=False)
    trainer.fit_loop.max_epochs = then
    trainer.fit(module, data)
    return between, clone_state(module), module.training


def test_fitting_again_with_the_same_trainer_goes_on(ordinary: tuple[Path, State]) -> None:
    for between, state, _ in run_trainers(fit_twice, 2, 1, 2):
        assert_equal_states(state, ordinary[1], exactly=True)
        assert not torch.equal(between["net.stem.weight"], state["net.stem.weight"])


def test_fitting_again_with_nothing_left_to_do_leaves_the_full_model() -> None:
    for between, state, _ in run_trainers(fit_twice, 2, 1, 1):
        assert_equal_states(state, between, exactly=True)


class SavesBeforeTraining(L.Callback):
    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        trainer.save_checkpoint(self.path)


def save_before_training_goes_on(worker: int, folder: str) -> State:
    module = Classifier(seed=1)
    trainer = make_trainer(make_strategy(), max_epochs=2, callbacks=[SavesBeforeTraining(f"{folder}/start.ckpt")])
    trainer.fit(module, stream(worker, EPOCH, start=EPOCH), ckpt_path=f"{folder}/epoch=0.ckpt")
    return clone_state(module)


def test_a_checkpoint_saved_before_training_goes_on_is_the_one_that_was_loaded(ordinary: tuple[Path, State]) -> None:
    folder = ordinary[0]
    run_trainers(save_before_training_goes_on, 2, str(folder))

    loaded, saved = (torch.load(folder / f"{name}.ckpt", weights_only=True) for name in ("epoch=0", "start"))
    assert_equal_states(saved["state_dict"], loaded["state_dict"], exactly=True)
    assert saved["resist_lightning"].keys() == loaded["resist_lightning"].keys()


def fit_with_two_trainers(worker: int) -> list[State]:
    states = []
    for _ in range(2):
        module = Classifier()
        make_trainer(make_strategy(), max_epochs=2).fit(module, stream(worker, EPOCH))
        states.append(clone_state(module))
    return states


def test_a_second_trainer_in_the_process_trains_the_same(ordinary: tuple[Path, State]) -> None:
    for states in run_trainers(fit_with_two_trainers, 2):
        assert len(states) == 2
        for state in states:
            assert_equal_states(state, ordinary[1], exactly=True)


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
            body = nn.Sequential(*(Block(12) for _ in range(8)))
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 12), body, nn.Linear(12, CLASSES))


def fit_unknown(worker: int, folder: str, start: int | None, **options: Any) -> State:
    """A run of two epochs that saves after some batches, or the rest of it from one of these."""
    module = Unknown(7 if start is None else 8)
    saves = (
        SavesAt(folder, (EPOCH, 2 * EPOCH)) if start is None else SavesBeforeTraining(f"{folder}/again-{start}.ckpt")
    )
    trainer = make_trainer(make_strategy(**options), max_epochs=2, callbacks=[saves])
    path = None if start is None else f"{folder}/{start}.ckpt"
    trainer.fit(module, stream(worker, EPOCH, start=start or 0), ckpt_path=path)
    return clone_state(module)


def fit_unknown_three_times(worker: int, folder: str, options: dict[str, Any]) -> list[State]:
    return [fit_unknown(worker, folder, start, **options) for start in (None, EPOCH, 2 * EPOCH)]


@pytest.mark.parametrize("options", [{"min_blocks": 3}, {"min_blocks": None, "growth": (0.4, 0.7, 1.0)}], ids=str)
def test_branch_ends_that_were_seen_before_hold_from_the_first_step_of_a_resumed_run(
    options: dict[str, Any], tmp_path: Path
) -> None:
    options = {"blocks": "net.2.*", "local_steps": 4, **options}
    for unbroken, *others in run_trainers(fit_unknown_three_times, 2, str(tmp_path), options):
        for state in others:
            assert_equal_states(state, unbroken, exactly=True)

    for start in (EPOCH, 2 * EPOCH):
        loaded, saved = (torch.load(tmp_path / f"{name}{start}.ckpt", weights_only=True) for name in ("", "again-"))
        assert_equal_states(saved["state_dict"], loaded["state_dict"], exactly=True)
