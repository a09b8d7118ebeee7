"""Syncs beside the training, of workers as threads; by processes: ``tests/distributed/test_oracle.py``."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resist_lightning import Config, Engine, PostLocal
from resist_lightning.comm.byte_formulas import SYNC_KINDS
from resist_lightning.comm.collective import Collective
from resist_lightning.errors import WorkersDisagree
from resist_lightning.methods.resist.layout import BlockLayout
from resist_lightning.schedule.overlap import waiting_rounds
from tests.helpers.nets import Normed
from tests.helpers.threads import run_threads
from tests.helpers.training import (
    Run,
    assert_equal_states,
    assert_threads_train_what_the_simulator_trains,
    clone_state,
    end_of_resumed,
    ends_of_resumed,
    make_model,
    present_state,
    slow_down,
    start_engine,
    train_simulator,
    train_steps,
    trained_in_thread,
)

State = dict[str, Tensor]

OUTER: dict[str, Any] = {"outer": "nesterov", "outer_rate": 0.5, "outer_momentum": 0.8}
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "one step": (2, {"min_blocks": 1, "overlap": 1}),
    "rounds that change, keep": (2, {"min_blocks": 1, "local_steps": PostLocal(3, 4, 5), "momentum": "keep"}),
    "listed counts, warm-up and finish": (3, {"blocks_per_worker": (4, 2, 1), "warmup_rounds": 1, "finish_rounds": 1}),
    "growth, int2": (2, {"growth": [0.5, 1], "wire": "int2"}),
    "outer, int4, blocks on several workers": (
        3,
        {"blocks_per_worker": (4, 2, 1), "momentum": "keep", "wire": "int4", **OUTER},
    ),
    "DiLoCo, int2": (2, {"blocks": [], "batch_norm": "running", "momentum": "keep", "wire": "int2", **OUTER}),
    "one worker": (1, {"min_blocks": 1}),
    "one worker, outer": (1, {"min_blocks": 1, "momentum": "keep", **OUTER}),
}


def run_of(options: dict[str, Any], steps: int = 10) -> Run:
    return Run(Config(**{"local_steps": 3, "overlap": 2, **options}), steps=steps, net=Normed)


@pytest.mark.parametrize(("workers", "options"), RUNS.values(), ids=RUNS)
def test_workers_train_what_the_simulator_trains(workers: int, options: dict[str, Any]) -> None:
    assert_threads_train_what_the_simulator_trains(run_of(options), workers, overlap=0)


class Freezing(Normed):
    """Freezes layers behind three steps, before the sync of their round begins, and trains them again four later."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def forward(self, images: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            for layer in (self.head, self.body[2]):
                layer.requires_grad_(not 3 <= self.steps < 7)
            self.steps += 1
        return super().forward(images)


def test_layers_that_are_frozen_before_a_sync_begins_take_the_outer_step_of_their_round() -> None:
    """They just became the mean, and where syncs are waited for they took the step."""
    run = replace(run_of({"min_blocks": 3, "momentum": "keep", **OUTER}, steps=13), net=Freezing)
    assert_threads_train_what_the_simulator_trains(run, 2, overlap=0)


class OfBytes(Normed):
    """A network with parameters of 8 bits, which no optimizer of torch steps."""

    def __init__(self) -> None:
        super().__init__()
        for owner in (self, *self.body):
            owner.small = nn.Parameter(torch.ones(5).to(torch.float8_e4m3fn))


def test_parameters_of_8_bits_travel_as_they_are() -> None:
    """The line before a training, an outer step, and any wire but fp32 ended with an error of torch's."""
    run = replace(run_of({"min_blocks": 3, "momentum": "keep", "wire": "int8", **OUTER}), net=OfBytes)
    assert "MB per sync" in BlockLayout(make_model(run), run.config, 2).describe()
    states, _ = run_threads(trained_in_thread, 2, run)
    expected = train_simulator(run, 2).full_model().state_dict()
    for state in states:
        assert_equal_states(*({name: tensor.float() for name, tensor in each.items()} for each in (state, expected)))


STATE_IN_TRANSIT = {"blocks_per_worker": (4, 2, 1), "momentum": "keep", "wire": "int8", "warmup_rounds": 1, **OUTER}
ROUND = 4


def run_in_transit() -> Run:
    return Run(Config(local_steps=ROUND, overlap=3, **STATE_IN_TRANSIT), steps=10, net=Normed)


def test_a_run_that_resumes_while_a_sync_is_under_way_is_the_run_that_was_not_stopped() -> None:
    stops = (ROUND + 1, ROUND + 3, 2 * ROUND)  # after the border, after blocks have left, too, and between two rounds
    late = BlockLayout(make_model(run_in_transit()), run_in_transit().config, 3).overlap_of_blocks(3)
    assert ROUND - 3 <= 1 < ROUND - late <= 3
    initial = clone_state(make_model(run_in_transit()))
    for states in run_threads(ends_of_resumed, 3, run_in_transit(), stops, initial)[0]:
        for stop in stops:
            assert_equal_states(states[stop], states[0], exactly=True)


