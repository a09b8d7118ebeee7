"""State of optimizers beside the usual one: attributes, modes, numbers, inner optimizers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from resist_lightning.errors import CheckpointError
from resist_lightning.state.optimizer_state import OptimizerStates
from resist_lightning.state.python_numbers import python_numbers
from tests.helpers.nets import small_preact
from tests.helpers.optimizers import Own, of_block, stepped


class Sharp(torch.optim.Optimizer):
    """Has an inner optimizer, and steps with a closure, like SAM."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})
        self.base = torch.optim.SGD(self.param_groups, lr=lr, momentum=0.9)
        self.param_groups = self.base.param_groups

    def step(self, closure=None):
        with torch.enable_grad():
            closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["old"] = p.detach().clone()
        self.base.step()


def test_reset_begins_anew_all_that_steps_have_changed_but_the_schedule():
    module = small_preact()
    optimizer = Own(module.parameters())
    states = OptimizerStates([optimizer])
    optimizer.train()
    stepped(module, optimizer)
    optimizer.param_groups[0]["lr"] = 0.01
    states.reset()
    group = optimizer.param_groups[0]
    assert (group["count"], group["d"], group["lr"], "late" in group) == (0, 1.0, 0.01, False)
    assert (optimizer.calls, optimizer.mode, len(optimizer.state)) == (0, "train", 0)


def test_a_group_that_is_added_in_the_training_restarts_with_the_others():
    """Its numbers went on: a schedule-free average weighted the steps of the new state as if they were late ones."""
    module = small_preact()
    optimizer = Own(module.head.parameters())
    states = OptimizerStates([optimizer])
    optimizer.train()
    optimizer.add_param_group({"params": of_block(module)})
    stepped(module, optimizer)
    assert optimizer.param_groups[1]["count"] == 1
    states.reset()
    group = optimizer.param_groups[1]
    assert (group["count"], group["d"], "late" in group) == (0, 1.0, False)


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_the_state_of_a_group_that_is_added_in_the_training_travels_or_is_refused(momentum):
    """Parameters with another number of dimensions than the first ones lost their momentum in silence."""
    module = small_preact()
    optimizer = torch.optim.SGD([module.head.bias], lr=0.1, momentum=momentum)
    states = OptimizerStates([optimizer])
    weight = of_block(module)[2]
    optimizer.add_param_group({"params": [weight], "momentum": 0.9})
    stepped(module, optimizer)
    if momentum:
        assert states.tensors([weight]) == [optimizer.state[weight]["momentum_buffer"]]
        return
    with pytest.raises(ValueError, match=r"keeps 'momentum_buffer' of a parameter .*momentum='reset'"):
        states.tensors([weight])


def test_what_an_optimizer_has_goes_into_a_file_and_comes_back_to_the_bit(tmp_path):
    module = small_preact()
    optimizer, other = Own(module.parameters()), Own(module.parameters())
    states, others = OptimizerStates([optimizer]), OptimizerStates([other])
    optimizer.train()
    stepped(module, optimizer)
    optimizer.state[of_block(module)[0]]["wide"].fill_(1 / 3)
    optimizer.param_groups[0] |= {"lr": np.float64(1 / 3), "odds": [(np.float32(0.5), np.int64(3))]}
    torch.save(states.state_dict(), tmp_path / "own")
    groups = other.param_groups
    others.load_state_dict(torch.load(tmp_path / "own", weights_only=True))
    assert (other.calls, other.param_groups) == (1, optimizer.param_groups)
    # NumPy's numbers would be refused with `weights_only=True`.
    assert [type(other.param_groups[0]["lr"]), *map(type, other.param_groups[0]["odds"][0])] == [float, float, int]
    assert other.param_groups is groups  # a wrapper may share it
    for parameter, state in optimizer.state.items():
        loaded = other.state[parameter]
        assert (loaded["step"], loaded["wide"].dtype) == (1, torch.float64)
        assert torch.equal(loaded["wide"], state["wide"])
        assert torch.equal(loaded["z"], state["z"])


def test_optimizers_of_another_number_are_loaded_by_position():
    """As by Lightning under `ddp`; it ended with "zip() argument 2 is shorter than argument 1"."""
    module = small_preact()
    first, second = (torch.optim.SGD(module.parameters(), rate, momentum=0.9) for rate in (0.1, 0.2))
    one, two = OptimizerStates([first]), OptimizerStates([first, second])
    stepped(module, second)
    both = two.state_dict()
    for states, saved, rates in ((two, one.state_dict()[:1], (0.3, 0.2)), (one, both, (0.1, 0.2))):
        saved[0]["param_groups"][0]["lr"] = rates[0]
        with pytest.warns(UserWarning, match=r"the state of \d optimizer\(s\), and there are \d here"):
            states.load_state_dict(saved)
        assert (first.param_groups[0]["lr"], second.param_groups[0]["lr"]) == rates
    assert len(second.state) == len(list(module.parameters()))


SGD, ADAM, ADAMW, ADAMAX = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax


def saved_by(make, module):
    optimizer = make(module.parameters(), lr=0.1, weight_decay=0.01)
    stepped(module, optimizer)
    return OptimizerStates([optimizer]).state_dict()


