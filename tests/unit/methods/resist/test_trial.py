"""A trial runs a module with other weights, and leaves it as before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resist_lightning.methods.resist.trial import copied, is_norm, own_tensors, trial, zero_weights

CPU = torch.device("cpu")


class Counting(nn.Module):
    """Writes into a buffer and an attribute; its hook must not be called in a trial."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.dropout = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.9)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.last: Tensor | None = None
        self.hooked = 0
        self.register_forward_hook(self._count)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x
        return x + self.dropout(self.norm(self.layer(x)))

    def _count(self, *_: Any) -> None:
        self.hooked += 1


def ones(_: nn.Module, __: str, shape: torch.Size) -> Tensor:
    return torch.ones(shape)


def test_inside_it_has_other_weights_and_afterwards_its_own() -> None:
    module, x = Counting(), torch.randn(3, 4)
    before = [(name, tensor, tensor.clone()) for name, tensor in module.state_dict(keep_vars=True).items()]

    with trial(module, CPU, zero_weights):
        assert torch.equal(module(x), x)
        assert not module.layer.weight.any()

    after = module.state_dict(keep_vars=True)
    for name, tensor, value in before:
        assert after[name] is tensor
        assert torch.equal(tensor, value)
    assert module.last is None
    assert module.hooked == 0
    assert module.dropout.training
    assert len(module._forward_hooks) == 1


def test_an_error_inside_leaves_it_as_before() -> None:
    module = Counting()
    weight = module.layer.weight

    with pytest.raises(RuntimeError), trial(module, CPU, ones):
        module(torch.randn(3, 5))

    assert module.layer.weight is weight
    assert int(module.calls) == 0


def test_a_data_type_for_all_floating_tensors() -> None:
    module = Counting().double()

    with trial(module, CPU, ones, dtype=torch.float32):
        assert {tensor.dtype for tensor in module.parameters()} == {torch.float32}
        assert module.calls.dtype == torch.long

    assert module.layer.weight.dtype == torch.float64


def test_absent_tensors_are_made() -> None:
    module = Counting().to("meta")

    with trial(module, CPU, zero_weights):
        assert module(torch.ones(3, 4)).equal(torch.ones(3, 4))

    assert all(tensor.is_meta for tensor in module.parameters())


class Cache:
    """A cache of keys and values, like that of transformers."""

    def __init__(self) -> None:
        self.keys, self.length = [torch.ones(2)], 3


def test_arguments_are_copied_with_what_they_contain() -> None:
    mask, cache = torch.ones(2, dtype=torch.bool), Cache()

    (copy_, twin), named = copied(((mask, cache), {"x": torch.ones(2, dtype=torch.float64), "n": None}), torch.float32)

    assert copy_ is not mask
    assert copy_.dtype == torch.bool
    assert twin is not cache
    assert twin.keys[0] is not cache.keys[0]
    assert twin.length == 3
    assert named["x"].dtype == torch.float32
    assert named["n"] is None


def test_what_cannot_be_copied_says_so() -> None:
    with pytest.raises(TypeError, match="a generator cannot be copied"):
        copied(iterator for iterator in ())


def test_norms_are_known_by_name_and_own_tensors_are_a_layers_own() -> None:
    assert is_norm(nn.LayerNorm(4))
    assert is_norm(nn.RMSNorm(4))
    assert not is_norm(nn.Linear(4, 4))
    module = Counting()
    assert list(own_tensors(module)) == []
    assert list(own_tensors(module.layer)) == ["weight", "bias"]
