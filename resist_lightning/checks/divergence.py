"""Catches silent divergence: non-finite values before a sync, replicas that differ after one."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from resist_lightning.checks.fingerprint import describe_unequal, digest, shorten
from resist_lightning.checks.frozen_tensors import FrozenTensors
from resist_lightning.checks.hashing import SAMPLED_SHARE, Hasher, as_numbers, together
from resist_lightning.checks.header import Purpose
from resist_lightning.checks.losses import FirstBadLoss, earliest
from resist_lightning.comm.collective import Collective
from resist_lightning.comm.tensors import computable, is_continuous, named_tensors, summable
from resist_lightning.errors import NotFinite, WorkersDisagree, process_name
from resist_lightning.methods.layout import Layout
from resist_lightning.schedule.progress import Clock

MIXING = (Purpose.SYNC, Purpose.EVALUATION, Purpose.CHECKPOINT, Purpose.FINISH)
"""Purposes after which weights are averaged."""

_FROZEN_AFTER_STEPS = (
    " An optimizer has them: if it trains them, let each training step end with requires_grad=True. What is frozen "
    "when a round ends takes no outer step, its optimizer state does not travel, and inside of a block that all "
    "workers hold it is not averaged."
)


class DivergenceChecks:
    """Finds non-finite values and replicas that differ. The findings travel in headers.

    Attributes:
        left_out: workers that the last handshake left out of the means, under ``non_finite="drop"``.
        losses: locates the members of a worker in which NaN or infinity began.
        frozen: the parameters that no average includes, until the program writes them.
    """

    def __init__(self, layout: Layout, collective: Collective) -> None:
        self.left_out: tuple[int, ...] = ()
        self.losses = FirstBadLoss(watching=collective.members > 1)
        self.frozen = FrozenTensors(layout)
        self._written: list[str] = []
        self._layout = layout
        self._collective = collective
        share = SAMPLED_SHARE if layout.config.check == "sampled" else 1
        self._hasher = Hasher(share)
        self._hashes: dict[str, Tensor] = {}
        self._round = 0
        self._masks: set[str] = set()

    def begin(self) -> list[Tensor]:
        """Note masks: buffers with values, when training starts, whose sum over the workers is not finite.

        Collective: every worker must call this, in the same order.

        Returns:
            The masks, which are never checked.
        """
        present = {name: buffer for name, buffer in self._layout.module.named_buffers() if not buffer.is_meta}
        masks = [name for name, buffer in present.items() if not _has_finite_sum(buffer, self._layout.workers)]
        # Of the others too: their parts may come to this worker.
        told = self._collective.gather_bytes(json.dumps(masks).encode())
        self._masks = {name for text in told for name in json.loads(text)}
        return [buffer for name, buffer in self._layout.module.named_buffers() if name in self._masks]

    def note(self, tensors: Mapping[str, Tensor], round: int) -> None:
        """Hash tensors that a sync has just made equal everywhere; the next handshake compares them. Sends nothing."""
        self.losses.begin_round()
        if self._layout.config.check == "off" or self._collective.processes == 1:
            return
        # By the round, so that the sample takes other entries each time.
        hashes = self._hasher.hashes(tensors.values(), turn=round)
        self._hashes = dict(zip(tensors, hashes, strict=True))
        self._round = round

    def numbers(self, purpose: Purpose) -> list[float]:
        """Numbers for the others.

        These are a hash of the replicas, the place of the first non-finite tensor, a digest of the frozen ones that
        were written, and a hash of the weights that the members of a worker hold alike.
        """
        hashed = as_numbers([together(list(self._hashes.values()))]) if self._hashes else [0.0]
        # Where nothing is averaged, neither could spread, and a search reads all tensors.
        mixing = purpose in MIXING
        self._written = self.frozen.written() if mixing else []
        not_finite = float(self._first_not_finite() if mixing else 0)
        return [*hashed, not_finite, _number_of(self._written), self._hash_of_members() if mixing else 0.0]

    def judge(self, numbers: Sequence[Sequence[float]], clock: Clock) -> None:
        """Compare the :meth:`numbers` of all workers, in order.

        Collective: every worker must call this, in the same order; it sends something only if hashes differ, if
        workers have written different frozen tensors, or if a worker of several members is not finite.

        Raises:
            WorkersDisagree: naming tensors that the last sync left unequal, or the members of a worker that differ.
            NotFinite: naming the first tensor of a worker that is not finite.
        """
        self._judge_members([of_members for *_, of_members in numbers])
        if len({hashed for hashed, *_ in numbers}) > 1:
            rows = self._collective.gather_numbers(as_numbers(self._hashes.values()))
            raise WorkersDisagree(
                f"after the sync into round {self._round}, tensors that must be equal on all workers differ: "
                f"{describe_unequal(list(self._hashes), rows, self._collective.members)}. Likely causes: faulty memory "
                "or network, code that writes to tensors while a sync runs, or builds of torch that compute "
                "differently. Resume from the last checkpoint saved before that round, which is not affected."
            )
        self._agree_on_written({written for _, _, written, _ in numbers})
        found = {rank: int(first) for rank, (_, first, *_) in enumerate(numbers) if first}
        workers_with = {rank // self._collective.members for rank in found}
        self.left_out = ()
        if not found:
            return
        found = self._where_it_began(found)
        # If all were left out, there would be nothing to take a mean of.
        if self._layout.config.non_finite == "raise" or len(workers_with) == self._collective.workers:
            raise NotFinite(self._describe(found, clock) + self._way_out())
        self.left_out = tuple(sorted(workers_with))
        if self._collective.rank == 0:
            warnings.warn(f"{self._describe(found, clock)} Left out of this round.", stacklevel=5)

    def _hash_of_members(self) -> float:
        """Hash of this worker's weights, which its members hold alike; 0 with one member, or without checks."""
        if self._collective.members == 1 or self._layout.config.check == "off":
            return 0.0
        hashes = self._hasher.hashes(self._weights().values(), turn=self._round)
        return as_numbers([together(hashes)])[0] if hashes else 0.0

    def _weights(self) -> dict[str, Tensor]:
        """The trainable parameters that this worker holds now."""
        named = self._layout.module.named_parameters()
        return {name: parameter for name, parameter in named if parameter.requires_grad and not parameter.is_meta}

    def _judge_members(self, hashes: Sequence[float]) -> None:
        for worker, of_worker in enumerate(self._collective.by_worker(hashes)):
            if len(set(of_worker)) > 1:
                first = worker * self._collective.members
                ranks = ", ".join(str(first + member) for member in range(self._collective.members))
                raise WorkersDisagree(
                    f"the members of worker {worker} (ranks {ranks}) hold different weights ({self._unequal(worker)}), "
                    "and would each send a part of them. Nothing was averaged. Likely causes: code that changes "
                    "weights or gradients on one rank only, parameters that are frozen on one rank only or within "
                    "training_step, optimizer steps outside of training_step, or a forward that bypassed "
                    "engine.replicas.call() in a plain loop."
                )

    def _unequal(self, worker: int) -> str:
        """Names of weights that differ between the members of a worker. Collective: every worker must call this."""
        own = self._weights()
        hashes = dict(zip(own, as_numbers(self._hasher.hashes(own.values(), turn=self._round)), strict=True))
        texts = self._collective.gather_bytes(json.dumps(hashes).encode())
        of_members = [json.loads(text) for text in self._collective.by_worker(texts)[worker]]
        names = [name for name, value in of_members[0].items() if any(each.get(name) != value for each in of_members)]
        return shorten(names)

    def _agree_on_written(self, digests: set[float]) -> None:
        """Average frozen tensors that some worker has written, from now on; else they would diverge in silence."""
        if digests == {0.0}:
            return
        written = set(self._written)
        if len(digests) > 1:
            for text in self._collective.gather_bytes(json.dumps(self._written).encode()):
                written.update(json.loads(text))
        self._layout.written |= written
        if self._collective.rank == 0:
            size = sum(self._layout.shared[name].nbytes for name in written)
            others = f" and {len(written) - 1} others" if len(written) > 1 else ""
            optimized = {id(self._layout.shared[name]) for name in written}.intersection(self._layout.trained or ())
            warnings.warn(
                f"{min(written)}{others}: frozen, but overwritten by the program (a moving average?). The workers "
                f"average them from now on, which adds {size / 1e6:.3g} MB to what every sync averages."
                f"{_FROZEN_AFTER_STEPS if optimized else ''}",
                stacklevel=5,
            )

    def _first_not_finite(self) -> int:
        """Place of the first tensor that is not finite, counted from 1; 0 if there is none. Skips absent ones."""
        names = self._layout.changing() - self._masks
        checked = {id(tensor) for name, tensor in named_tensors(self._layout.module).items() if name in names}
        candidates = []
        for place, tensor in enumerate(self._layout.tensors.at_start().values(), start=1):
            if id(tensor) in checked and not tensor.is_meta and is_continuous(tensor.dtype):
                candidates.append((place, tensor.detach()))
        doubtful = _sums_not_finite([tensor for _, tensor in candidates])
        for (place, tensor), doubt in zip(candidates, doubtful, strict=True):
            # A sum of finite entries can overflow, so a doubtful tensor is read once more, entry by entry.
            if doubt and not _finite(tensor):
                return place
        return 0

    def _where_it_began(self, found: Mapping[int, int]) -> dict[int, int]:
        """The part of ``found``, by rank, with the members whose loss was the first non-finite one of their worker.

        Collective where workers have several members: every worker must call this.
        """
        if self._collective.members == 1:
            return dict(found)
        rows = self._collective.gather_numbers([self.losses.step])
        began: dict[int, int] = {}
        for worker, of_worker in enumerate(self._collective.by_worker(rows)):
            first = worker * self._collective.members
            ranks = [rank for rank in found if rank // self._collective.members == worker]
            sources = [first + member for member in earliest([int(step) for (step,) in of_worker])]
            began |= {rank: found[rank] for rank in ranks if rank in sources or not set(ranks) & set(sources)}
        return began

    def _describe(self, found: Mapping[int, int], clock: Clock) -> str:
        names = list(self._layout.tensors.at_start())
        places = []
        for rank, first in found.items():
            who = process_name(rank, self._collective.members)
            places.append(f"{who} in {self._layout.describe_tensor(names[first - 1])}")
        everywhere = len({rank // self._collective.members for rank in found}) == self._collective.workers
        who = "all workers have" if everywhere else "there is"
        where = f"after local step {clock.step} of round {clock.round}"
        return f"{who} NaN or infinity {where}: {', '.join(places)}.{self._spread()}"

    def _spread(self) -> str:
        """A sentence on how NaN or infinity spreads to a worker's other members; empty if it has one."""
        if self._collective.members == 1:
            return ""
        return (
            " The members of a worker average their gradients in every step, so it has spread from those named here to "
            "the others."
        )

    def _way_out(self) -> str:
        if not self._layout.config.trains_alone:
            return f" Stages exchange messages in every step, so it may have spread to other workers. {_CAUSES}."
        return (
            f" Nothing was averaged, so it has not spread to other workers. {_CAUSES}; non_finite='drop' leaves such a "
            "worker out of a round, as long as another worker has none."
        )


_CAUSES = (
    "Likely causes: a learning rate that is too high, a bad batch, overflow in 16 bits. Fix the cause and resume from "
    "the last checkpoint"
)


def _number_of(names: Sequence[str]) -> float:
    """A digest of names; 0 for none."""
    return float(digest({"written": dict.fromkeys(names, "")})) if names else 0.0


def _finite(tensor: Tensor) -> bool:
    return bool(computable(tensor).isfinite().all())


def _has_finite_sum(tensor: Tensor, workers: int) -> bool:
    """Whether ``workers`` copies of a tensor have a finite sum."""
    if not is_continuous(tensor.dtype):
        return True
    return _finite(summable(tensor) * workers)


def _sums_not_finite(tensors: Sequence[Tensor]) -> list[bool]:
    """Whether each tensor's sum is NaN or infinite: always where an entry is. Reads every entry once, makes no copy."""
    if not tensors:
        return []
    numbers = map(computable, tensors)
    # In float32 at least: a sum of many finite 16-bit numbers overflows.
    sums = [tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)) for tensor in numbers]
    not_finite = [value.isfinite().logical_not() for value in sums]
    # One transfer from a GPU for all of them.
    found: list[bool] = torch.stack(not_finite).tolist()
    return found