AUTO: dict[str, tuple[int, dict[str, Any]]] = {
    "fp32": (3, {"min_blocks": 1}),
    "int8, outer": (2, {"min_blocks": 3, "wire": "int8", "momentum": "keep", **OUTER}),
    "fragments": (2, {"min_blocks": 2, "fragments": 2}),
}


def measured(collective: Collective, run: Run, initial: State) -> tuple[dict[str, Any], list[State]]:
    """The overlap that a run chose, and its end, without and with a resume while a sync is under way."""
    slow_down(collective, 0.05)
    engine, optimizer = start_engine(collective, run, initial)
    under_way = 3 * waiting_rounds(run.config.fragments) + 2  # a border is one or two steps before the end of a round
    train_steps(engine, optimizer, range(under_way))
    assert engine.sync.under_way
    with engine.full_model("checkpoint"):
        full, place, own = clone_state(engine.module), engine.checkpoint_state(), engine.resumption.state_dict()
        table = json.loads(json.dumps(place["table"]))
        place, own = {**copy.deepcopy(place), "table": table}, copy.deepcopy(own)
    train_steps(engine, optimizer, range(under_way, run.steps))
    engine.finish()
    end = clone_state(engine.module)
    return table, [end, end_of_resumed(collective, run, under_way, full, place, own)]


@pytest.mark.parametrize(("workers", "options"), AUTO.values(), ids=AUTO)
def test_a_chosen_overlap_is_the_same_on_all_workers_in_the_simulator_and_after_a_resume(
    workers: int, options: dict[str, Any]
) -> None:
    waiting = waiting_rounds(options.get("fragments", 1))
    run = run_of({**options, "overlap": "auto"}, steps=3 * waiting + 8)
    found, _ = run_threads(measured, workers, run, clone_state(make_model(run)))
    table = found[0][0]
    assert table["overlap"]["chosen"] in ([waiting, 1], [waiting, 2])
    waits = replace(run, config=replace(run.config, overlap=0))
    expected = train_simulator(waits, workers, table).full_model().state_dict()
    assert_equal_states(found[0][1][0], expected)
    for other, ends in found:
        assert other == table
        for end in ends:
            assert_equal_states(end, found[0][1][0], exactly=True)
    without = train_simulator(waits, workers).full_model().state_dict()
    assert any(not torch.allclose(without[name].float(), expected[name].float(), rtol=1e-3) for name in expected)


def at_no_cost(collective: Collective, run: Run, initial: State) -> tuple[int | None, State]:
    engine, optimizer = start_engine(collective, run, initial)
    engine._round_end._exchanging.take_sync = lambda: 1e-9  # type: ignore[method-assign]
    train_steps(engine, optimizer, range(run.steps))
    engine.finish()
    chosen = engine.layout.overlaps.chosen
    return chosen and chosen[1], clone_state(engine.module)


def test_a_run_whose_syncs_cost_nothing_waits_for_them_as_without_the_option() -> None:
    auto = run_of({"min_blocks": 1, "wire": "int8", "overlap": "auto"}, steps=14)
    initial = clone_state(make_model(auto))
    waiting = replace(auto, config=replace(auto.config, overlap=0))
    found, expected = (run_threads(at_no_cost, 2, run, initial)[0] for run in (auto, waiting))
    for (chosen, state), (never, other) in zip(found, expected, strict=True):
        assert (chosen, never) == (0, None)
        assert_equal_states(state, other, exactly=True)


def test_a_checkpoint_of_a_run_with_overlap_does_not_continue_one_without() -> None:
    net = make_model(run_in_transit())
    ahead, waiting = (BlockLayout(net, Config(min_blocks=1, overlap=steps), 2).identity() for steps in (1, 0))
    assert ahead != waiting
    assert "overlap" not in waiting  # as in older checkpoints


def looked_at(collective: Collective, run: Run) -> list[tuple[State, State, State]]:
    """During and after a sync: a worker's tensors before and after an observation, and the full model."""
    engine, optimizer = start_engine(collective, run)
    seen = []
    for first, last, under_way in ((0, ROUND - 1, True), (ROUND - 1, ROUND, False)):
        train_steps(engine, optimizer, range(first, last))
        assert engine.sync.under_way == under_way
        before = present_state(engine.module)
        with engine.full_model():
            full = clone_state(engine.module)
        assert engine.sync.under_way == under_way
        seen.append((before, present_state(engine.module), full))
    engine.abandon()
    return seen


