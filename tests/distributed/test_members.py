"""Workers of several members: each byte crosses the link between two workers once."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from resist_lightning import Config, Engine, Simulator
from resist_lightning.comm.byte_formulas import KINDS, all_reduce_bytes
from resist_lightning.comm.mean import start_mean
from resist_lightning.comm.members import default_collective, split_into_workers
from resist_lightning.comm.members import members as members_of_this
from resist_lightning.comm.replicas import Replicas
from tests.helpers.processes import run_workers
from tests.helpers.training import Run, SmallRun, assert_equal_states, batch_of, clone_state, make_model, make_optimizer


def verbs(rank: int, members: int, size: int) -> dict[str, Any]:
    split_into_workers(members)
    collective = default_collective()
    worker, workers = collective.worker, collective.workers
    split = members_of_this()
    assert split is not None
    for group in (split.inside, split.between):  # not torch's own 30 minutes
        assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=60)
    assert (worker, collective.member, collective.rank) == (rank // members, rank % members, rank)

    mean = torch.arange(size, dtype=torch.float32) + worker
    start_mean(collective, mean, "shared")()
    flags = torch.tensor([worker == 1, False])
    start_mean(collective, flags, "shared")()
    first = torch.full((size,), rank + 5)
    collective.broadcast_(first, "start")
    peers = [peer for peer in range(workers) if peer != worker]
    sends = {peer: [torch.full((size,), 10 * worker + peer), torch.full((1,), worker)] for peer in peers}
    receives = {peer: [torch.zeros(size, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)] for peer in peers}
    collective.exchange(sends, receives, {"hand_over": len(peers) * 8 * size, "state": len(peers) * 8})
    inside = torch.tensor([float(collective.member), 1.0])
    collective.mean_inside(inside, "statistics")
    own = torch.tensor([rank])
    collective.broadcast_inside(own, "buffers")
    gathered = collective.gather_inside(bytes([rank]) * (collective.member + 1))
    return {
        "numbers": collective.gather_numbers([rank]),
        "mean": mean,
        "flags": flags.tolist(),
        "first": set(first.tolist()),
        "received": {peer: [flat.unique().tolist() for flat in flats] for peer, flats in receives.items()},
        "inside": inside.tolist(),
        "own": own.item(),
        "gathered": gathered,
        "by_worker": collective.by_worker(list(range(collective.processes))),
        "sent": collective.sent_bytes,
        "inside_bytes": collective.inside_bytes,
    }


@pytest.mark.parametrize(("workers", "members", "size"), [(2, 3, 2), (3, 2, 1001), (1, 2, 5)])
def test_the_verbs_give_what_single_processes_get(workers: int, members: int, size: int) -> None:
    results = run_workers(verbs, workers * members, members, size)
    sent: list[Counter[str]] = [Counter() for _ in range(workers)]
    for rank, result in enumerate(results):
        worker, member = divmod(rank, members)
        peers = [peer for peer in range(workers) if peer != worker]
        assert result["numbers"] == [[float(each)] for each in range(workers * members)]
        torch.testing.assert_close(result["mean"], torch.arange(size) + (workers - 1) / 2)
        assert result["flags"] == [workers > 1, False]
        assert result["first"] == {5}
        assert result["received"] == {peer: [[10 * peer + worker], [peer]] for peer in peers}
        assert result["inside"] == [(members - 1) / 2, 1.0]
        assert result["own"] == worker * members
        first = worker * members
        assert result["gathered"] == ([bytes([first + m]) * (m + 1) for m in range(members)] if member == 0 else [])
        assert result["by_worker"][worker] == list(range(first, first + members))
        sent[worker].update(result["sent"])
        # Each part that a member has received over the slow link goes to the other members over the fast one.
        part = (size * (member + 1) // members - size * member // members) * 8
        assert result["inside_bytes"]["start"] >= (members - 1) * (part if worker else 0)
    for worker, total in enumerate(sent):
        others = workers - 1
        assert total["shared"] == all_reduce_bytes(4 * size, workers) + all_reduce_bytes(2, workers)
        assert total["start"] == (8 * size * others if worker == 0 else 0)
        assert (total["hand_over"], total["state"]) == (others * 8 * size, others * 8)


RUNS = {
    "two of two": (2, 2, SmallRun(Config(local_steps=3, min_blocks=1), steps=5, observe_at=(3,))),
    "two of three, travel, outer": (
        2,
        3,
        SmallRun(Config(local_steps=2, min_blocks=3, momentum="travel", outer="nesterov"), steps=5),
    ),
    "local SGD, int8": (
        2,
        2,
        SmallRun(Config(local_steps=2, blocks=[], batch_norm="running", wire="int8"), steps=5),
    ),
    "one worker of two": (1, 2, SmallRun(Config(local_steps=2, min_blocks=1), steps=3)),
}


def trained(rank: int, members: int, run: Run) -> tuple[Any, ...]:
    """Train as a member; workers of one member are the reference for bytes."""
    split_into_workers(members)
    model = make_model(run)
    optimizer = make_optimizer(run, model)
    if rank:
        with torch.no_grad():
            next(model.parameters()).add_(rank)  # rank 0's weights must replace these
    engine = Engine(model, [optimizer], run.config)
    engine.start()
    for step in range(run.steps):
        model.train()
        optimizer.zero_grad()
        x, y = batch_of(rank, step)
        nn.functional.cross_entropy(engine.replicas.call(model, x), y).backward()
        optimizer.step()
        engine.after_step()
        if step in run.observe_at:
            with engine.full_model():
                model.eval()(batch_of(0, 0)[0])
    engine.finish()
    return clone_state(model), engine.sent_bytes_by_worker, dict(engine.collective.inside_bytes)


def simulated(run: Run, workers: int, members: int) -> dict[str, torch.Tensor]:
    """The simulator, whose workers add up the gradients of their members' batches and keep the first one's buffers."""
    calls = members * run.config.recalibration_batches
    config = replace(run.config, recalibration_batches=calls)
    simulator = Simulator(make_model(run), lambda model: make_optimizer(run, model), config, workers)
    for step in range(run.steps):
        for number, worker in enumerate(simulator.workers):
            model = worker.module.train()
            worker.optimizers[0].zero_grad()
            for member in range(members):
                before = {name: buffer.clone() for name, buffer in model.named_buffers()}
                x, y = batch_of(number * members + member, step)
                (nn.functional.cross_entropy(model(x), y) / members).backward()
                if member:
                    model.load_state_dict(before, strict=False)
            worker.optimizers[0].step()
        simulator.after_step()
    return clone_state(simulator.full_model())


@pytest.mark.parametrize("name", RUNS)
def test_members_train_what_the_simulator_trains_with_batches_of_their_shards(name: str) -> None:
    workers, members, run = RUNS[name]
    results = run_workers(trained, workers * members, members, run)
    expected = simulated(run, workers, members)
    for state, _, _ in results:
        assert_equal_states(state, results[0][0], exactly=True)
        assert_equal_states(state, expected)
    if workers == 1:
        return
    # A worker sends others as much as a single process in its place.
    alone = run_workers(trained, workers, 1, run)
    sent, reference = results[0][1], alone[0][1]
    for kind in KINDS:
        if kind != "control":
            assert sent[kind] == reference[kind], kind
    # Gradients of the held parts, in each step of each member.
    parameters = sum(p.numel() for p in make_model(run).parameters())
    assert 0 < results[0][2]["gradients"] <= run.steps * all_reduce_bytes(4 * parameters, members)


def steps_by_hand(rank: int) -> dict[str, Any]:
    """Two steps, each with a backward pass without a mean, then one of other parameters with a mean."""
    split_into_workers(2)
    model = nn.ModuleDict({name: nn.Linear(2, 1, bias=False) for name in ("first", "second")})
    model.register_buffer("seen", torch.tensor(0.0))
    model.register_buffer("small", torch.tensor(rank, dtype=torch.int16))  # of a type that gloo does not know
    collective: Any = default_collective()
    replicas = Replicas(model, collective, partial=True)
    replicas.find_unused_parameters = True
    x = torch.full((1, 2), rank + 1.0)
    noted: dict[str, Any] = {"seen": [], "compiles for": set()}

    def step() -> None:
        noted["seen"].append(model.seen.item())
        noted["compiles for"].add(DistributedDataParallel._get_active_ddp_module())
        model.seen.fill_(10.0 * rank + 1)
        # As toggle_optimizer does it.
        model["second"].requires_grad_(False)
        with replicas.local_gradients():
            model["first"](x).sum().backward()
        model["second"].requires_grad_(True)
        model["first"].requires_grad_(False)
        loss = model["second"](x).sum()
        replicas.prepare_backward(loss)
        loss.backward()
        model["first"].requires_grad_(True)

    for _ in range(2):
        replicas.call_with_backward(step)
    replicas.end_steps()
    noted["small"] = model.small.item()
    return {**noted, "gradient": model["second"].weight.grad.tolist()}


def test_steps_by_hand_average_all_they_should_share_buffers_and_hide_ddp_from_compiled_blocks() -> None:
    """Up to 0.3, a reducer was made in the middle of the step, without the second layer, which was not averaged."""
    for result in run_workers(steps_by_hand, 2):
        assert result == {"seen": [0, 1], "compiles for": {None}, "gradient": [[3.0, 3.0]], "small": 0}


def synchronised(rank: int) -> None:
    split_into_workers(2)
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.SyncBatchNorm(2), nn.Flatten(), nn.Linear(2, 2))
    engine = Engine(net, [torch.optim.SGD(net.parameters(), 0.1)], Config(local_steps=2, blocks=[]))
    collective: Any = engine.collective
    assert net[1].process_group is collective.inside
    engine.abandon()
    copy.deepcopy(net)  # fails if it contains a group


def test_synchronised_batch_norm_stays_inside_a_worker_of_several_processes() -> None:
    """Without a forward, which needs a GPU. Workers of one process refuse it: see `test_checks.py`."""
    run_workers(synchronised, 4)


def splits(rank: int) -> str:
    try:
        split_into_workers(1 if rank == 2 else 2)
    except ValueError as error:
        return str(error)
    return ""


def test_processes_that_were_told_different_numbers_say_so_instead_of_waiting() -> None:
    said = run_workers(splits, 4)
    assert len(set(said)) == 1
    assert "started with different devices_per_worker: 2 on " in said[0]
    assert ", 1 on " in said[0]
