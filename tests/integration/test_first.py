"""``evaluate_on="first"`` and ``full_model_on="first"``: worker 0 alone evaluates, and all decide as it does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from resist_lightning.errors import PartialModelError
from resist_lightning.methods.resist.bytes import observation_bytes
from resist_lightning.methods.resist.layout import BlockLayout
from resist_lightning.methods.resist.observed import observed
from resist_lightning.schedule.transfers import plan_sync
from tests.helpers.plain import CLASSES, Classifier, batch_of, stream
from tests.helpers.trainers import make_strategy, make_trainer, run_trainers
from tests.helpers.training import assert_equal_states, present_state

WORKERS = 2
EPOCH, EPOCHS = 8, 3
EXAMPLES = 23


def examples() -> DataLoader[Any]:
    """A number of examples that the workers cannot share evenly, with an incomplete last batch."""
    batches = [batch_of(9, step) for step in range(3)]
    images, labels = (torch.cat(parts)[:EXAMPLES] for parts in zip(*batches, strict=True))
    return DataLoader(TensorDataset(images, labels), batch_size=5)


class Talkative(Classifier):
    """Logs in every way, calls collectives itself, and writes a buffer when an evaluation ends.

    A frozen tensor is kept out of checkpoints, as Lightning's documentation shows.
    """

    def __init__(self) -> None:
        super().__init__("small")
        self.strict_loading = False
        self.register_buffer("frozen", torch.ones(3))
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro")
        self.register_buffer("best", torch.zeros(()))
        self.hooks: list[str] = []
        self.worlds: set[int] = set()

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        return {name: value for name, value in super().state_dict().items() if name != "frozen"}

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        self.log("val/acc", self.accuracy)
        loss = functional.cross_entropy(logits, batch[1])
        self.log("val/loss", loss, sync_dist=True, batch_size=len(batch[1]))
        count = torch.tensor(len(batch[1]))
        dist.all_reduce(count)
        self.log("val/seen", count.float(), reduce_fx="sum", sync_dist=True)
        self.worlds |= {len(self.all_gather(loss)), dist.get_world_size()}

    def on_validation_start(self) -> None:
        self.hooks.append("start")

    def on_validation_epoch_end(self) -> None:
        self.hooks.append("epoch end")
        self.best.fill_(self.best + 1)

    def on_validation_end(self) -> None:
        self.hooks.append("end")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        logits = self(batch[0])
        self.log("test/loss", functional.cross_entropy(logits, batch[1]), sync_dist=True, batch_size=len(batch[1]))


class OfTwoLoaders(Classifier):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)


class Watch(Callback):
    """Notes this worker's metrics at the end of each validation."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        if not trainer.sanity_checking:
            self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


