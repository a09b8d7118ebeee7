"""A worker's numbers about itself before a handshake, and all workers' verdict on the numbers of all."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from torch import nn

from resist_lightning import Config, Engine, NotFinite, WorkersDisagree
from resist_lightning.checks.divergence import DivergenceChecks
from resist_lightning.checks.header import Purpose
from resist_lightning.comm.collective import SoloCollective
from resist_lightning.methods.resist.layout import BlockLayout
from resist_lightning.schedule.progress import Clock
from tests.helpers.nets import small_preact
from tests.helpers.threads import run_threads

CLOCK = Clock(50, round=3, step=50)


def judged(collective, spoil, policy, note=None):
    """A worker's error, or left-out workers and warnings, after ``spoil`` has changed its model."""
    net = small_preact()
    divergence = DivergenceChecks(
        BlockLayout(net, Config(min_blocks=1, non_finite=policy), collective.workers), collective
    )
    divergence.begin()
    spoil(net, collective.worker)
    if note is not None:
        divergence.note(note(collective.worker), 3)
    numbers = collective.gather_numbers(divergence.numbers(Purpose.SYNC))
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            divergence.judge(numbers, CLOCK)
    except (NotFinite, WorkersDisagree) as error:
        return type(error), str(error)
    return divergence.left_out, [str(warning.message) for warning in caught]


def spoil_on(*workers, name="section3.1.conv1", value=torch.nan):
    def spoil(net, worker):
        if worker in workers:
            net.get_submodule(name).weight.data.view(-1)[0] = value

    return spoil


def nothing(net, worker):
    pass


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_all_raise_the_same_error_that_names_worker_block_round_and_step(value):
    results, _ = run_threads(judged, 3, spoil_on(2, value=value), "raise")
    kind, message = results[0]
    assert kind is NotFinite
    assert results == [(kind, message)] * 3
    assert "after local step 50 of round 3: worker 2 in block section3.1 (section3.1.conv1.weight)." in message


def test_several_workers_are_all_named():
    (_, message), *_ = run_threads(judged, 3, spoil_on(0, 2, name="head"), "raise")[0]
    assert "worker 0 in shared tensor head.weight, worker 2 in shared tensor head.weight." in message


def test_with_drop_they_are_left_out_and_worker_0_says_so():
    (first, *others), _ = run_threads(judged, 3, spoil_on(0, 2), "drop")
    assert first[0] == (0, 2)
    assert len(first[1]) == 1
    assert "worker 2 in block section3.1 (section3.1.conv1.weight). Left out of this round." in first[1][0]
    assert others == [((0, 2), [])] * 2


def test_all_cannot_be_left_out():
    results, _ = run_threads(judged, 2, spoil_on(0, 1), "drop")
    assert [kind for kind, _ in results] == [NotFinite, NotFinite]
    assert "all workers have NaN or infinity" in results[0][1]


def numbers_after(change, purpose=Purpose.SYNC, before=lambda net: None):
    net = small_preact()
    before(net)
    divergence = DivergenceChecks(BlockLayout(net, Config(min_blocks=1), 1), SoloCollective())
    divergence.begin()
    with torch.no_grad():
        change(net)
    return divergence.numbers(purpose)


def set_head(value):
    return lambda net: net.head.weight.fill_(value)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda net: None, False),
        (set_head(torch.nan), True),
        (set_head(3e38), False),  # the sum is infinite, the tensor is not
        (lambda net: net.head.weight.requires_grad_(False).fill_(torch.nan), False),  # it is not averaged
        (lambda net: net.section1[0].bn1.running_mean.fill_(torch.nan), True),
        (lambda net: net.section1[0].bn1.num_batches_tracked.fill_(-1), False),
        (lambda net: net.section3[1].to("meta"), False),
    ],
)
def test_what_is_questioned(change, found):
    assert bool(numbers_after(change)[1]) is found
    assert numbers_after(change, Purpose.HOST)[1] == 0  # nothing will be averaged


def test_a_buffer_that_was_not_finite_when_training_started_is_not_questioned_but_a_parameter_is():
    def mask(net):
        net.register_buffer("mask", torch.tensor([0.0, -torch.inf]))

    assert numbers_after(lambda net: None, before=mask)[1] == 0
    assert numbers_after(lambda net: None, before=lambda net: nn.init.constant_(net.head.bias, torch.nan))[1] > 0


def tensors_of(worker):
    return {"a": torch.ones(3), "b": torch.full((3,), float(worker == 1)), "c": torch.zeros(2, dtype=torch.int64)}


def test_unequal_tensors_are_named_on_all_workers_by_a_second_question():
    results, room = run_threads(judged, 3, nothing, "raise", tensors_of)
    assert results == [results[0]] * 3
    assert results[0][0] is WorkersDisagree
    assert "after the sync into round 3, tensors that must be equal on all workers differ" in results[0][1]
    assert ": b (worker 1 differs from the others). " in results[0][1]
    assert [verb for worker, verb, _ in room.log if worker == 0] == ["gather_bytes", *["gather_numbers"] * 2]


def test_equal_tensors_need_no_second_question():
    results, room = run_threads(judged, 3, nothing, "raise", lambda worker: {"a": torch.ones(3)})
    assert results == [((), [])] * 3
    assert [verb for worker, verb, _ in room.log if worker == 0] == ["gather_bytes", "gather_numbers"]


def toggling(collective, *, by_optimizer):
    """A tensor that changes in every round and is frozen at its end: trained like a discriminator, or written."""
    net = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1, bias=False))
    optimizer = torch.optim.SGD(net[:1].parameters() if not by_optimizer else net.parameters(), lr=0.1)
    engine = Engine(net, [optimizer], Config(local_steps=1, blocks=[]), collective=collective)
    engine.start()
    for _ in range(2):
        net[1].requires_grad_(by_optimizer)
        net(torch.randn(3, 2)).sum().backward()
        optimizer.step()
        if not by_optimizer:
            net[1].weight.data.add_(collective.worker + 1.0)
        net[1].requires_grad_(False)
        engine.after_step()
    engine.abandon()


@pytest.mark.parametrize("by_optimizer", [True, False], ids=["trained", "written"])
def test_what_trains_and_is_frozen_when_a_round_ends_is_told_the_way_out(by_optimizer):
    """It passed for a moving average: it was averaged, but in silence took no outer step."""
    with pytest.warns(UserWarning, match=r"1\.weight: frozen, but overwritten") as caught:
        run_threads(partial(toggling, by_optimizer=by_optimizer), 2)
    texts = [str(warning.message) for warning in caught if "overwritten" in str(warning.message)]
    assert ["requires_grad=True" in text for text in texts] == [by_optimizer]
