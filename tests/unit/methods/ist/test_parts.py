"""Parts of divided tensors that are sent together."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from resist_lightning.methods.ist.network.neurons import Cut
from resist_lightning.methods.ist.parts import in_groups
from resist_lightning.methods.ist.pieces import Part


@given(st.lists(st.tuples(st.integers(1, 9), st.sampled_from([torch.float32, torch.float64])), min_size=1))
def test_a_group_is_no_larger_than_the_largest_tensor_and_none_could_be_joined_to_the_next_one(tensors):
    parts = {}
    for number, (rows, dtype) in enumerate(tensors):
        parts[str(number)] = Part(Cut(0, None), (rows, 3), 0, torch.empty(0, dtype=dtype))
    groups = list(in_groups(parts))
    assert [name for group in groups for name in group] == list(parts)
    sizes = [sum(part.whole[0] * part.tensor.element_size() for part in group.values()) for group in groups]
    largest = max(part.whole[0] * part.tensor.element_size() for part in parts.values())
    assert max(sizes) == largest
    for group, size in zip(groups[1:], sizes, strict=False):
        first = next(iter(group.values()))
        assert size + first.whole[0] * first.tensor.element_size() > largest