def test_the_full_model_is_the_mean_of_what_the_workers_have_now() -> None:
    run = replace(run_in_transit(), config=Config(local_steps=ROUND, overlap=3, min_blocks=1, batch_norm="running"))
    seen, _ = run_threads(looked_at, 3, run)
    for moment in zip(*seen, strict=True):
        held = torch.stack([before["stem.weight"] for before, _, _ in moment])
        assert not torch.equal(held[0], held[1])
        for before, after, full in moment:
            assert_equal_states(after, before, exactly=True)
            torch.testing.assert_close(full["stem.weight"], held.mean(0))
            assert_equal_states(full, moment[0][2], exactly=True)
    observed, _ = run_threads(trained_in_thread, 3, replace(run, observe_at=(1, 3, 4, 6, 7)))
    plain, _ = run_threads(trained_in_thread, 3, run)
    for one, other in zip(observed, plain, strict=True):
        assert_equal_states(one, other, exactly=True)


def sent(collective: Collective, run: Run) -> dict[str, int]:
    engine, optimizer = start_engine(collective, run)
    train_steps(engine, optimizer, range(run.steps))
    engine.abandon()
    return {kind: engine.collective.sent_bytes[kind] for kind in SYNC_KINDS}


@pytest.mark.parametrize("options", [{}, {"wire": "int6", "warmup_rounds": 1, **OUTER}], ids=["fp32", "outer, int6"])
def test_the_bytes_are_those_of_syncs_for_which_the_training_waits(options: dict[str, Any]) -> None:
    ahead = Run(Config(local_steps=2, overlap=1, min_blocks=3, momentum="keep", **options), steps=6, net=Normed)
    waiting = replace(ahead, config=replace(ahead.config, overlap=0))
    expected, _ = run_threads(sent, 3, waiting)
    assert run_threads(sent, 3, ahead)[0] == expected
    assert all(sum(worker.values()) for worker in expected)


def broken(collective: Collective, run: Run) -> str:
    engine, optimizer = start_engine(collective, run)
    engine.sync._beside.collective.exchange = lambda *_: 1 / 0
    train_steps(engine, optimizer, range(ROUND - 1))
    with pytest.raises(ZeroDivisionError):
        train_steps(engine, optimizer, range(ROUND - 1, ROUND))
    engine.abandon()
    return engine.activity.what


def test_what_goes_wrong_beside_the_training_is_raised_where_the_sync_would_be_applied() -> None:
    run = Run(Config(local_steps=ROUND, overlap=2, min_blocks=1), steps=ROUND, net=Normed)
    assert run_threads(broken, 2, run)[0] == ["averaging", "averaging"]


def unequal(collective: Collective, run: Run) -> None:
    engine, optimizer = start_engine(collective, run)
    train_steps(engine, optimizer, range(ROUND - 1))
    engine.sync.wait_overlapped()
    if collective.worker == 1:
        engine.sync._transit.agreed()["stem.weight"].add_(1)  # a value that is damaged on its way
    train_steps(engine, optimizer, range(ROUND - 1, 2 * ROUND))
    engine.abandon()


def test_workers_compare_what_has_arrived_although_each_has_learned_something_else_since() -> None:
    run = Run(Config(local_steps=ROUND, overlap=2, min_blocks=1, check="full"), steps=0, net=Normed)
    with pytest.raises(WorkersDisagree, match=r"stem\.weight"):
        run_threads(unequal, 2, run)


class Drifting(nn.Module):
    """A shared layer, with a buffer that each forward replaces by a new object."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0]))
        self.register_buffer("variance", torch.tensor([10.0]))

    def forward(self, x: Tensor) -> Tensor:
        self.variance = self.variance * 0.5 + x.mean() * 0.5
        return self.weight * x


def drift(collective: Collective) -> list[list[float]]:
    """Weight and buffer after each of two steps; the sync at the second has its border at the first."""
    net = Drifting()
    optimizer = torch.optim.SGD(net.parameters(), 1.0)
    engine = Engine(net, [optimizer], Config(local_steps=2, overlap=1, blocks=[]), collective=collective)
    engine.start()
    seen = []
    for step in range(2):
        optimizer.zero_grad()
        net(torch.full((1,), float(1 + collective.worker + 2 * step))).sum().backward()
        optimizer.step()
        engine.after_step()
        seen.append([net.weight.item(), net.variance.item()])
    engine.abandon()
    return seen


def test_weights_keep_what_they_have_learned_and_buffers_take_what_has_arrived() -> None:
    """By hand: gradients are the inputs, 1 and 3 on worker 0, 2 and 4 on worker 1."""
    first, second = run_threads(drift, 2)[0]
    assert first == [[0.0, 5.5], [-0.5 - 3.0, 5.75]]
    assert second == [[-1.0, 6.0], [-0.5 - 4.0, 5.75]]
