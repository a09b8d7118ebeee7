"""RoundMonitor's summary and logs against numbers counted by hand."""

from __future__ import annotations

import csv
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from resist_lightning.callbacks import SUMMARY_FILE, RoundMonitor
from resist_lightning.schedule.partition import draw_partition
from tests.helpers.plain import Classifier, held_out, stream
from tests.helpers.trainers import fit, make_strategy, make_trainer, run_trainers

STEPS = 8  # two rounds of three steps, and two steps
SYNCS = 2
BLOCKS = [f"net.section3.{number}" for number in range(1, 5)]


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def held_bytes(module: nn.Module) -> int:
    """Parameters and buffers: four bytes a number, but eight for batch norm's counters."""
    norms = [child for child in module.modules() if isinstance(child, nn.BatchNorm2d)]
    return 4 * parameters(module) + sum(2 * 4 * norm.num_features + 8 for norm in norms)


def statistics_bytes(module: nn.Module) -> int:
    return sum(8 * norm.num_features for norm in module.modules() if isinstance(norm, nn.BatchNorm2d))


FULL = Classifier("small")
BLOCK_BYTES = held_bytes(FULL.net.section3[1])
SHARED_BYTES = held_bytes(FULL) - 4 * BLOCK_BYTES
GRADIENT_BYTES = 4 * parameters(FULL)


def handed_over(before: list[list[int]], after: list[list[int]], worker: int) -> int:
    """Bytes of the blocks that ``worker`` has and hands to the other one."""
    other = 1 - worker
    return BLOCK_BYTES * len((set(after[other]) - set(before[other])) & set(before[worker]))


class AtBorders(Callback):
    """Keeps the shared parameters at the beginning of each round, and before the sync that ends it."""

    def __init__(self) -> None:
        self.begun: list[Tensor] = []
        self.ended: list[Tensor] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.strategy.engine.clock.due:
            self.ended.append(shared_parameters(trainer))

    def on_before_backward(self, trainer: Any, *_: Any) -> None:
        if trainer.strategy.engine.clock.step == 0:
            self.begun.append(shared_parameters(trainer))


def shared_parameters(trainer: Any) -> Tensor:
    """The entries that the monitor samples: one in 64 of large tensors."""
    shared = trainer.strategy.engine.layout.shared.values()
    flat = [tensor.detach().flatten() for tensor in shared if isinstance(tensor, nn.Parameter)]
    return torch.cat([tensor[:: 64 if len(tensor) >= 4096 else 1] for tensor in flat])


def monitored_in_all_ways(worker: int, folder: str) -> dict[str, Any]:
    return {
        "resist": monitored(worker, f"{folder}/resist", "resist"),
        "local_sgd": monitored(worker, f"{folder}/local_sgd", "local_sgd"),
        "again": monitored_again(worker, f"{folder}/again"),
        "not drawn": summary_without_drawing(worker, f"{folder}/ist"),
    }


def monitored(worker: int, folder: str, face: str) -> AtBorders:
    monitor, borders = RoundMonitor(every_n_rounds=2, picture_every_n_rounds=1), AtBorders()
    loggers = [CSVLogger(folder, name="", version=""), TensorBoardLogger(folder, name="", version="board")]
    trainer = fit(
        worker, Classifier("small"), STEPS, make_strategy(face), callbacks=[monitor, borders], default_root_dir=folder,
        logger=loggers, log_every_n_steps=1,
    )  # fmt: skip
    assert trainer.progress_bar_metrics["round"] == 2
    assert "round" not in trainer.logged_metrics
    return borders


def logged(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row.get("sync/round")]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    """The results of each worker, and the folder of all reports."""
    folder = tmp_path_factory.mktemp("reports")
    return run_trainers(monitored_in_all_ways, 2, str(folder)), folder


