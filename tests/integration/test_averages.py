"""Lightning's callbacks that average weights: each worker averages its part, and all see the mean of these."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from resist_lightning import Config, Simulator
from resist_lightning.comm.byte_formulas import SYNC_KINDS
from resist_lightning.methods.resist.bytes import sync_bytes
from resist_lightning.methods.resist.layout import BlockLayout
from resist_lightning.schedule.transfers import plan_sync
from resist_lightning.state.optimizer_state import OptimizerStates
from tests.helpers.auxnet import make_stages
from tests.helpers.plain import Classifier, batch_of, evaluate, held_out, stream
from tests.helpers.trainers import QUIET, make_strategy, make_trainer, run_trainers
from tests.helpers.training import assert_equal_states, clone_state

averaging = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging", reason="Lightning 2.6 brought it")

DECAY = 0.8
EPOCH = 5  # batches; rounds of three steps may end anywhere in an epoch
EPOCHS = 2
CONFIGS: dict[str, dict[str, Any]] = {
    "local_sgd": {},
    "resist": {},
    "two holders": {"min_blocks": 3, "batch_norm": "running"},
}


def ema() -> Any:
    return averaging.EMAWeightAveraging(decay=DECAY)


CALLBACKS: dict[str, Any] = {
    "ema": ema,
    "mean of parameters": lambda: averaging.WeightAveraging(use_buffers=False),
    "ends of epochs": lambda: averaging.EMAWeightAveraging(update_every_n_steps=0, update_starting_at_epoch=0),
}


class Watched(L.Callback):
    """Notes the losses of validations, and saves a checkpoint after four steps."""

    def __init__(self, folder: str) -> None:
        self.folder, self.losses = folder, []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 4:
            trainer.save_checkpoint(f"{self.folder}/4.ckpt")

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["val/loss"]))


class Counting(Classifier):
    """Writes a buffer in every validation."""

    def __init__(self, seed: int = 7) -> None:
        super().__init__("small", seed)
        self.register_buffer("validations", torch.zeros(()))

    def on_validation_epoch_end(self) -> None:
        self.validations += 1


def train(worker: int, trainer_options: dict[str, Any], callback: Any, folder: str, **options: Any) -> dict[str, Any]:
    """Train; returns the final weights, the losses, and the contents of the checkpoints."""
    module, watched = options.pop("module", None) or Classifier("small"), Watched(folder)
    saving = ModelCheckpoint(folder, filename="{step}", save_top_k=-1)
    callbacks = [callback, watched, saving] if folder else [callback]
    trainer = L.Trainer(
        **{**QUIET, "max_epochs": EPOCHS, "callbacks": callbacks, "enable_checkpointing": bool(folder)},
        **trainer_options,
    )
    validation = held_out(worker) if options.pop("validates", True) else None
    trainer.fit(module, stream(worker, EPOCH, options.pop("start", 0)), validation, **options)
    names = sorted(path.name for path in Path(folder).glob("*.ckpt")) if folder else []
    loaded = {name: torch.load(f"{folder}/{name}", weights_only=True) for name in names}
    found = {
        name: {**checkpoint["state_dict"], "n_averaged": checkpoint["averaging_state"]["n_averaged"]}
        for name, checkpoint in loaded.items()
    }
    average = trainer.callbacks[0]._average_model.module  # type: ignore[attr-defined]
    return {"state": clone_state(module), "losses": watched.losses, "saved": found, "average": clone_state(average)}


ALONE = [*((name, "resist") for name in CALLBACKS), ("ema", "local_sgd")]


def alone(worker: int, folder: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """For each callback and strategy, the training under the strategy and that without one."""
    found = []
    for number, (name, face) in enumerate(ALONE):
        ours = {"strategy": make_strategy(face, momentum="keep"), "devices": 1}
        plain = {"strategy": "auto", "devices": 1}
        found.append(
            (
                train(worker, ours, CALLBACKS[name](), f"{folder}/{number}/ours"),
                train(worker, plain, CALLBACKS[name](), f"{folder}/{number}/plain"),
            )
        )
    return found


@pytest.fixture(scope="module")
def of_one_worker(tmp_path_factory: pytest.TempPathFactory) -> Any:
    (found,) = run_trainers(alone, 1, str(tmp_path_factory.mktemp("alone")))
    return dict(zip(ALONE, found, strict=True))


@pytest.mark.parametrize(("name", "face"), ALONE, ids=str)
def test_one_worker_averages_as_lightning_does(of_one_worker: Any, name: str, face: str) -> None:
    ours, plain = of_one_worker[name, face]

    assert ours["losses"] == plain["losses"]
    assert len(ours["losses"]) == EPOCHS
    assert_equal_states(ours["state"], plain["state"], exactly=True)
    assert_equal_states(ours["average"], plain["average"], exactly=True)
    assert ours["saved"].keys() == plain["saved"].keys() >= {"4.ckpt", "step=5.ckpt", "step=10.ckpt"}
    for file, state in plain["saved"].items():
        assert_equal_states(ours["saved"][file], state, exactly=True)


# Several workers.


def averages_by_formula(config: Config, after: tuple[int, ...], workers: int = 2) -> dict[int, nn.Module]:
    """Full models of averages after some steps: each worker averages what it holds, and hands a block's average on."""
    simulator = Simulator(Classifier("small"), lambda copy: copy.configure_optimizers(), config, workers)  # type: ignore[operator]
    averages: list[dict[str, Tensor]] = [{} for _ in range(workers)]
    found = {}
    for step in range(max(after)):
        held = simulator.schedule.partition(simulator.clock.round).held
        for number, worker in enumerate(simulator.workers):
            module: Any = worker.module
            module.train()
            worker.optimizers[0].zero_grad()
            module.training_step(batch_of(number, step), step).backward()
            worker.optimizers[0].step()
            for name, value in worker.tensors().items():
                if name in simulator._block_of and simulator._block_of[name] not in held[number]:
                    continue
                old = averages[number].get(name, value.detach())
                new = value.detach() if step == 0 else DECAY * old + (1 - DECAY) * value.detach()
                averages[number][name] = new.to(value.dtype).clone()
        round = simulator.clock.round
        simulator.after_step()
        if simulator.clock.round > round:
            hand_over(simulator, averages, round)
        if step + 1 in after:
            found[step + 1] = full_model_of(simulator, averages)
    return found


