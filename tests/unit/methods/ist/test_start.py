"""The start of IST: each worker gets its slices and stores of worker 0's module, and no more."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import pytest
import torch
from torch import nn

from resist_lightning import Engine, NeuronConfig
from resist_lightning.comm.packing import packed_bytes
from resist_lightning.comm.tensors import named_tensors
from resist_lightning.methods.ist.layout import NeuronLayout
from resist_lightning.methods.ist.partition import kept_rows
from resist_lightning.state.unmade import without_memory
from tests.helpers.ist import ONE_AT_A_TIME, Run, batch_of, make_net, make_optimizer
from tests.helpers.nets import on_meta
from tests.helpers.neuron_plans import entries, place
from tests.helpers.threads import run_threads
from tests.helpers.training import assert_equal_states, clone_state, train_step

WORKERS = 3
RUNS = {
    "mixed": Run(NeuronConfig(local_steps=2, momentum="travel", min_share=0), 3),
    "conv": Run(NeuronConfig(local_steps=2, min_share=0), 3, "conv", "adamw"),
    "several holders": Run(NeuronConfig(local_steps=2), 3, "conv"),
}


def other(run: Run) -> nn.Module:
    net = make_net(run)
    with torch.no_grad():
        for tensor in named_tensors(net).values():
            tensor.fill_(9)
    return net


def form(run: Run) -> nn.Module:
    with without_memory():
        return make_net(run)


def trained(collective, run, nets):
    """Bytes sent at the start, the shapes held then, and the full model after the training."""
    with ONE_AT_A_TIME:
        net = nets[collective.worker]
        optimizer = make_optimizer(run, net)
        engine = Engine(net, [optimizer], run.config, collective=collective, total_steps=run.steps)
    parameters = list(net.parameters())
    engine.start()
    sent = collective.sent_bytes["start"]
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(net).items()}
    assert not any(tensor.is_meta for tensor in named_tensors(net).values())
    for step in range(run.steps):
        train_step(net, optimizer, batch_of(run, collective.worker, step))
        engine.after_step()
    engine.finish()
    assert all(one is other for one, other in zip(parameters, net.parameters(), strict=True))
    return sent, shapes, clone_state(net)


def bytes_by_hand(layout: NeuronLayout) -> int:
    """Bytes that worker 0 sends: with one holder each entry of a divided tensor once, unless its place is worker 0."""
    held = layout.partition(0)
    shared = packed_bytes(layout.shared.values())
    total = (WORKERS - 1) * shared
    for name, cut in layout.neurons.cuts.items():
        size = named_tensors(layout.module)[name].element_size()
        if layout.config.min_share == 0:
            away = [entry for entry in entries(cut, held) if place(cut, held, entry)[0] != 0]
            # A side without hidden neurons has two rows or columns there.
            all_entries = prod(layout.shapes[name])
            total += len(away) * all_entries // len(entries(cut, held)) * size
            continue
        for worker in range(1, WORKERS):
            total += prod(layout.held_shape(name, worker, 0)) * size
            if name in layout.inner():
                rows, *rest = layout.shapes[name]
                total += len(kept_rows(rows, WORKERS, worker)) * prod(rest) * size
    return total


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize(
    "build", [other, form, lambda run: on_meta(lambda: make_net(run))], ids=["whole", "form", "meta"]
)
def test_every_worker_gets_what_its_first_partition_gives_it(build: Callable[[Run], nn.Module], name: str) -> None:
    run = RUNS[name]
    layout = NeuronLayout(make_net(run), run.config, WORKERS)
    expected, _ = run_threads(trained, WORKERS, run, [make_net(run) for _ in range(WORKERS)])
    results, _ = run_threads(trained, WORKERS, run, [make_net(run), *(build(run) for _ in range(1, WORKERS))])
    assert [sent for sent, *_ in results] == [bytes_by_hand(layout), 0, 0]
    for worker, (_, shapes, state) in enumerate(results):
        assert {key: shapes[key] for key in layout.shapes} == {
            key: layout.held_shape(key, worker, 0) for key in layout.shapes
        }
        assert_equal_states(state, expected[worker][2], exactly=True)


def test_where_nobody_makes_values_worker_0_does() -> None:
    run = RUNS["mixed"]
    results, _ = run_threads(trained, WORKERS, run, [on_meta(lambda: make_net(run)) for _ in range(WORKERS)])
    states = [state for *_, state in results]
    for state in states[1:]:
        assert_equal_states(state, states[0], exactly=True)
    assert all(tensor.isfinite().all() for tensor in states[0].values())