def test_the_summary_of_two_workers_has_the_numbers_of_the_closed_form(reports: Any) -> None:
    borders, folder = [found["resist"] for found in reports[0]], reports[1] / "resist"

    summary = json.loads((folder / SUMMARY_FILE).read_text())
    partitions = [[list(held) for held in draw_partition(4, 2, 1, 0, number).held] for number in range(3)]
    moved = [sum(handed_over(partitions[i], partitions[i + 1], w) for i in range(SYNCS)) for w in range(2)]
    assert sum(moved) > 0
    expected = {
        "strategy": "resist",
        "workers": 2,
        "rounds": 3,
        "local_steps": STEPS,
        "local_steps_per_round": 3,
        "blocks": BLOCKS,
        "full_parameters": parameters(FULL),
        "shared_parameters": parameters(FULL) - 4 * parameters(FULL.net.section3[1]),
        "held_parameters": [parameters(FULL) - 2 * parameters(FULL.net.section3[1])] * 2,
        "held_parameters_max": parameters(FULL) - 2 * parameters(FULL.net.section3[1]),
        "scale": 0.5,
        "partitions": partitions,
        # For two workers an all-reduce sends as much as it reduces.
        "ddp_bytes": STEPS * GRADIENT_BYTES,
        "local_sgd_bytes": SYNCS * held_bytes(FULL),
    }
    assert {key: summary[key] for key in expected} == expected
    sent = summary["sent_bytes"]
    assert sent["shared"] == [SYNCS * SHARED_BYTES] * 2
    assert sent["hand_over"] == moved
    assert sent["merge"] == sent["state"] == sent["checkpoint"] == [0, 0]
    # At the end: shared tensors, each block to the worker that lacks it, and batch norm's statistics.
    assert sent["evaluation"] == [SHARED_BYTES + 2 * BLOCK_BYTES + statistics_bytes(FULL)] * 2
    # Worker 1 gets its part of the first partition.
    assert sent["start"] == [held_bytes(FULL) - 2 * BLOCK_BYTES, 0]
    assert all(0 < control < 2000 for control in sent["control"])
    first = SHARED_BYTES + handed_over(partitions[0], partitions[1], 0)
    assert summary["sent_by_round"] == [[3, first], [6, 2 * SHARED_BYTES + moved[0]]]
    seconds = summary["seconds"]
    assert 0 < seconds["sync"] < seconds["training"]
    assert seconds["observe"] > 0

    (row,) = logged(folder)  # one of two rounds
    assert float(row["sync/round"]) == 2
    assert 0 < float(row["sync/share_of_time"]) < 1
    assert float(row["sync/sent_MB_per_round"]) == pytest.approx((2 * SHARED_BYTES + moved[0]) / 2 / 1e6)
    assert float(row["sync/shared_MB_per_round"]) == pytest.approx(SHARED_BYTES / 1e6)
    assert float(row["sync/hand_over_MB_per_round"]) == pytest.approx(moved[0] / 2 / 1e6)
    assert int(row["step"]) == 6  # Lightning counts the batches before this one

    assert row["sync/slowest_worker"] in ("0.0", "1.0")
    assert 1 <= float(row["sync/slowest_step"]) <= 2

    own, other = (border.ended[1] - border.begun[1] for border in borders)
    together = (own + other) / 2
    assert float(row["sync/alignment"]) == pytest.approx(float(cosine_similarity(own, together, 0)), abs=1e-4)
    change = together.norm() / (borders[0].begun[1] + together).norm()
    assert float(row["sync/change"]) == pytest.approx(float(change), rel=1e-3)
    assert 0 < float(row["sync/alignment"]) < 0.9999

    board = EventAccumulator(str(folder / "board"), size_guidance={"images": 0}).Reload()
    assert [picture.step for picture in board.Images("sync/partition")] == [3, 6]


def chooses(worker: int, folder: str) -> list[str]:
    told: list[str] = []
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda r: told.append(r.getMessage()) is None)
    fit(
        worker, Classifier("chain"), 13, make_strategy("local_sgd", overlap="auto"), callbacks=[RoundMonitor()],
        default_root_dir=folder, logger=CSVLogger(folder, name="", version=""), log_every_n_steps=1,
    )  # fmt: skip
    return [text for text in told if "is chosen" in text]


def test_an_overlap_that_was_chosen_is_told_once_logged_and_in_the_summary(tmp_path: Path) -> None:
    (told, untold) = run_trainers(chooses, 2, str(tmp_path))

    found = json.loads((tmp_path / SUMMARY_FILE).read_text())["overlap"]
    chosen = found["local_steps"]
    assert (found["from_round"], chosen) in ((3, 0), (3, 1), (3, 2))
    assert found["fastest_step_seconds"] > 0 < found["slowest_sync_seconds"]
    assert [f"LocalSGDStrategy: overlap={chosen} is chosen" in text for text in told] == [True]
    assert untold == []
    assert [float(row["sync/overlap"]) for row in logged(tmp_path)] == [0, 0, chosen, chosen]


def test_the_summary_of_local_sgd_has_the_numbers_of_the_closed_form(reports: Any) -> None:
    summary = json.loads((reports[1] / "local_sgd" / SUMMARY_FILE).read_text())
    assert (summary["strategy"], summary["rounds"], summary["blocks"]) == ("local_sgd", 3, [])
    assert summary["sent_bytes"]["shared"] == [SYNCS * held_bytes(FULL)] * 2
    assert summary["sent_bytes"]["hand_over"] == [0, 0]
    assert summary["local_sgd_bytes"] == summary["sent_bytes"]["shared"][0]
    assert summary["held_parameters"] == [parameters(FULL)] * 2
    assert summary["scale"] == 1


