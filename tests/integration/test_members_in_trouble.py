"""Failures of members: overflow, NaN and signals of one; and workers that are hosts, without torchrun."""

from __future__ import annotations

import os
import signal
import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import SIGTERMException

from experiments.harness.links.namespaces import namespaces
from resist_lightning import NotFinite
from tests.helpers.namespaces import enter_host, needs_namespaces
from tests.helpers.plain import Classifier, stream
from tests.helpers.trainers import make_strategy, make_trainer, run_trainers

TWO = {"devices_per_worker": 2}


def overflows(rank: int) -> list[tuple[float, float]]:
    """The loss scale and a weight after each batch; one member overflows in two of them."""
    seen = []

    class Overflows(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            scale = 1e30 if rank == 1 and batch_idx in (1, 4) else 1.0
            return super().training_step(batch, batch_idx) * scale

        def on_train_batch_end(self, *_: Any) -> None:
            seen.append((scaler.get_scale(), next(self.parameters()).flatten()[0].item()))

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    trainer = make_trainer(make_strategy("local_sgd", **TWO), max_epochs=1, plugins=plugin)
    trainer.fit(Overflows("chain"), stream(rank, 6))
    return seen


def not_finite(rank: int, policy: str) -> str:
    """The error or warning for NaN from one member, in the second step of the second round."""

    class HasNaN(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            images, labels = batch
            return super().training_step(
                (images * (torch.nan if (rank, batch_idx) == (3, 4) else 1), labels), batch_idx
            )

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer = make_trainer(make_strategy("local_sgd", **TWO, non_finite=policy), max_epochs=1)
            trainer.fit(HasNaN("chain"), stream(rank, 6))
        except NotFinite as error:
            return str(error)
    return "".join(str(each.message) for each in caught if "NaN" in str(each.message))


def terminated(rank: int) -> int:
    """The number of steps of this process when one member gets a SIGTERM."""

    class Terminated(Classifier):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if (rank, batch_idx) == (3, 4):
                os.kill(os.getpid(), signal.SIGTERM)

    trainer = make_trainer(make_strategy("local_sgd", **TWO), max_epochs=1)
    with pytest.raises(SIGTERMException):
        trainer.fit(Terminated("chain"), stream(rank, 9))
    return int(trainer.global_step)


def in_turn(rank: int) -> dict[str, Any]:
    return {
        "overflow": overflows(rank),
        "drop": not_finite(rank, "drop"),
        "raise": not_finite(rank, "raise"),
        "terminated": terminated(rank),
    }


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return run_trainers(in_turn, 4)


def test_a_member_that_overflows_lets_its_worker_skip_the_step(found: list[dict[str, Any]]) -> None:
    first, second, third, fourth = (each["overflow"] for each in found)
    assert (first, third) == (second, fourth)
    scales, weights = zip(*first, strict=True)
    assert scales == (1024, 512, 512, 512, 256, 256)
    assert (weights[1], weights[4]) == (weights[0], weights[3])
    others, weights = zip(*third, strict=True)
    assert others == (1024, 1024, 1024, 512, 512, 512)  # workers agree on the smallest scale at the end of a round
    assert len(set(weights)) == 6


def test_not_finite_values_name_the_member_from_whom_they_come(found: list[dict[str, Any]]) -> None:
    said = "NaN or infinity after local step 3 of round 1: worker 1 (rank 3) in shared tensor net."
    for rank, each in enumerate(found):
        assert said in each["raise"]
        assert "(rank 2)" not in each["raise"]
        assert (said in each["drop"]) is (rank == 0)  # one process warns


def test_a_signal_to_one_member_stops_all_before_the_same_batch(found: list[dict[str, Any]]) -> None:
    assert [each["terminated"] for each in found] == [6] * 4


def on_two_hosts(rank: int, network: Any) -> str:
    """The numbers of workers and members with ranks 0 and 1 on one host, 2 and 3 on another one."""
    host, local_rank = divmod(rank, 2)
    enter_host(network, host)
    os.environ.update(NODE_RANK=str(host), LOCAL_RANK=str(local_rank), GLOO_SOCKET_IFNAME=network.interface)
    os.environ.update(MASTER_ADDR=network.address, MASTER_PORT=str(network.port))
    strategy = make_strategy("local_sgd", devices_per_worker="node")
    trainer = make_trainer(strategy, max_epochs=1, devices=2, num_nodes=2)
    trainer.fit(Classifier("chain"), stream(rank, 3))
    engine = trainer.strategy.engine
    return f"{engine.collective.workers} of {engine.collective.members}"


@needs_namespaces
def test_a_worker_is_a_host() -> None:
    """Under torchrun, and where a worker would spread over hosts: test_two_hosts."""
    with namespaces(2) as network:
        assert run_trainers(on_two_hosts, 4, network) == ["2 of 2"] * 4
