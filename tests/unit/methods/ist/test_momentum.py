"""Optimizer state when neurons are dealt anew; engines of one process, whose workers are threads."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from torch import nn

from resist_lightning import Engine, NeuronConfig, NeuronSimulator
from resist_lightning.methods.ist.layout import NeuronLayout
from tests.helpers.ist import ONE_AT_A_TIME, Run, batch_of, make_net, plain_training, slice_of, start_engine
from tests.helpers.threads import run_threads
from tests.helpers.training import clone_state, train_step

MOMENTA = ("reset", "keep", "travel")


def momentum_of(collective, run):
    """Set each entry's momentum to a number of its own, sync without training, and note the momentum."""
    engine, optimizer = start_engine(run, collective)
    shape = engine.layout.shapes["3.weight"]
    numbers = torch.arange(1.0, shape.numel() + 1).reshape(shape)
    parameter = dict(engine.module.named_parameters())["3.weight"]
    notes = []
    for round in range(run.steps):
        if round == 0:
            own = slice_of(engine.layout, numbers, "3.weight", engine.partition, collective.worker)
            optimizer.state[parameter]["momentum_buffer"] = own.clone()
        engine.after_step()
        state = optimizer.state.get(parameter, {}).get("momentum_buffer")
        notes.append((engine.partition, None if state is None else state.clone()))
    engine.abandon()
    return engine, numbers, notes


def entries_of(engine, held, worker):
    """Numbers of the entries that a worker has, in the form of its slice."""
    shape = engine.layout.shapes["3.weight"]
    return slice_of(engine.layout, torch.arange(shape.numel()).reshape(shape), "3.weight", held, worker)


def test_momentum_goes_with_its_entries_and_waits_where_nobody_trains_them():
    run = Run(NeuronConfig(local_steps=1, momentum="travel", batch_norm="running"), 20)
    noted, _ = run_threads(momentum_of, 3, run)
    engine, numbers, _ = noted[0]
    first = engine.layout.partition(0)
    began = torch.cat([entries_of(engine, first, worker).flatten() for worker in range(3)]).unique()
    assert 0 < len(began) < numbers.numel()
    met = set()
    for worker, (_, _, notes) in enumerate(noted):
        for held, state in notes:
            mine = entries_of(engine, held, worker)
            expected = torch.where(torch.isin(mine, began), numbers.view(-1)[mine], 0.0)
            assert torch.equal(state, expected)
            met |= set(mine.flatten().tolist())
    assert len(met) == numbers.numel(), "too few rounds for every entry to be held once"


def test_momentum_is_kept_for_the_entries_that_stay_in_every_round_and_for_no_others():
    run = Run(NeuronConfig(local_steps=1, momentum="keep", batch_norm="running"), 4)
    noted, _ = run_threads(momentum_of, 2, run)
    engine, numbers, _ = noted[0]
    some = 0
    for worker, (_, _, notes) in enumerate(noted):
        stayed = entries_of(engine, engine.layout.partition(0), worker).flatten()
        for held, state in notes:
            mine = entries_of(engine, held, worker)
            stays = torch.isin(mine, stayed)
            assert torch.equal(state, torch.where(stays, numbers.view(-1)[mine], 0.0))
            some += int(stays.sum())
            stayed = mine[stays]
    assert some > 0


def test_momentum_that_restarts_is_forgotten():
    run = Run(NeuronConfig(local_steps=1, batch_norm="running"), 2)
    for _, _, notes in run_threads(momentum_of, 2, run)[0]:
        assert [state for _, state in notes] == [None, None]


