"""Compiled code is found in all forms, and is disabled while it is held back."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.compile import from_compiled
from torch import nn

from resist_lightning.state.compiled import CompiledCall, compiled_around, is_compiled


class Compiled(nn.Module):
    @torch.compile(backend="eager")
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Disabled(nn.Identity):
    def __init__(self) -> None:
        super().__init__()
        self.forward = torch.compiler.disable(super().forward)


def in_place() -> nn.Module:
    net = nn.Linear(2, 2)
    net.compile(backend="eager")
    return net


FORMS = {
    "in place": in_place,
    "a wrapper": lambda: torch.compile(nn.Linear(2, 2), backend="eager"),
    "its forward": Compiled,
    "by Lightning": lambda: from_compiled(torch.compile(L.LightningModule(), backend="eager")),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_is_compiled_is_found_around_a_module(form):
    net = FORMS[form]()
    net.inside = nn.Sequential(nn.Identity())
    assert is_compiled(net)
    whole = nn.Sequential(net)
    assert compiled_around(whole, "0.inside.0") == "0"
    assert compiled_around(net, "inside") == ""
    assert compiled_around(whole, "0") is None, "a module is not around itself"


def test_what_is_not_compiled_is_not_found():
    assert not is_compiled(nn.Linear(2, 2))
    assert not is_compiled(Disabled())


def test_code_rests_until_nobody_holds_it_back():
    net = in_place()
    code = net._compiled_call_impl
    call = CompiledCall(net)
    call.hold_back("absent")
    call.hold_back("not seen")
    call.release("absent")
    assert net._compiled_call_impl is None
    call.release("absent")
    assert net._compiled_call_impl is None
    call.release("not seen")
    assert net._compiled_call_impl is code
    call.hold_back("absent")
    assert net._compiled_call_impl is None
    plain = nn.Linear(2, 2)
    CompiledCall(plain).release("absent")
    assert plain._compiled_call_impl is None
