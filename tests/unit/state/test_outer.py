"""An outer step is torch's SGD with Nesterov momentum, from the values at the beginning of the round."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from resist_lightning.state.outer import OuterOptimizer, outer_bytes


def parameter(values: Any, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def round_of(outer: OuterOptimizer, weight: Tensor, mean: Tensor) -> None:
    """A round in which a parameter becomes ``mean``, and the step at its end."""
    outer.begin_round([weight], {})
    weight.data.copy_(mean)
    outer.step([weight])


RATES = st.floats(0.05, 2.0)
MOMENTA = st.floats(0.0, 0.95)
MEANS = st.lists(st.lists(st.floats(-10, 10), min_size=3, max_size=3), min_size=1, max_size=5)


@given(RATES, MOMENTA, MEANS)
def test_rounds_are_steps_of_sgd_with_nesterov_momentum_on_what_they_change(rate, momentum, means):
    weight, plain = parameter([1.0, -2.0, 0.5]), parameter([1.0, -2.0, 0.5])
    outer = OuterOptimizer(rate, momentum)
    sgd = torch.optim.SGD([plain], rate, momentum=momentum, nesterov=momentum > 0)
    for mean in means:
        plain.grad = plain.detach() - torch.tensor(mean, dtype=torch.float64)
        sgd.step()
        round_of(outer, weight, torch.tensor(mean, dtype=torch.float64))
    torch.testing.assert_close(weight, plain, rtol=1e-9, atol=1e-9)


@settings(max_examples=40)
@given(MEANS, st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.complex64]))
def test_rate_one_without_momentum_is_the_mean_bit_for_bit(means, dtype):
    weight, outer = parameter([1.0, -2.0, 0.5], dtype), OuterOptimizer(1.0, 0.0)
    for mean in means:
        expected = torch.tensor(mean).to(dtype)
        round_of(outer, weight, expected)
        assert torch.equal(weight, expected)


@given(RATES, MOMENTA)
def test_what_no_worker_changes_stays_as_it_is(rate, momentum):
    weight = parameter([0.1, 1e-30, 3e7], torch.float32)
    before, outer = weight.detach().clone(), OuterOptimizer(rate, momentum)
    for _ in range(3):
        round_of(outer, weight, before)
        assert torch.equal(weight, before)


def test_buffers_integers_and_frozen_parameters_stay_means():
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    tensors = [torch.ones(2), torch.ones(2, dtype=torch.int64), frozen, torch.ones(2, requires_grad=True)]
    weight, outer = parameter([1.0]), OuterOptimizer(0.7, 0.9)
    outer.begin_round([*tensors, weight], {})
    for tensor in [*tensors, weight]:
        tensor.data.mul_(3)
    outer.step([*tensors, weight])
    assert all(tensor.detach().eq(3).all() for tensor in tensors)
    assert weight.item() == pytest.approx(1 + 0.7 * 2 * 1.9)
    assert outer.velocities(tensors) == []


def test_a_parameter_that_was_not_noted_takes_no_step_and_one_that_leaves_loses_its_velocity():
    one, other, outer = parameter([1.0]), parameter([1.0]), OuterOptimizer(1.0, 0.5)
    outer.begin_round([one], {})
    for weight in (one, other):
        weight.data.fill_(2.0)
    outer.step([one, other])
    assert (one.item(), other.item()) == (2.5, 2.0)
    assert outer.velocity(one).item() == -1.0
    outer.step([one])  # a round has one step
    assert one.item() == 2.5
    outer.begin_round([other], {})
    assert outer.velocity(one).item() == 0.0


def test_a_copy_that_is_kept_anyway_is_taken_and_not_changed():
    weight, outer = parameter([1.0]), OuterOptimizer(1.0, 0.5)
    copy = torch.tensor([0.0], dtype=torch.float64)
    outer.begin_round([weight], {id(weight): copy})
    outer.step([weight])  # from 0 to the mean of 1, and half as far again
    assert (weight.item(), copy.item()) == (1.5, 0.0)


def test_sixteen_bits_have_a_velocity_of_thirty_two():
    weight, outer = parameter([1.0], torch.bfloat16), OuterOptimizer(1.0, 0.9)
    for mean in (1.0078125, 1.015625):
        round_of(outer, weight, torch.tensor([mean]))
    assert outer.velocity(weight).dtype == torch.float32
    assert outer_bytes(weight) == 4
    assert outer_bytes(parameter([1.0], torch.complex64)) == 8


def test_what_is_saved_in_the_middle_of_a_round_is_loaded_to_the_bit():
    def trained(weight: nn.Parameter, outer: OuterOptimizer) -> None:
        round_of(outer, weight, torch.tensor([0.3]))
        outer.begin_round([weight], {})

    weight, twin = parameter([1.0], torch.float32), parameter([1.0], torch.float32)
    outer, other = OuterOptimizer(0.7, 0.9), OuterOptimizer(0.7, 0.9)
    trained(weight, outer)
    between = outer.state_dict({"w": weight}, (), in_training=True)
    assert (list(between["start"]), list(between["velocity"])) == ([], ["w"])
    assert list(outer.state_dict({"w": weight}, (), in_training=False)["start"]) == ["w"]  # it may be a full model

    weight.data.fill_(0.1)  # a local step
    state = outer.state_dict({"w": weight}, (), in_training=True)
    assert outer.state_dict({"w": weight}, ("w",), in_training=True)["start"] == {}
    twin.data.fill_(0.1)
    other.begin_round([], {})  # it may be frozen until the resumed run unfreezes it, as the first one did
    other.load_state_dict(state, {"w": twin}, {}, twin.device)
    for each, step in ((weight, outer), (twin, other)):
        each.data.fill_(0.2)
        step.step([each])
    assert torch.equal(weight, twin)
    assert torch.equal(outer.velocity(weight), other.velocity(twin))
