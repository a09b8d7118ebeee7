"""Values after a wire of fewer bits, and the bytes of its messages."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from resist_lightning.comm import quantize
from resist_lightning.comm.byte_formulas import WIRE_FORMATS
from resist_lightning.comm.quantize import arrange, make_quantizer, noise_for

CPU = torch.device("cpu")
NAMES = ("bf16", "int8", "int6", "int4")


def values(entries, seed=0, scale=1.0):
    return scale * torch.randn(entries, generator=torch.Generator().manual_seed(seed))


def half_step(name, x):
    """Upper bound of the error of rounding to nearest, entry by entry, by hand."""
    if name == "bf16":
        return x.abs() * 2.0**-8
    groups = torch.nn.functional.pad(x, (0, -len(x) % 256)).view(-1, 256)
    levels = {"int8": 127, "int6": 31, "int4": 7}[name]
    return (groups.abs().amax(1, keepdim=True) / levels / 2).expand_as(groups).flatten()[: len(x)]


@examples(max_examples=40)
@given(st.sampled_from(NAMES), st.integers(0, 1000), st.integers(0, 5), st.sampled_from([1e-6, 1.0, 1e4]))
def test_rounding_to_the_nearest_errs_by_half_a_step_at_most(name, entries, seed, scale):
    x = values(entries, seed, scale)
    wire = make_quantizer(name)
    message = wire.encode(x)
    assert message.dtype == torch.uint8
    assert len(message) == WIRE_FORMATS[name].bytes(entries)
    error = (wire.decode(message, entries) - x).abs()
    assert bool((error <= half_step(name, x) * (1 + 1e-4) + 1e-30).all())


@pytest.mark.parametrize("name", NAMES)
def test_rounding_at_random_errs_by_less_than_a_step_and_is_right_on_average(name):
    x = values(512)
    wire = make_quantizer(name)
    seen = torch.stack([wire.through(x, noise_for(0, round, 0, 0, CPU)) for round in range(2000)])
    step = 2 * half_step(name, x)
    assert bool(((seen - x).abs() <= step * (1 + 1e-4)).all())
    mean_error = (seen.double().mean(0) - x).abs() / step
    assert mean_error.max() < 0.5 / 2000**0.5 * 5  # five standard errors of a fair coin
    assert seen.std(0).max() > 0


@pytest.mark.parametrize("name", NAMES)
def test_the_default_data_type_changes_nothing(name):
    x, wire = values(300), make_quantizer(name)
    expected = wire.through(x, noise_for(0, 0, 0, 0, CPU))
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(wire.through(x, noise_for(0, 0, 0, 0, CPU)), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_what_came_out_once_comes_out_the_same_again(name):
    once = make_quantizer(name).through(values(1000))
    torch.testing.assert_close(make_quantizer(name).through(once), once, rtol=1e-6, atol=0)


def test_noise_depends_on_seed_round_block_and_worker_and_moves_no_other_generator():
    before = torch.get_rng_state()
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    draws = [torch.rand(4, generator=noise_for(*key, CPU)) for key in keys]
    assert torch.equal(draws[0], torch.rand(4, generator=noise_for(*keys[0], CPU)))
    assert len({tuple(draw.tolist()) for draw in draws}) == len(keys)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zeros_and_what_is_not_a_number_is_seen(name):
    wire = make_quantizer(name)
    assert wire.through(torch.zeros(300)).tolist() == [0.0] * 300
    broken = wire.through(torch.cat([values(300), torch.tensor([float("nan")])]))
    assert broken[-1].isnan()
    assert bool(broken[:256].isfinite().all())


@pytest.mark.parametrize("name", NAMES)
def test_other_data_types_are_sent_too(name):
    x = values(256).double()
    torch.testing.assert_close(make_quantizer(name).through(x), make_quantizer(name).through(x.float()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("entries", [1, 511, 512, 513, 2000])
def test_pieces_change_no_bit_of_a_message(monkeypatch, name, entries):
    wire, x = make_quantizer(name), values(entries)
    whole = [wire.encode(x), wire.encode(x, noise_for(0, 0, 0, 0, CPU))]
    decoded = wire.decode(whole[0], entries)
    monkeypatch.setattr(quantize, "_PIECE_ENTRIES", 512)
    assert torch.equal(wire.encode(x), whole[0])
    assert torch.equal(wire.encode(x, noise_for(0, 0, 0, 0, CPU)), whole[1])
    assert torch.equal(wire.decode(whole[0], entries), decoded)


def test_two_bits_are_four_values_of_which_each_is_half_a_step_off_at_most_but_for_the_largest():
    wire = make_quantizer("int2")
    x = values(1200, scale=1e-3)
    y = wire.through(x)
    for group in (slice(0, 512), slice(512, 1024), slice(1024, 1200)):
        step = x[group].square().mean().sqrt()
        known = torch.tensor([-1.5, -0.5, 0.5, 1.5]) * step
        error = (x[group] - y[group]).abs()
        assert bool((error <= (x[group, None] - known).abs().amin(1) * (1 + 1e-4) + 1e-9).all())
        # The least loss of normally distributed numbers with four equidistant values: 0.119 of their square.
        assert error.square().mean() / step.square() < 0.14
    assert wire.through(torch.zeros(700)).tolist() == [0.0] * 700


@pytest.mark.parametrize("groups", [1, 2, 7])
def test_a_scale_does_not_depend_on_how_many_groups_are_encoded_at_once(groups):
    wire = make_quantizer("int2")
    x = values(7 * 512)
    apart = torch.cat([wire.encode(part) for part in x.split(groups * 512)])
    assert torch.equal(apart, wire.encode(x))


def test_messages_have_matrices_first_and_keep_the_order_otherwise():
    vector, matrix, scalar, filter = torch.zeros(3), torch.zeros(2, 2), torch.zeros(()), torch.zeros(1, 1, 3, 3)
    arranged = arrange([vector, matrix, scalar, filter])
    assert [id(t) for t in arranged] == [id(t) for t in (matrix, filter, vector, scalar)]


def test_the_bytes_of_a_message_of_two_bits_written_out():
    """A scale, then codes 0 to 3 for -1.5, -0.5, 0.5 and 1.5 steps, four to a byte, the first one lowest."""
    x = torch.tensor([2.0, -2.0, 0.5, -0.5] * 128)
    message = make_quantizer("int2").encode(x)
    scale = message[:4].view(torch.float32)
    assert scale.item() == pytest.approx(((4 + 0.25) / 2) ** 0.5)
    assert set(message[4:].tolist()) == {0b01_10_00_11}
    expected = torch.tensor([1.5, -1.5, 0.5, -0.5] * 128) * scale
    assert torch.equal(make_quantizer("int2").decode(message, 512), expected)


def test_fp32_needs_no_wire():
    assert make_quantizer("fp32") is None


@pytest.mark.parametrize(
    ("name", "first", "message"),
    [
        ("int8", [127.0, -127.0, 0.0, 5.0], "0000803f" + "fe007f84" + "7f" * 252),
        ("int6", [31.0, -31.0, 0.0, 5.0, 0.0, 0.0, 0.0, 0.0], "0000803f" + "3ef091dff77d" + "dff77ddff77d" * 31),
        ("int4", [7.0, -7.0, 0.0, 3.0], "0000803f" + "0ea7" + "77" * 126),
        ("bf16", [1.0, -2.0], "803f00c0" + "0000" * 254),
    ],
)
def test_the_bytes_of_a_message_written_out(name, first, message):
    """A scale of 1.0 as float32, then each value plus the largest code, the lowest bits first."""
    x = torch.tensor([*first, *[0.0] * (256 - len(first))])
    assert bytes(make_quantizer(name).encode(x).tolist()).hex() == message
    assert torch.equal(
        make_quantizer(name).decode(torch.tensor(list(bytes.fromhex(message)), dtype=torch.uint8), 256), x
    )