@torch.no_grad()
def full_model_of(simulator: Simulator, averages: list[dict[str, Tensor]]) -> nn.Module:
    """The full model if each worker's tensors were its averages."""
    trained = [{name: value.clone() for name, value in worker.tensors().items()} for worker in simulator.workers]
    put(simulator, averages)
    full = simulator.full_model()
    put(simulator, trained)
    return full


def put(simulator: Simulator, values: list[dict[str, Tensor]]) -> None:
    for worker, own in zip(simulator.workers, values, strict=True):
        for name, value in worker.tensors().items():
            value.copy_(own.get(name, value))


def hand_over(simulator: Simulator, averages: list[dict[str, Tensor]], round: int) -> None:
    before, after = simulator.schedule.partition(round), simulator.schedule.partition(round + 1)
    for name, block in simulator._block_of.items():
        copies = [averages[worker][name] for worker in before.holders(block)]
        if len(copies) == len(after.holders(block)) == len(averages):
            continue  # all workers continue with their own
        mean = torch.stack(copies).double().mean(0) if copies[0].is_floating_point() else torch.stack(copies).amax(0)
        for worker in after.holders(block):
            averages[worker][name] = mean.to(copies[0].dtype)


def options_of(name: str) -> dict[str, Any]:
    return {"strategy": make_strategy("local_sgd" if name == "local_sgd" else "resist", **CONFIGS[name]), "devices": 2}


def together(worker: int, name: str, folder: str) -> dict[str, Any]:
    options = options_of(name)
    module = Counting(seed=7 + worker)  # worker 0's weights replace the others'
    found = train(worker, options, ema(), folder, module=module)
    engine = options["strategy"].engine
    found["bytes"] = {kind: engine.collective.sent_bytes[kind] for kind in SYNC_KINDS}
    if name in RESUMED:
        # The batches of an unfinished epoch are fetched again.
        found["resumed"] = [resume(worker, name, start, f"{folder}/{file}") for start, file in MIDDLES]
    if name == "resist":
        without = train(worker, options_of(name), ema(), "", module=Counting(), validates=False)
        found["without validations"] = without["state"]
    return found


RESUMED = ("local_sgd", "resist")
MIDDLES = ((0, "4.ckpt"), (5, "step=5.ckpt"))


