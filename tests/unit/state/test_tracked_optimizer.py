"""What optimizers keep beside the usual state: attributes, modes, numbers, other optimizers inside of them."""

from __future__ import annotations

import pytest
import torch
from timm.optim import Adan, Lamb, Lookahead
from torch import nn

from resist_lightning.state.optimizer_state import OptimizerStates
from tests.helpers.nets import small_preact
from tests.helpers.optimizers import of_block, stepped
from tests.helpers.processes import run_workers


class Own(torch.optim.Optimizer):
    """Keeps what others keep where they keep it: an attribute, a list of its parameters, numbers in state and groups.

    A schedule-free optimizer has a mode and a copy of the weights; Prodigy follows the gradients in its groups.
    """

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "count": 0, "d": 1.0})
        self.factor, self.calls, self.mode, self.log = 0.5, 0, "eval", []
        self.all_parameters = [p for group in self.param_groups for p in group["params"]]

    def train(self):
        self.mode = "train"

    @torch.no_grad()
    def step(self, closure=None):
        assert self.mode == "train", "not in train mode"
        assert set(self.all_parameters) == set(self.param_groups[0]["params"])
        self.calls += 1
        for group in self.param_groups:
            group["count"] += 1
            group["late"] = group.get("late", 0) + 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=0, z=p.detach().clone(), wide=torch.zeros_like(p, dtype=torch.float64))
                state["step"] += 1
                group["d"] += float(p.grad.abs().sum())
                p.sub_(p.grad, alpha=group["lr"] * self.factor)


class Sharp(torch.optim.Optimizer):
    """Has another optimizer inside, and steps with a closure, as SAM does."""

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


class NeedsGraph(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                torch.autograd.grad(p.grad.sum(), p)


def test_what_an_optimizer_has_of_its_own_is_there_in_a_trial_and_untouched_by_it():
    module = small_preact()
    optimizer = Own(module.parameters())
    states = OptimizerStates([optimizer])
    assert (optimizer.calls, optimizer.mode, optimizer.param_groups[0]["count"]) == (0, "eval", 0)
    assert not optimizer.state
    slots = states._tracked[0].findings.slots[0, 4]
    assert {name: (slot.shaped, slot.dtype, slot.number, slot.copies_weights) for name, slot in slots.items()} == {
        "step": (False, torch.float64, int, False),
        "z": (True, torch.float32, None, True),
        "wide": (True, torch.float64, None, False),
    }


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


def test_what_an_optimizer_has_goes_into_a_file_and_comes_back_to_the_bit(tmp_path):
    module = small_preact()
    optimizer, other = Own(module.parameters()), Own(module.parameters())
    states, others = OptimizerStates([optimizer]), OptimizerStates([other])
    optimizer.train()
    stepped(module, optimizer)
    optimizer.state[of_block(module)[0]]["wide"].fill_(1 / 3)
    torch.save(states.state_dict(), tmp_path / "own")
    groups = other.param_groups
    others.load_state_dict(torch.load(tmp_path / "own", weights_only=True))
    assert (other.calls, other.param_groups) == (1, optimizer.param_groups)
    assert other.param_groups is groups  # a wrapper may share it
    for parameter, state in optimizer.state.items():
        loaded = other.state[parameter]
        assert (loaded["step"], loaded["wide"].dtype) == (1, torch.float64)
        assert torch.equal(loaded["wide"], state["wide"])
        assert torch.equal(loaded["z"], state["z"])


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
    with pytest.raises(ValueError, match=r"'keep' begins with zeros.*'z' of Own is a copy of the weights.*'reset'"):
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


def test_parameters_of_every_number_of_dimensions_are_tried():
    """Muon steps matrices otherwise than vectors."""

    class Either(torch.optim.SGD):
        def step(self, closure=None):
            for p in (p for p in self.param_groups[0]["params"] if p.grad is not None):
                self.state[p]["matrix" if p.dim() > 1 else "vector"] = torch.zeros_like(p)

    module = small_preact()
    states = OptimizerStates([Either(module.parameters(), lr=0.1)])
    assert [tensor.dim() for tensor in states.tensors(module.parameters())] == [p.dim() for p in module.parameters()]


def test_what_a_trial_has_not_shown_is_not_sent():
    module = small_preact()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    states = OptimizerStates([optimizer])
    stepped(module, optimizer)
    optimizer.state[of_block(module)[0]]["rows"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"SGD keeps 'rows' of a parameter of shape .*use momentum='reset'"):
        states.tensors(of_block(module))


def test_an_optimizer_that_cannot_be_tried_is_named_and_can_be_reset():
    module = small_preact()
    optimizer = NeedsGraph(module.parameters(), lr=0.1)
    states = OptimizerStates([optimizer])
    optimizer.state[of_block(module)[0]]["hessian"] = torch.ones(3)
    with pytest.warns(UserWarning, match=r"what NeedsGraph keeps is not known.*trial step.*RuntimeError"):
        states.warn_about_settings("reset", 3)
    with pytest.raises(ValueError, match=r"'travel' cannot move the state of NeedsGraph.*'keep' or 'reset'"):
        states.check_travel()
    states.reset()
    assert not optimizer.state


@pytest.mark.parametrize(
    ("momentum", "said"),
    [("reset", "Own estimates d from the gradients, and momentum='reset' begins anew in every round of 3 local steps")]
    + [(m, f"Own estimates d.*momentum='{m}' lets every worker go by its own") for m in ("keep", "travel")],
)
def test_estimates_in_parameter_groups_are_named(momentum, said):
    with pytest.warns(UserWarning, match=said):
        OptimizerStates([Own(small_preact().parameters())]).warn_about_settings(momentum, 3)


def test_optimizers_of_a_library_are_tried_like_torch_s(recwarn):
    module = small_preact()
    made = [Lamb(module.parameters()), Adan(module.parameters()), Lookahead(torch.optim.AdamW(module.parameters()))]
    states = OptimizerStates(made)
    states.warn_about_settings("reset", 3)
    assert not recwarn.list
    parameter = of_block(module)[0]
    assert [len(kept.slots(0, parameter.dim())) for kept in states._tracked] == [2, 4, 0, 3]
    assert states.optimizers[2:] == [made[2], made[2]._base_optimizer]


class Talking(torch.optim.SGD):
    def step(self, closure=None):
        torch.distributed.all_reduce(torch.zeros(1))


def try_talking(worker):
    with pytest.raises(ValueError, match=r"Talking talks to other workers in its step"):
        OptimizerStates([Talking([nn.Parameter(torch.ones(2))], lr=0.1)])
    return True


def test_an_optimizer_that_communicates_is_refused():
    assert run_workers(try_talking, 2) == [True, True]
