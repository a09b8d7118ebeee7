"""Between two syncs no collective is called at all (contract 4), with a Trainer's defaults."""

from __future__ import annotations

import inspect
from collections import Counter
from typing import Any

import lightning as L
import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d

from tests.helpers.plain import Classifier, held_out, stream
from tests.helpers.trainers import make_strategy, run_trainers

WORKERS = 2
EPOCH, EPOCHS, LOCAL_STEPS = 5, 2, 3

# Functions with "group" in their signature that send nothing.
SILENT = ("get_", "is_", "new_", "init_", "destroy_", "split_", "supports_", "shrink_", "_", "P2POp", "default_")


def talking() -> list[str]:
    """Names of the functions of torch.distributed that send or receive."""
    return [
        name
        for name in distributed_c10d.__all__
        if inspect.isfunction(function := getattr(distributed_c10d, name))
        and not name.startswith(SILENT)
        and ({"group", "p2p_op_list"} & inspect.signature(inspect.unwrap(function)).parameters.keys())
    ]


def test_the_list_of_functions_that_talk_has_those_that_we_know() -> None:
    known = {"all_reduce", "all_gather", "all_gather_object", "broadcast", "broadcast_object_list", "barrier"}
    known |= {"isend", "irecv", "send", "recv", "batch_isend_irecv", "reduce", "gather", "scatter", "all_to_all_single"}
    assert known <= set(talking())


def listen() -> Counter[str]:
    """From now on, count the calls of all functions that send or receive, by any caller."""
    calls: Counter[str] = Counter()

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    for name in talking():
        call = counted(name, getattr(distributed_c10d, name))
        for module in (dist, distributed_c10d):
            setattr(module, name, call)
    return calls


class Listening(Classifier):
    """Notes the number of messages when its hooks are called: by calls, and by the group's own count."""

    def __init__(self, calls: Counter[str], kind: str) -> None:
        super().__init__(kind)
        self.counts = calls
        self.notes: list[tuple[str, int, int]] = []

    def note(self, what: str) -> None:
        sequence = distributed_c10d._get_default_group()._get_sequence_number_for_group()
        self.notes.append((what, sum(self.counts.values()), sequence))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.note("before the strategy's sync")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.note("after the strategy's sync")
        loss = super().training_step(batch, batch_idx)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/loss_of_epoch", loss, on_step=True, on_epoch=True)
        return loss

    def on_train_end(self) -> None:
        self.note("before the strategy's sync")


NETWORKS = {"resist": "preact", "local_sgd": "chain", "ist": "chain"}


def fit_with_defaults(worker: int, folder: str) -> dict[str, list[tuple[str, int, int]]]:
    """For each method, the notes of its module."""
    calls, notes = listen(), {}
    for face, kind in NETWORKS.items():
        module = Listening(calls, kind)
        trainer = L.Trainer(
            strategy=make_strategy(face),
            accelerator="cpu",
            devices=WORKERS,
            max_epochs=EPOCHS,
            default_root_dir=folder,
            log_every_n_steps=1,
            use_distributed_sampler=False,
        )
        trainer.fit(module, stream(worker, EPOCH), held_out(worker))
        assert trainer.checkpoint_callback is not None
        assert trainer.progress_bar_callback is not None
        assert trainer.loggers
        notes[face] = module.notes
    return notes


@pytest.fixture(scope="module")
def noted(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[tuple[str, int, int]]]]:
    return run_trainers(fit_with_defaults, WORKERS, str(tmp_path_factory.mktemp("silence")))


@pytest.mark.parametrize("face", NETWORKS)
def test_between_two_syncs_nothing_is_said(face: str, noted: list[dict[str, list[tuple[str, int, int]]]]) -> None:
    for of_worker in noted:
        notes, steps = of_worker[face], EPOCH * EPOCHS
        assert [what for what, *_ in notes] == [
            "before the strategy's sync",
            "after the strategy's sync",
        ] * steps + ["before the strategy's sync"]
        said = [(notes[i + 1][1] - notes[i][1], notes[i + 1][2] - notes[i][2]) for i in range(2 * steps)]
        at_batch_start, in_and_after_batch = said[0::2], said[1::2]
        for step in range(steps):
            calls, sequence = at_batch_start[step]
            due = step > 0 and step % LOCAL_STEPS == 0
            assert (calls > 0, sequence > 0) == (due, due), f"at the start of batch {step}"
            calls, sequence = in_and_after_batch[step]
            observed = (step + 1) % EPOCH == 0  # validation and a checkpoint
            assert (calls > 0, sequence > 0) == (observed, observed), f"in and after batch {step}"
