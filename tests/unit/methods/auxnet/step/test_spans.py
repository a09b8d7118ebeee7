"""The speed-up derived from a step's spans."""

from __future__ import annotations

import pytest
import torch

from resist_lightning.methods.auxnet.step.spans import NAMES, Spans, measured_speedup, step_seconds, typical_step


def row(**seconds: float) -> dict[str, float]:
    return {name: seconds.get(name.replace(" ", "_"), 0.0) for name in NAMES}


def test_two_equal_stages_are_twice_as_fast_if_nothing_else_takes_time() -> None:
    workers = [row(forward=1, backward=2), row(forward=1, backward=2)]

    assert measured_speedup(workers) == 2
    seconds = step_seconds(workers)
    assert seconds is not None
    assert seconds.predicted(2) == 2


@pytest.mark.parametrize("what", ["data", "loss", "optimizer"])
def test_what_every_worker_does_is_not_sped_up(what: str) -> None:
    workers = [row(forward=0.001, **{what: 1.0}), row(forward=0.001, **{what: 1.0})]

    assert measured_speedup(workers) == pytest.approx(1.001, abs=1e-3)
    seconds = step_seconds(workers)
    assert seconds is not None
    assert seconds.predicted(2) == pytest.approx(1.001, abs=1e-3)


def test_waiting_for_a_slower_stage_lowers_what_is_measured_and_not_what_is_predicted() -> None:
    workers = [row(forward=1, wait_for_output=2), row(forward=3)]

    assert measured_speedup(workers) == pytest.approx(4 / 3)
    seconds = step_seconds(workers)
    assert seconds is not None
    assert seconds.predicted(2) == 2


def test_an_auxiliary_network_costs_its_time() -> None:
    workers = [row(forward=2, wait_for_output=1), row(forward=2, aux_forward=0.5, aux_backward=0.5)]

    assert measured_speedup(workers) == pytest.approx(4 / 3)
    seconds = step_seconds(workers)
    assert seconds is not None
    assert seconds.predicted(2) == pytest.approx(4 / 3)


def test_nothing_is_said_of_a_round_without_a_parallel_step() -> None:
    assert step_seconds([row(), row()]) is None
    assert step_seconds([]) is None


def take_step(spans: Spans, *, counts: bool) -> None:
    for name in ("forward", "loss", "backward", "optimizer"):
        spans.begin(name)  # type: ignore[arg-type]
    spans.end_step(counts=counts)


def test_steps_in_which_stages_wait_for_each_other_are_left_out_of_the_means() -> None:
    spans = Spans(torch.device("cpu"))
    take_step(spans, counts=False)
    assert spans.take() == [0.0] * len(NAMES)
    assert not spans.recent

    take_step(spans, counts=True)
    assert len(spans.recent) == 1
    assert [name for name, _, _ in spans.recent[0]] == ["data", "forward", "loss", "backward", "optimizer"]


def test_a_span_can_turn_out_to_have_been_another() -> None:
    spans = Spans(torch.device("cpu"))
    spans.begin("forward")
    spans.begin("optimizer")
    spans.rename("data")
    spans.end_step()

    assert [name for name, _, _ in spans.recent[0]] == ["forward", "data"]


def test_the_typical_step_is_the_median_one_and_begins_at_0() -> None:
    steps = [[("forward", 10.0 * number, 10.0 * number + seconds)] for number, seconds in enumerate((3, 9, 5))]

    assert typical_step([steps, steps]) == [[("forward", 0.0, 5.0)]] * 2
    assert typical_step([[[("forward", 0.0, 1.0)], *steps], steps]) == [[("forward", 0.0, 5.0)]] * 2
    assert typical_step([[], steps]) == []