def start_with_state(collective, run):
    """An optimizer that has stepped before the engine starts, as after loading a checkpoint of plain training."""
    with ONE_AT_A_TIME:
        net, optimizer = plain_training(run)
        engine = Engine(net, [optimizer], run.config, collective=collective)
    parameter = dict(net.named_parameters())["3.weight"]
    before, steps = optimizer.state[parameter]["exp_avg"].clone(), int(optimizer.state[parameter]["step"])
    engine.start()
    first, mine = engine.partition, entries_of(engine, engine.partition, collective.worker)
    assert torch.equal(optimizer.state[parameter]["exp_avg"], before.view(-1)[mine])
    assert int(optimizer.state[parameter]["step"]) == steps
    train_step(net, optimizer, batch_of(run, collective.worker, 0))
    engine.after_step()
    state = optimizer.state.get(parameter, {}).get("exp_avg")
    engine.abandon()
    return engine, before, first, state


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("workers", [1, 3])
def test_state_from_before_the_start_is_cut_like_its_parameter(workers, momentum):
    run = Run(NeuronConfig(local_steps=1, momentum=momentum, batch_norm="running"), 3, optimizer="adamw")
    for worker, (engine, before, first, state) in enumerate(run_threads(start_with_state, workers, run)[0]):
        assert (state is None) == (momentum == "reset")
        if momentum == "travel":
            mine = entries_of(engine, engine.partition, worker)
            trained = torch.cat([entries_of(engine, first, other).flatten() for other in range(workers)])
            waited = ~torch.isin(mine, trained)
            assert waited.any() == (workers > 1)
            assert torch.equal(state[waited], before.view(-1)[mine][waited])


def longest_step(momentum):
    """The longest step at the end of a long training with a constant gradient, by the learning rate; Adam's is 1."""
    config = NeuronConfig(local_steps=10, momentum=momentum)
    make = partial(torch.optim.Adam, lr=1e-3)
    net = nn.Sequential(nn.Linear(4, 16, bias=False), nn.ReLU(), nn.Linear(16, 2))
    simulator = NeuronSimulator(net, lambda copy: make(copy.parameters()), config, 2)
    for _ in range(300):
        for worker in simulator.workers:
            weight = worker.module[0].weight
            before = weight.detach().clone()
            weight.grad = torch.ones_like(weight)
            worker.optimizers[0].step()
            if worker is simulator.workers[0]:
                moved = (before - weight.detach()) / 1e-3
        simulator.after_step()
    return moved.max().item()


def test_entries_that_arrive_take_long_steps_under_adam_as_the_warning_says():
    """The count of steps is the parameter's, and goes on; the warning gives the way out."""
    assert longest_step("keep") > 3
    assert longest_step("reset") == pytest.approx(1, rel=1e-3)


ADAM, SGD = torch.optim.AdamW, partial(torch.optim.SGD, momentum=0.9)


@pytest.mark.parametrize(
    ("make", "settings", "workers", "said"),
    [
        (ADAM, {"momentum": "keep"}, 2, True),
        (ADAM, {"momentum": "travel"}, 2, True),
        (ADAM, {"momentum": "reset"}, 2, False),
        (ADAM, {"momentum": "keep", "min_share": 1}, 2, False),
        (ADAM, {"momentum": "keep"}, 1, False),
        (SGD, {"momentum": "keep"}, 2, False),
    ],
)
def test_an_optimizer_that_counts_steps_is_named_where_entries_arrive(make, settings, workers, said):
    def start(collective):
        with ONE_AT_A_TIME:
            net = make_net(Run(NeuronConfig(), 0))
            Engine(net, [make(net.parameters(), lr=0.1)], NeuronConfig(**settings), collective=collective)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_threads(start, workers)
    texts = [str(warning.message) for warning in caught if "counts the steps" in str(warning.message)]
    assert len(texts) == said, "once, not by every worker"
    if said:
        assert "AdamW counts the steps of a whole parameter (step). With momentum=" in texts[0]
        assert "Use momentum='reset' or" in texts[0]


def train_on_after_the_end(collective, run):
    engine, optimizer = start_engine(run, collective)
    for step in range(run.steps):
        train_step(engine.module, optimizer, batch_of(run, collective.worker, step))
        engine.after_step()
    engine.finish()
    before = clone_state(engine.module)
    train_step(engine.module, optimizer, batch_of(run, 0, 9))
    return before, clone_state(engine.module)


@pytest.mark.parametrize("momentum", MOMENTA)
def test_the_full_model_can_be_trained_on_with_the_same_optimizer(momentum):
    """A short training of the full model at the end avoids the accuracy floor (decision 17)."""
    run = Run(NeuronConfig(local_steps=2, momentum=momentum), 3, optimizer="adamw")
    for before, after in run_threads(train_on_after_the_end, 2, run)[0]:
        for name, cut in NeuronLayout(make_net(run), run.config, 2).neurons.cuts.items():
            changed = after[name] != before[name]
            assert changed.all(), f"{name}, {cut}: a part of the full model did not train"
