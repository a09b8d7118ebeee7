"""Quantizes parameters to bfloat16 or 4 to 8 bits for sending, and back (supplement A.5 of the paper).

Groups of 256 entries share a scale, the largest magnitude among them. What workers *changed* is rounded to the nearest
value: it shrinks with the learning rate, and the steps of the grid with it. A block goes to a worker that knows nothing
of it, so its values themselves are sent; they are rounded up or down at random, right on average, since otherwise
changes smaller than half a step would never arrive (docs/decisions/0008-fewer-bits.md).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from resist_lightning.comm.byte_formulas import WIRE_FORMATS, WireFormat

_PACKED_ENTRIES = 8  # eight entries of b bits are b bytes


class Quantizer:
    """Encodes and decodes flat tensors."""

    def __init__(self, format: WireFormat) -> None:
        self.format = format

    def encode(self, values: Tensor, noise: torch.Generator | None = None) -> Tensor:
        """The message for some values: bytes, flat.

        Args:
            values: flat, floating point.
            noise: for rounding up or down at random; None rounds to the nearest.
        """
        values = values.float()
        if not len(values):
            return torch.empty(0, dtype=torch.uint8, device=values.device)
        if self.format.scale_bytes == 0:
            return _to_bfloat16(values, noise).view(torch.uint8)
        # The last group is filled up with zeros, which change no scale.
        padding = self.format.groups(len(values)) * self.format.group - len(values)
        padded = torch.nn.functional.pad(values, (0, padding))
        grouped = padded.view(-1, self.format.group)
        largest = self._largest_code
        scale = grouped.abs().amax(1, keepdim=True) / largest
        # A group of zeros has no scale: its entries would become NaN.
        factor = torch.where(scale > 0, scale.reciprocal(), 0.0)
        steps = grouped * factor
        # Rounding down afterwards gives the nearest, or, after adding noise, the value on average.
        steps += 0.5 if noise is None else torch.rand(steps.shape, generator=noise, device=steps.device)
        # Codes are not negative, as they are packed without a sign.
        codes = steps.floor_().add_(largest).clamp_(0, 2 * largest)
        packed = _pack(codes.to(torch.uint8), self.format.bits)
        return torch.cat([scale.view(torch.uint8), packed], 1).flatten()

    def decode(self, message: Tensor, entries: int) -> Tensor:
        """The values of a message, as float32."""
        if not entries:
            return torch.empty(0, device=message.device)
        if self.format.scale_bytes == 0:
            return message.view(torch.bfloat16)[:entries].float()
        grouped = message.view(-1, self.format.group_bytes)
        scale_bytes = self.format.scale_bytes
        scale = grouped[:, :scale_bytes].contiguous().view(torch.float32)
        codes = _unpack(grouped[:, scale_bytes:].contiguous(), self.format.bits)
        values = codes.float().sub_(self._largest_code).mul_(scale)
        return values.flatten()[:entries]

    def through(self, values: Tensor, noise: torch.Generator | None = None) -> Tensor:
        """What a receiver makes of some values."""
        return self.decode(self.encode(values, noise), len(values))

    @property
    def _largest_code(self) -> int:
        # Symmetric, so that zero is a code of its own and stays zero.
        return int(2 ** (self.format.bits - 1) - 1)


def make_quantizer(name: str) -> Quantizer | None:
    """The quantizer of that name; None for ``fp32``, with which tensors travel as they are."""
    chosen = WIRE_FORMATS[name]
    return Quantizer(chosen) if chosen is not None else None


def noise_for(seed: int, round: int, block: int, worker: int, device: torch.device) -> torch.Generator:
    """The random numbers with which a worker rounds a block that it sends. No other generator is read or moved."""
    digest = hashlib.sha256(f"wire {seed} {round} {block} {worker}".encode()).digest()
    noise_seed = int.from_bytes(digest[:8], "big") >> 1
    return torch.Generator(device).manual_seed(noise_seed)


def compressible(tensor: Tensor) -> bool:
    """Whether a tensor is compressed: trainable parameters. A frozen one must stay as it is, and buffers are small."""
    return tensor.requires_grad and tensor.is_floating_point()


def arrange(tensors: Iterable[Tensor]) -> list[Tensor]:
    """In the order of the message: matrices, then vectors, so that few groups hold entries of both."""
    return sorted(tensors, key=lambda tensor: tensor.dim() < 2)


def _to_bfloat16(values: Tensor, noise: torch.Generator | None) -> Tensor:
    if noise is None:
        return values.bfloat16()
    # The lower half of a float32 is what bfloat16 drops: adding any 16 bits to it carries over in proportion.
    bits = values.view(torch.int32)
    more = torch.randint(0, 2**16, bits.shape, generator=noise, device=bits.device, dtype=torch.int32)
    rounded = ((bits + more) & -(2**16)).view(torch.float32)
    # The carry could turn NaN into a number.
    return torch.where(values.isfinite(), rounded, values).bfloat16()


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Write eight codes of ``bits`` bits into as many bytes, by way of one 64-bit word."""
    if bits == 8:
        return codes
    places = torch.arange(_PACKED_ENTRIES, device=codes.device) * bits
    eights = codes.view(len(codes), -1, _PACKED_ENTRIES)
    words = (eights.long() << places).sum(2)
    byte_places = torch.arange(bits, device=codes.device) * 8
    packed = (words.unsqueeze(2) >> byte_places) & 255
    return packed.byte().flatten(1)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """Undo :func:`_pack`."""
    if bits == 8:
        return packed
    byte_places = torch.arange(bits, device=packed.device) * 8
    grouped = packed.view(len(packed), -1, bits)
    words = (grouped.long() << byte_places).sum(2)
    places = torch.arange(_PACKED_ENTRIES, device=packed.device) * bits
    codes: Tensor = (words.unsqueeze(2) >> places) & (2**bits - 1)
    return codes.flatten(1)
