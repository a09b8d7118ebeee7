"""Probes of an optimizer by trial steps of a twin, without touching it; and refused optimizers."""

from __future__ import annotations

import pytest
import torch
from timm.optim import Adan, Lamb, Lookahead
from torch import nn

from resist_lightning.state.optimizer_state import OptimizerStates
from tests.helpers.nets import small_preact
from tests.helpers.optimizers import Own, of_block
from tests.helpers.processes import run_workers


def test_probing_touches_neither_the_optimizer_nor_its_parameters():
    module = small_preact()
    before = [parameter.detach().clone() for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.5)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    OptimizerStates([optimizer])
    assert calls == []
    assert not optimizer.state
    assert len(optimizer.param_groups[0]["params"]) == len(before)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), before, strict=True))
    optimizer.step()
    scheduler.step()
    assert calls == [1]


def test_an_optimizer_that_flattens_all_parameters_is_refused():
    with pytest.raises(ValueError, match="LBFGS flattens all parameters"):
        OptimizerStates([torch.optim.LBFGS(small_preact().parameters())])


class MakesStateAtOnce(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["total"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter]["total"].add_(parameter.grad)


def test_an_optimizer_that_makes_its_state_when_it_is_built_is_refused():
    with pytest.raises(ValueError, match=r"MakesStateAtOnce makes its state when it is built.*'total'.*SGD or AdamW"):
        OptimizerStates([MakesStateAtOnce(small_preact().parameters())])


def test_every_parameter_group_is_probed():
    """Momentum of the second group would be lost at every hand-over, despite momentum='travel'."""
    module = small_preact()
    block = of_block(module)
    groups = [{"params": list(module.head.parameters()), "momentum": 0.0}, {"params": block, "momentum": 0.9}]
    states = OptimizerStates([torch.optim.SGD(groups, lr=0.1)])
    assert len(states.tensors(block)) == len(block)


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
    slots = states._tracked[0].findings.slots[0, (4, torch.float32)]
    assert {name: (slot.shaped, slot.dtype, slot.number, slot.copies_weights) for name, slot in slots.items()} == {
        "step": (False, torch.float64, int, False),
        "z": (True, torch.float32, None, True),
        "wide": (True, torch.float64, None, False),
    }


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float8_e4m3fn])
def test_state_of_any_data_type_is_tried(dtype):
    """Torch subtracts neither booleans nor floats of 8 bits, which ended the trial."""

    class Small(torch.optim.SGD):
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                self.state[p]["small"] = p.grad.to(dtype)

    module = small_preact()
    states = OptimizerStates([Small(module.parameters(), lr=0.1)])
    states.check_travel()
    assert {tensor.dtype for tensor in states.tensors(module.parameters())} == {dtype}


def test_parameters_that_get_no_gradients_end_no_trial():
    """Quantized layers that stay as they are, between others that train."""
    module = small_preact()
    module.packed = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    module.small = nn.Parameter(torch.zeros(3).to(torch.float8_e4m3fn))
    states = OptimizerStates([torch.optim.AdamW(module.parameters(), lr=0.1)])
    states.check_travel()
    assert states.tensors([module.packed, module.small]) == []
    assert len(states.tensors(of_block(module))) == 3 * len(of_block(module))


def test_parameters_of_every_number_of_dimensions_are_tried():
    """Muon steps matrices differently from vectors."""

    class Either(torch.optim.SGD):
        def step(self, closure=None):
            for p in (p for p in self.param_groups[0]["params"] if p.grad is not None):
                self.state[p]["matrix" if p.dim() > 1 else "vector"] = torch.zeros_like(p)

    module = small_preact()
    states = OptimizerStates([Either(module.parameters(), lr=0.1)])
    assert [tensor.dim() for tensor in states.tensors(module.parameters())] == [p.dim() for p in module.parameters()]


def test_an_optimizer_that_cannot_be_tried_is_named_and_can_be_reset():
    module = small_preact()
    optimizer = NeedsGraph(module.parameters(), lr=0.1)
    states = OptimizerStates([optimizer])
    optimizer.state[of_block(module)[0]]["hessian"] = torch.ones(3)
    with pytest.warns(UserWarning, match=r"the state of NeedsGraph is not known.*trial step.*RuntimeError"):
        states.warn_about_settings("reset", "3 local steps")
    with pytest.raises(ValueError, match=r"'travel' cannot move the state of NeedsGraph.*'keep' or 'reset'"):
        states.check_travel()
    states.reset()
    assert not optimizer.state


@pytest.mark.parametrize(
    ("momentum", "said"),
    [
        (
            "reset",
            "Own estimates d from the gradients, but momentum='reset' restarts them in every round of 3 local steps",
        )
    ]
    + [(m, f"Own estimates d.*momentum='{m}' keeps each worker's own") for m in ("keep", "travel")],
)
def test_estimates_in_parameter_groups_are_named(momentum, said):
    with pytest.warns(UserWarning, match=said):
        OptimizerStates([Own(small_preact().parameters())]).warn_about_settings(momentum, "3 local steps")


def test_optimizers_of_a_library_are_tried_like_torch_s(recwarn):
    module = small_preact()
    made = [Lamb(module.parameters()), Adan(module.parameters()), Lookahead(torch.optim.AdamW(module.parameters()))]
    states = OptimizerStates(made)
    states.warn_about_settings("reset", "3 local steps")
    assert not recwarn.list
    parameter = of_block(module)[0]
    assert [len(kept.slots(0, parameter)) for kept in states._tracked] == [2, 4, 0, 3]
    assert states.optimizers[2:] == [made[2], made[2]._base_optimizer]


class Talking(torch.optim.SGD):
    def step(self, closure=None):
        torch.distributed.all_reduce(torch.zeros(1))


def try_talking(worker):
    with pytest.raises(ValueError, match=r"Talking communicates with other workers in its step"):
        OptimizerStates([Talking([nn.Parameter(torch.ones(2))], lr=0.1)])
    return True


def test_an_optimizer_that_communicates_is_refused():
    assert run_workers(try_talking, 2) == [True, True]