def resume(worker: int, name: str, start: int, path: str) -> dict[str, Tensor]:
    found = train(worker, options_of(name), ema(), "", module=Counting(seed=8), start=start, ckpt_path=path)
    state: dict[str, Tensor] = found["state"]
    return state


def train_all(worker: int, folder: str) -> dict[str, Any]:
    return {name: together(worker, name, f"{folder}/{name}") for name in CONFIGS} | {"stages": average_stages(worker)}


@pytest.fixture(scope="module")
def of_two_workers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_trainers(train_all, 2, str(tmp_path_factory.mktemp("together")))


@pytest.mark.parametrize("name", CONFIGS)
def test_workers_average_what_they_hold_and_see_the_mean(of_two_workers: Any, name: str) -> None:
    first, second = (found[name] for found in of_two_workers)

    config = options_of(name)["strategy"].config
    check_bytes([first, second], config)
    for key in ("state", "average"):
        assert_equal_states(first[key], second[key], exactly=True)
    assert_equal_states(first["average"], first["state"], exactly=True)
    assert first["losses"] == second["losses"]
    expected: Any = averages_by_formula(config, (4, 5, 10))
    for step, loss in ((5, first["losses"][0]), (10, first["losses"][1])):
        saved = dict(first["saved"][f"step={step}.ckpt"])
        assert (saved.pop("validations"), saved.pop("n_averaged")) == (step / 5, step)
        assert_equal_states(saved, clone_state(expected[step]), exactly=False)
        assert loss == pytest.approx(evaluate(expected[step], 2)["loss"], rel=1e-4)
    end = dict(first["state"])
    assert end.pop("validations") == EPOCHS
    assert_equal_states(end, clone_state(expected[10]), exactly=False)
    middle = dict(first["saved"]["4.ckpt"])
    del middle["validations"], middle["n_averaged"]
    assert_equal_states(middle, clone_state(expected[4]), exactly=False)


def check_bytes(found: list[dict[str, Any]], config: Config) -> None:
    """Check that bytes of syncs are the closed form, with a block's average beside the block."""
    module = Counting()
    layout = BlockLayout(module, config, 2)
    sizes = layout.sizes(OptimizerStates([module.configure_optimizers()]))
    sizes = replace(sizes, states=sizes.blocks)
    partitions = [layout.partition(round) for round in range(4)]
    for worker in range(2):
        rounds = [
            sync_bytes(plan_sync(before, after), sizes, 2)[worker] for before, after in itertools.pairwise(partitions)
        ]
        assert found[worker]["bytes"] == {kind: sum(row[kind] for row in rounds) for kind in SYNC_KINDS}
        assert (found[worker]["bytes"]["state"] > 0) == bool(layout.blocks)


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_training_ends_with_the_averages_of_the_unbroken_one(of_two_workers: Any, name: str) -> None:
    for found in (each[name] for each in of_two_workers):
        assert len(found["resumed"]) == len(MIDDLES)
        for state in found["resumed"]:
            assert_equal_states(state, found["state"], exactly=True)


def test_validations_change_no_average(of_two_workers: Any) -> None:
    for found in (each["resist"] for each in of_two_workers):
        without, validated = dict(found["without validations"]), dict(found["state"])
        assert (without.pop("validations"), validated.pop("validations")) == (0, EPOCHS)
        assert_equal_states(validated, without, exactly=True)


class ByFormula(L.Callback):
    """The average of this worker's parameters, by formula."""

    def __init__(self) -> None:
        self.average: dict[str, Tensor] = {}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        for name, value in module.named_parameters():
            if not value.is_meta:
                self.average[name] = DECAY * self.average.get(name, value) + (1 - DECAY) * value


def average_stages(worker: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    module, by_formula = Classifier("small"), ByFormula()
    trainer = make_trainer(make_stages(cuts=["section3.1"]), max_epochs=1, callbacks=[ema(), by_formula])
    trainer.fit(module, stream(0, EPOCH), held_out(worker))
    return by_formula.average, {name: value.detach() for name, value in module.named_parameters()}


def test_stages_are_averaged_where_they_are(of_two_workers: Any) -> None:
    outcomes = [found["stages"] for found in of_two_workers]

    expected = {name: value for average, _ in outcomes for name, value in average.items()}
    for _, parameters in outcomes:
        assert_equal_states(parameters, expected)