@pytest.mark.parametrize(
    ("before", "now", "named", "said"),
    [
        (
            SGD,
            ADAMW,
            True,
            r"written with SGD, and does not fit AdamW: it has no betas, eps\. Resume with SGD; or begin",
        ),
        (ADAMW, SGD, True, r"written with AdamW, and does not fit SGD: it has no dampening, momentum\."),
        (ADAM, ADAMAX, True, r"written with Adam, and does not fit Adamax: it has no exp_inf\."),
        (SGD, ADAMW, False, r"written with another optimizer, and does not fit AdamW: it has no betas, eps\."),
    ],
)
def test_the_state_of_another_optimizer_is_refused_where_it_does_not_fit(before, now, named, said):
    """A KeyError at the first step; between two rounds of momentum="reset" its learning rate was taken, in silence."""
    module = small_preact()
    saved = saved_by(before, module)
    if not named:  # of an earlier version
        del saved[0]["class"]
    states = OptimizerStates([now(module.parameters(), lr=0.1)])
    with pytest.raises(CheckpointError, match=said):
        states.check_fits(saved)


def test_the_state_of_another_optimizer_that_fits_is_taken_as_by_torch():
    """AdamW decayed weights as Adam does: torch corrects the group that it loads."""
    module = small_preact()
    saved = saved_by(ADAM, module)
    optimizer = ADAMW(module.parameters(), lr=0.5, amsgrad=True)
    states = OptimizerStates([optimizer])
    with pytest.warns(UserWarning, match="AdamW resumes from the state of Adam, with the hyperparameters of the check"):
        states.check_fits(saved)
    states.load_state_dict(saved)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["amsgrad"], group["decoupled_weight_decay"]) == (0.1, False, True)
    stepped(module, optimizer)


@pytest.mark.filterwarnings("error")
def test_an_optimizer_of_the_same_class_may_know_more_than_its_earlier_version_has_saved():
    module = small_preact()
    saved = saved_by(ADAMW, module)
    del saved[0]["param_groups"][0]["eps"]
    OptimizerStates([ADAMW(module.parameters(), lr=0.1)]).check_fits(saved)


def test_state_goes_to_no_other_parameters_where_groups_have_changed():
    module = small_preact()
    saved = saved_by(SGD, module)
    first, *others = module.parameters()
    states = OptimizerStates([SGD([{"params": others}, {"params": [first]}], lr=0.1)])
    with pytest.raises(
        CheckpointError, match=rf"groups of SGD have \[{len(others)}, 1\] parameters, and .* as they were"
    ):
        states.check_fits(saved)


def test_milestones_of_numpy_become_numbers_of_python():
    optimizer = torch.optim.SGD(small_preact().parameters(), np.float64(0.1))
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, np.array([2, 2, 3]))
    state = python_numbers(schedule.state_dict())
    assert state == schedule.state_dict()
    assert [type(place) for place in state["milestones"]] == [int, int]
    assert [type(rate) for rate in state["base_lrs"] + state["_last_lr"]] == [float, float]


def test_numbers_travel_as_tensors_and_come_back_as_numbers():
    module = small_preact()
    optimizer = Own(module.parameters())
    states = OptimizerStates([optimizer])
    optimizer.train()
    stepped(module, optimizer)
    block = of_block(module)
    found = states.tensors(block)
    assert [tensor.dtype for tensor in found[:3]] == [torch.float64, torch.float32, torch.float64]
    assert sum(tensor.nbytes for tensor in found) == states.bytes(block)
    assert states.tensors(block)[0] is found[0]
    found[0].fill_(7)
    states.take_numbers()
    assert (optimizer.state[block[0]]["step"], type(optimizer.state[block[0]]["step"])) == (7, int)
    states.drop(block)
    for tensor, arrived in zip(states.tensors(block), found, strict=True):
        tensor.copy_(arrived)
    states.take_numbers()
    assert optimizer.state[block[0]]["step"] == 7
    with pytest.raises(ValueError, match=r"'keep' gives zeros.*'z' of Own is a copy of the weights.*'reset'"):
        states.check_travel("keep", "'reset'", cut=True)


def test_state_inside_of_an_optimizer_is_treated_like_its_own():
    module = small_preact()
    optimizer = Sharp(module.parameters())
    states = OptimizerStates([optimizer])
    block = of_block(module)
    optimizer.step(lambda: module(torch.randn(4, 3, 8, 8)).sum().backward())
    assert len(states.tensors(block)) == 2 * len(block)
    saved = states.state_dict()
    states.drop(block)
    assert not any(parameter in optimizer.base.state for parameter in block)
    states.reset()
    assert not optimizer.base.state
    states.load_state_dict(saved)
    assert optimizer.base.param_groups is optimizer.param_groups
    assert all(optimizer.base.state[parameter]["momentum_buffer"].any() for parameter in block)


def test_what_a_trial_has_not_shown_is_not_sent():
    module = small_preact()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    states = OptimizerStates([optimizer])
    stepped(module, optimizer)
    optimizer.state[of_block(module)[0]]["rows"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"SGD keeps 'rows' of a parameter of shape .*use momentum='reset'"):
        states.tensors(of_block(module))