class Weights(Callback):
    """Notes this worker's part after every batch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.seen.append({name: value for name, value in present_state(module).items() if name != "best"})


def train(worker: int, folder: Path, options: dict[str, Any], *, validate: bool) -> dict[str, Any]:
    module, watch, weights = Talkative(), Watch(), Weights()
    saver = ModelCheckpoint(folder, "best-{epoch}", "val/loss", save_top_k=1)
    stopper = EarlyStopping("val/loss", patience=0, mode="max")  # the loss falls, so it stops after the second
    trainer = make_trainer(
        make_strategy(local_steps=3, **options),
        max_epochs=EPOCHS if validate else 2,
        callbacks=[watch, weights, *([saver, stopper] if validate else [])],
        enable_checkpointing=validate,
        num_sanity_val_steps=1,
        use_distributed_sampler=True,
    )
    trainer.fit(module, stream(worker, EPOCH), examples() if validate else None)
    found: dict[str, Any] = {
        "metrics": watch.metrics,
        "weights": weights.seen,
        "hooks": module.hooks,
        "worlds": module.worlds,
        "best": saver.best_model_path,
        "epoch": trainer.current_epoch,
        "buffer": None if module.best.is_meta else float(module.best),
    }
    if validate:
        found["state"] = present_state(module)
        found["test"] = trainer.test(module, examples())
        trainer.save_checkpoint(folder / f"after-{options['full_model_on']}.ckpt")
        if options["full_model_on"] == "first":
            found["refused"] = [
                refusal(lambda: trainer.fit(module, stream(worker, EPOCH))),
                refusal(lambda: trainer.predict(module, examples())),
                refusal(module.state_dict),
            ]
    return found


def refusal(call: Callable[[], Any]) -> str:
    try:
        call()
    except (ValueError, PartialModelError) as error:
        return str(error)
    return ""


def train_both(worker: int, folder: str) -> dict[str, Any]:
    runs = {}
    for where in ("all", "first"):
        options = {"evaluate_on": "first", "full_model_on": where}
        runs[where] = train(worker, Path(folder, where), options, validate=True)
    runs["plain"] = train(worker, Path(folder), {}, validate=False)
    runs["ist"] = train_neurons(worker, Path(folder, "ist"))
    return {**runs, "aligned": [train_aligned(worker, validate=each) for each in (True, False)]}


def train_neurons(worker: int, folder: Path) -> dict[str, Any]:
    """Train IST, whose slices do not fit a full tensor."""
    module, watch = OfTwoLoaders("chain"), Watch()
    strategy = make_strategy("ist", min_share=0.5, evaluate_on="first", full_model_on="first")
    trainer = make_trainer(strategy, max_epochs=2, callbacks=[watch])
    trainer.fit(module, stream(worker, 4), [examples(), examples()])
    tested = trainer.test(module, examples())
    trainer.save_checkpoint(folder / "after.ckpt")
    return {"test": tested, "state": present_state(module), "metrics": watch.metrics}


def train_aligned(worker: int, *, validate: bool) -> dict[str, Any]:
    """Train with rounds that end with epochs; every worker evaluates."""
    module, weights = Classifier("small"), Weights()
    trainer = make_trainer(make_strategy(local_steps=3), max_epochs=2, callbacks=[weights])
    trainer.fit(module, stream(worker, 3), examples() if validate else None)
    engine = trainer.strategy.engine
    sent = {kind: by_worker[worker] for kind, by_worker in engine.sent_bytes_by_worker.items()}
    return {"weights": weights.seen, "state": present_state(module), "sent": sent}


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    folder = tmp_path_factory.mktemp("first")
    return run_trainers(train_both, WORKERS, str(folder)), folder


@pytest.mark.parametrize("where", ["all", "first"])
def test_worker_0_evaluates_all_of_the_data_and_the_others_none(workers: Any, where: str) -> None:
    first, *others = [found[where] for found in workers[0]]
    assert [each["val/seen"] for each in first["metrics"]] == [EXAMPLES] * 2
    assert first["worlds"] == {1}  # on every call
    assert first["hooks"] == ["start", "epoch end", "end"] * 3  # including the sanity check
    for other in others:
        assert other["hooks"] == ["start", "end"] * 3
        assert other["worlds"] == set()


def test_all_workers_have_its_metrics_and_decide_as_it_does(workers: Any) -> None:
    first, *others = [found["first"] for found in workers[0]]
    assert len(first["metrics"]) == 2
    assert {"val/acc", "val/loss", "val/seen"} <= first["metrics"][0].keys()
    assert first["metrics"][0] != first["metrics"][1]
    for other in others:
        assert other["metrics"] == first["metrics"]
        assert (other["best"], other["epoch"], other["buffer"]) == (first["best"], 2, first["buffer"])
        assert other["test"] == first["test"]
    assert first["buffer"] == 3  # worker 0's value, on all workers; the mean would be less


@pytest.mark.parametrize("where", ["all", "first"])
def test_the_training_is_the_same_bit_for_bit(workers: Any, where: str) -> None:
    for found in workers[0]:
        assert len(found["plain"]["weights"]) == 2 * EPOCH // WORKERS
        for with_validation, without in zip(found[where]["weights"], found["plain"]["weights"], strict=True):
            assert_equal_states(with_validation, without, exactly=True)


@pytest.mark.parametrize("where", ["all", "first"])
def test_the_metric_is_that_of_the_checkpoint_in_a_plain_module(workers: Any, where: str) -> None:
    found, folder = workers
    first = found[0][where]
    best = min(each["val/loss"] for each in first["metrics"])
    assert loss_of(first["best"]) == pytest.approx(best, rel=1e-5)
    assert loss_of(folder / f"{where}" / f"after-{where}.ckpt") == pytest.approx(
        first["test"][0]["test/loss"], rel=1e-5
    )


def loss_of(path: Any) -> float:
    """The loss of a plain module, loaded from a checkpoint, over all examples."""
    module = Talkative.load_from_checkpoint(path).eval()
    losses = []
    with torch.no_grad():
        for images, labels in examples():
            losses += functional.cross_entropy(module(images), labels, reduction="none").tolist()
    assert len(losses) == EXAMPLES
    return sum(losses) / EXAMPLES


def test_full_model_on_first_leaves_the_others_their_part(workers: Any) -> None:
    found, _ = workers
    whole = [each["all"]["state"] for each in found]
    for each in whole[1:]:
        assert_equal_states(each, whole[0], exactly=True)
    assert_equal_states(found[0]["first"]["state"], whole[0])  # up to the order of sums
    for each in found[1:]:
        missing = whole[0].keys() - each["first"]["state"].keys()
        assert missing
        assert all(name.startswith("net.section3.") for name in missing)
        fit, predict, saved = each["first"]["refused"]
        assert "full_model_on='first' has left it on worker 0" in fit
        assert fit.startswith("trainer.fit needs")
        assert predict.startswith("trainer.predict needs")
        assert "worker 0 alone has the full model (full_model_on='first')" in saved
    assert found[0]["first"]["refused"][0] == found[1]["first"]["refused"][0]
    assert found[0]["first"]["refused"][2] == ""


def test_neurons_are_assembled_on_worker_0_too(workers: Any) -> None:
    found, folder = workers
    first, *others = [each["ist"] for each in found]
    for other in others:
        assert other["test"] == first["test"]
        assert not other["state"].keys() & {"net.0.weight", "net.3.weight"}
    loaded = OfTwoLoaders.load_from_checkpoint(folder / "ist" / "after.ckpt", strict=True)
    assert_equal_states(present_state(loaded), first["state"], exactly=True)


def test_the_others_have_its_metrics_of_all_loaders_too(workers: Any) -> None:
    """Of several loaders they had none, so that early stopping and schedules by these metrics ended the run."""
    mine, theirs = (each["ist"]["metrics"] for each in workers[0])
    assert mine == theirs
    assert len(mine) == 2
    for metrics in mine:
        assert {f"val/{kind}/dataloader_idx_{index}" for kind in ("loss", "acc") for index in (0, 1)} == metrics.keys()


def test_a_sync_that_is_due_comes_before_a_validation_which_then_averages_nothing(workers: Any) -> None:
    """Shared layers are sent once, and the training is the same as without validations."""
    config = make_strategy(local_steps=3).config
    layout = BlockLayout(Classifier("small"), config, WORKERS)
    for worker, found in enumerate(workers[0]):
        validated, plain = found["aligned"]
        for seen, expected in zip(validated["weights"], plain["weights"], strict=True):
            assert_equal_states(seen, expected, exactly=True)
        assert_equal_states(validated["state"], plain["state"], exactly=True)
        # After each round, and at the end without further training: round 2 has not begun.
        assert validated["sent"]["evaluation"] == sum(
            observed_bytes(layout, round, unequal=False)[worker] for round in (1, 2, 2)
        )
        assert plain["sent"]["evaluation"] == observed_bytes(layout, 1, unequal=True)[worker]


def observed_bytes(layout: BlockLayout, round: int, *, unequal: bool) -> list[int]:
    plan = plan_sync(layout.partition(round), layout.partition(round + 1))
    return observation_bytes(plan, observed(layout), WORKERS, unequal=unequal, at_first=False)