# Runs without anything to observe.


def monitored_under_ddp(worker: int, folder: str) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(worker, Classifier("chain"), 2, "ddp", callbacks=[RoundMonitor()], default_root_dir=folder)
    return [str(warning.message) for warning in caught if "RoundMonitor" in str(warning.message)]


def test_under_another_strategy_it_says_that_it_has_nothing_to_report(tmp_path: Path) -> None:
    mine, theirs = run_trainers(monitored_under_ddp, 2, str(tmp_path))

    assert mine == ["RoundMonitor has nothing to report under DDPStrategy."]
    assert theirs == []
    assert list(tmp_path.iterdir()) == []


# Resumed runs.


def monitored_again(worker: int, folder: str) -> dict[str, Any]:
    trainer = make_trainer(make_strategy(), max_epochs=1, default_root_dir=folder)
    trainer.fit(Classifier("small"), stream(worker, 9))
    trainer.save_checkpoint(f"{folder}/end.ckpt")
    monitor = RoundMonitor()
    again = make_trainer(make_strategy(), max_epochs=2, default_root_dir=folder, callbacks=[monitor])
    data = stream(worker, 9, start=9)
    again.fit(Classifier("small"), data, ckpt_path=f"{folder}/end.ckpt")
    return monitor.summary(again.strategy, again.strategy.engine)


def test_after_a_resume_there_is_one_row_for_each_sync_and_all_bytes_are_of_the_same_steps(reports: Any) -> None:
    summary = reports[0][0]["again"]

    assert [step for step, _ in summary["sent_by_round"]] == [12, 15]
    assert [sent > 0 for _, sent in summary["sent_by_round"]] == [True, True]
    assert summary["sent_bytes"]["shared"] == [SYNCS * SHARED_BYTES] * 2
    assert summary["local_sgd_bytes"] == SYNCS * held_bytes(FULL)
    assert summary["ddp_bytes"] == 9 * GRADIENT_BYTES


# Loggers.


class Listening(Logger):
    """A logger that notes the logged steps in order."""

    name, version = "listening", 0

    def __init__(self) -> None:
        self.steps: list[int] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.steps.append(step)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Do nothing; there are none."""


class TwoOptimizers(Classifier):
    """Steps twice a batch, so that global_step is twice as fast as the steps of loggers."""

    def __init__(self) -> None:
        super().__init__("small")
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        self.log("train/loss", loss)
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.step()

    def configure_optimizers(self) -> Any:
        first, *rest = self.parameters()
        return [torch.optim.SGD([first], 0.01), torch.optim.SGD(rest, 0.01)]


def logs_in_order(worker: int, folder: str) -> list[list[int]]:
    listening = [Listening(), Listening()]
    path = None
    for epochs in (1, 2):  # the second one is resumed
        trainer = make_trainer(
            make_strategy(), max_epochs=epochs, logger=listening, callbacks=[RoundMonitor()], log_every_n_steps=1,
            val_check_interval=4, default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(TwoOptimizers(), stream(worker, STEPS), held_out(worker), ckpt_path=path)
        path = f"{folder}/{epochs}.ckpt"
        trainer.save_checkpoint(path)
    return [logger.steps for logger in listening]


def test_the_steps_of_all_that_is_logged_never_go_back(tmp_path: Path) -> None:
    for steps in run_trainers(logs_in_order, 1, str(tmp_path))[0]:
        assert steps == sorted(steps)
        assert len(steps) > 2 * STEPS
        assert steps[-1] == 2 * STEPS - 1


def summary_without_drawing(worker: int, folder: str) -> list[Any]:
    monitor = RoundMonitor()
    module = Classifier("chain")
    trainer = fit(worker, module, STEPS, make_strategy("ist"), callbacks=[monitor], default_root_dir=folder)
    engine = trainer.strategy.engine
    expected = [engine.layout.held(round) for round in range(3)]
    if worker:
        return []  # worker 0 writes the summary
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.layout, "held", None)
        return [monitor.summary(trainer.strategy, engine)["partitions"], expected]


def test_no_round_is_drawn_again_at_the_end(reports: Any) -> None:
    found, expected = reports[0][0]["not drawn"]
    assert found == expected


def test_a_summary_that_cannot_be_written_does_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    run_trainers(monitored_in_a_file, 1, f"{tmp_path}/file/root")


def monitored_in_a_file(worker: int, folder: str) -> None:
    with pytest.warns(UserWarning, match=r"resist_summary\.json could not be written"):
        fit(worker, Classifier("small"), 4, make_strategy(), callbacks=[RoundMonitor()], default_root_dir=folder)
