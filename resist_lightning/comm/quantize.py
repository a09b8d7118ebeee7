"""Quantizes parameters to bfloat16 or 2 to 8 bits for sending, and back (supplement A.5 of the paper).

All is computed in float32, by name: the default data type belongs to the whole process, and while a sync runs beside
the training, a step in Lightning's ``64-true`` or ``bf16-true`` sets another one.

Groups of entries share a scale: with 4 to 8 bits the largest magnitude among 256, with 2 bits the root mean square of
512. *Changes* are rounded to the nearest value: they shrink with the learning rate, and the steps of the grid with
them. A block goes to a worker that has no earlier values of it, so its values themselves are sent, rounded up or down
at random (unbiased), since otherwise changes smaller than half a step would never arrive
(docs/decisions/0008-fewer-bits.md).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from resist_lightning.comm.byte_formulas import WIRE_FORMATS, WireFormat

# Entries encoded or decoded at once. Intermediate values stay in a CPU's cache; a GPU wants large kernels.
_PIECE_ENTRIES = 2**18
_PIECE_ENTRIES_ON_DEVICE = 2**24


class Quantizer:
    """Encodes and decodes flat tensors, piece by piece, so that neither needs memory of the size of the message."""

    def __init__(self, format: WireFormat) -> None:
        self.format = format
        # Symmetric, so that zero is a code of its own and stays zero; of four codes that would waste one.
        self._last_code = 3 if format.bits == 2 else int(2**format.bits - 2)
        self._zero = self._last_code / 2

    @property
    def for_values(self) -> Quantizer:
        """The quantizer of handed-over blocks."""
        return Quantizer(self.format.for_values)

    @property
    def for_vectors(self) -> Quantizer | None:
        """The quantizer of averaged vectors; None if they share the message of the matrices."""
        return Quantizer(self.format.vectors) if self.format.vectors is not None else None

    def encode(self, values: Tensor, noise: torch.Generator | None = None) -> Tensor:
        """Encode values into a message: bytes, flat.

        Args:
            values: flat, floating point.
            noise: for rounding up or down at random; None rounds to the nearest.
        """
        message = torch.empty(self.format.bytes(len(values)), dtype=torch.uint8, device=values.device)
        groups = message.view(-1, self.format.group_bytes)
        piece = piece_entries(values.device)
        for part, target in zip(values.split(piece), groups.split(piece // self.format.group), strict=True):
            self.encode_into(target, part, noise)
        return message

    def encode_into(self, groups: Tensor, values: Tensor, noise: torch.Generator | None = None) -> None:
        """Encode a few values into rows of a message.

        Args:
            groups: bytes, a row for each group.
            values: flat; the last group is filled up with zeros, which change no scale.
            noise: as for :meth:`encode`.
        """
        if not len(values):
            return
        values = values.float()
        if self.format.scale_bytes == 0:
            numbers = values if self.format.bits == 32 else _to_bfloat16(values, noise)
            groups.copy_(numbers.view(torch.uint8).view(groups.shape))
            return
        padding = groups.shape[0] * self.format.group - len(values)
        if padding:
            values = torch.nn.functional.pad(values, (0, padding))
        grouped = values.view(-1, self.format.group)
        scale = self._scale(grouped, padding)
        # A group of zeros has no scale: its entries would become NaN.
        factor = torch.where(scale > 0, scale.reciprocal(), 0.0)
        steps = grouped * factor
        # Rounding down afterwards gives the nearest, or, after adding noise, the value on average.
        if noise is None:
            steps += 0.5
        else:
            steps += torch.rand(steps.shape, generator=noise, dtype=steps.dtype, device=steps.device)
        # Codes are not negative, as they are packed without a sign.
        whole, half = divmod(self._zero, 1)
        if half:
            steps += half
        codes = steps.floor_().add_(whole).clamp_(0, self._last_code)
        groups[:, : self.format.scale_bytes] = scale.view(torch.uint8)
        # By way of int32: torch converts floats to bytes one by one.
        groups[:, self.format.scale_bytes :] = _pack(codes.int().byte(), self.format.bits)

    def decode(self, message: Tensor, entries: int) -> Tensor:
        """The values of a message, as float32."""
        values = torch.empty(entries, dtype=torch.float32, device=message.device)
        groups = message.view(-1, self.format.group_bytes)
        piece = piece_entries(message.device)
        for target, part in zip(values.split(piece), groups.split(piece // self.format.group), strict=True):
            self.decode_into(target, part)
        return values

    def decode_into(self, values: Tensor, groups: Tensor) -> None:
        """Decode a few groups; of the last one, as many values as still fit.

        Args:
            values: float32, flat.
            groups: bytes, a row for each group.
        """
        if not len(values):
            return
        if self.format.scale_bytes == 0:
            values.copy_(groups.flatten().view(torch.float32 if self.format.bits == 32 else torch.bfloat16))
            return
        scale = groups[:, : self.format.scale_bytes].contiguous().view(torch.float32)
        codes = _unpack(groups[:, self.format.scale_bytes :], self.format.bits)
        whole = len(values) == codes.numel()
        decoded = values.view(codes.shape) if whole else torch.empty_like(codes, dtype=torch.float32)
        decoded.copy_(codes).sub_(self._zero).mul_(scale)
        if not whole:
            values.copy_(decoded.flatten()[: len(values)])

    def through(self, values: Tensor, noise: torch.Generator | None = None) -> Tensor:
        """The values as a receiver decodes them."""
        return self.decode(self.encode(values, noise), len(values))

    def _scale(self, grouped: Tensor, padding: int) -> Tensor:
        """The step of each group, the last of which ends with ``padding`` zeros."""
        if self._last_code > 3:
            return grouped.abs().amax(1, keepdim=True) / self._zero
        # In halves: a sum in any other order would depend on how many groups are summed at once.
        squares = grouped * grouped
        while squares.shape[1] > 1:
            left, right = squares.chunk(2, 1)
            squares = left + right
        squares /= self.format.group
        if padding:
            squares[-1] *= self.format.group / (self.format.group - padding)
        # For normally distributed numbers this step has the smallest error.
        return squares.sqrt_()


def piece_entries(device: torch.device) -> int:
    """Number of entries to encode or decode at once: whole groups of any format."""
    return _PIECE_ENTRIES if device.type == "cpu" else _PIECE_ENTRIES_ON_DEVICE


def make_quantizer(name: str, *, feedback: bool = True) -> Quantizer | None:
    """The quantizer of that name; None for ``fp32``, with which tensors travel as they are.

    Args:
        name: of the format.
        feedback: whether a format that has error feedback uses it.
    """
    chosen = WIRE_FORMATS[name]
    if chosen is None:
        return None
    return Quantizer(replace(chosen, feedback=chosen.feedback and feedback))


def noise_for(seed: int, round: int, block: int, worker: int, device: torch.device) -> torch.Generator:
    """The random generator for rounding a block that a worker sends. No other generator is read or advanced."""
    digest = hashlib.sha256(f"wire {seed} {round} {block} {worker}".encode()).digest()
    noise_seed = int.from_bytes(digest[:8], "big") >> 1
    return torch.Generator(device).manual_seed(noise_seed)


def compressible(tensor: Tensor) -> bool:
    """Whether a tensor is compressed: trainable parameters. A frozen one must stay as it is, and buffers are small."""
    return tensor.requires_grad and tensor.is_floating_point() and tensor.element_size() > 1


def arrange(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Tensors in the order of the message: matrices, then vectors, so that few groups hold entries of both."""
    return sorted(tensors, key=is_vector)


def is_vector(tensor: Tensor) -> bool:
    """Whether a tensor is a bias, a weight of a norm or the like: small, with values unlike those of matrices."""
    return tensor.dim() < 2


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
    """Pack the codes of each row one behind the other, of ``bits`` bits each, the lowest first.

    ::

        four codes of a byte each    ......33 ......22 ......11 ......00    an int32 (here of two bits)
        behind one another           ........ ........ ........ 33221100    its first bytes
    """
    if bits == 8:
        return codes
    words = codes.view(torch.int32)
    packed = torch.zeros_like(words)
    for place in range(4):
        packed |= (words >> place * (8 - bits)) & _mask(place * bits, bits)
    return packed.view(torch.uint8).view(len(codes), -1, 4)[..., : bits // 2].flatten(1)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """Undo :func:`_pack`."""
    if bits == 8:
        return packed
    words = packed.new_zeros(len(packed), packed.shape[1] // (bits // 2), 4)
    words[..., : bits // 2] = packed.view(len(packed), -1, bits // 2)
    four = words.view(torch.int32).squeeze(2)
    codes = torch.zeros_like(four)
    for place in range(4):
        codes |= (four & _mask(place * bits, bits)) << place * (8 - bits)
    return codes.view(torch.uint8)


def _mask(place: int, bits: int) -> int:
    """A word in which only ``bits`` bits from a place on are set."""
    return int(2**bits - 1) << place
