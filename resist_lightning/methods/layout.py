"""The interface of a layout: how a method divides a model among the workers in each round."""

from __future__ import annotations

import hashlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from resist_lightning.comm.byte_formulas import local_sgd_bytes
from resist_lightning.comm.collective import Collective
from resist_lightning.comm.tensors import KnownTensors, averaged_bytes_by_type, check_tensors
from resist_lightning.methods.config import CommonConfig
from resist_lightning.schedule.overlap import ALL_WAIT, Overlaps
from resist_lightning.schedule.progress import Clock
from resist_lightning.state.batch_norm import norms_with_statistics
from resist_lightning.state.companion import Companion


class Scaling:
    """The test-time scale, by which the full model differs from the weights in training: none in most methods.

    Attributes:
        scale: the factor.
    """

    scale: float = 1.0

    def apply(self) -> dict[str, Tensor]:
        """Scale the assembled weights, or outputs by hooks.

        Returns:
            Copies, by name, of the tensors that dividing by the scale would not restore bit for bit.
        """
        return {}

    def take_off(self) -> None:
        """Remove the hooks of :meth:`apply`; the caller restores the weights."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that the last :meth:`apply` has multiplied, by name."""
        return {}

    def tensors_of(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """The tensors that the scale multiplies in a saved full model, by name."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """State for :meth:`undo` of a saved full model, without the copies."""
        return {"scale": self.scale, "blocks": [], "hooked": []}

    def undo(self, state: Mapping[str, Any], only: Collection[str] | None) -> None:
        """Turn the weights of a saved full model back into weights to train, exactly.

        Args:
            state: from :meth:`state_dict`, with the copies as ``originals``.
            only: names of the tensors to treat; None for all.
        """


class LayoutAbilities:
    """Optional abilities of a layout; each does nothing until a method overrides it."""

    scaling = Scaling()

    def prepare(self, example: Tensor, collective: Collective) -> None:
        """Inspect an example batch of the network's input before training starts.

        Collective: every worker must call this, in the same order.
        """

    total_steps: int | None = None
    """Local steps of the run, where the division depends on them."""

    def plan_end(self, clock: Clock, total_steps: int | None) -> None:
        """Plan for the length of the run, before training starts; all workers must give the same.

        Args:
            clock: the position in the run.
            total_steps: local steps from its beginning to its end; None if that is not known.

        Raises:
            ValueError: if it is not known and the division depends on it.
        """

    def fits_only_some(self) -> str:
        """A setting that does not fit every number of workers, and one that does, in words; empty if there is none."""
        return ""

    fragment_count = 1
    """Number of fragments, one of which each sync covers."""

    def without_effect(self, clock: Clock, steps: int) -> list[str]:
        """Warnings of settings for which the training is too short.

        Args:
            clock: the position at which the training begins.
            steps: number of its local steps.
        """
        return []

    @property
    def overlaps(self) -> Overlaps:
        """The overlap of each round: the local steps during which its sync runs."""
        return ALL_WAIT

    def overlapped_steps(self, round: int) -> int:
        """Local steps at the end of ``round`` during which its sync is under way; 0: the training waits for it."""
        return self.overlaps.of_round(round)

    def stepped_late(self) -> Collection[int]:
        """Ids of the parameters whose steps take gradients of earlier batches."""
        return ()

    def learn(self, round: int, step_seconds: Sequence[float], sync_seconds: Sequence[float]) -> None:
        """Take in the measurements of a round that ends; all workers must give the same.

        Args:
            round: the round that ends.
            step_seconds: each worker's seconds per local step in it; 0 if it took none.
            sync_seconds: each worker's seconds of the sync before it; 0 if it did not wait for one.
        """

    def state_dict(self) -> dict[str, Any]:
        """Measurements that the division depends on, as plain data for a checkpoint; empty if there are none."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], round: int) -> None:
        """Resume in ``round`` from a :meth:`state_dict`, which may be empty or of another division."""

    def seen(self) -> dict[str, Any]:
        """Findings of this worker's first forwards about the network, as plain data for a checkpoint."""
        return {}

    def assume(self, seen: Mapping[str, Any]) -> None:
        """Use a checkpoint's findings of :meth:`seen`, until the forwards of this run make their own."""

    def holders_for_summary(self, rounds: int) -> dict[str, Any] | None:
        """Holders of a sample of the parts, for a summary; where :meth:`Layout.held` is only a hash."""
        return None


class Layout(LayoutAbilities, ABC):
    """Base class: the division of a model among the workers in each round.

    Args:
        module: the user's module, complete.
        config: the settings of the run.
        workers: number of workers.
        trained: ids of the parameters that optimizers have; None if they are not known yet.

    Attributes:
        shared: by name, the tensors that all workers hold whole in every round.
        shapes: by name, the shapes in the full model of tensors of which a worker holds only a slice.
        tensors: the parameters and buffers that the layout was made from.
        companion: a copy of the module that goes with it; None if there is none.
        written: names of frozen parameters that the program of some worker writes; the same on all workers.

    Raises:
        ValueError: if the module has tensors that cannot be averaged.
    """

    shared: dict[str, Tensor]
    shapes: Mapping[str, Sequence[int]] = {}

    def __init__(
        self, module: nn.Module, config: CommonConfig, workers: int, trained: Collection[int] | None = None
    ) -> None:
        check_tensors(module)
        self.tensors = KnownTensors(module)
        self.companion: Companion | None = None
        self.written: set[str] = set()
        self.module = module
        self.config = config
        self.workers = workers
        self.trained = trained
        self._digested: tuple[Any, int] = ((), 0)

    @property
    def partial(self) -> bool:
        """Whether some worker lacks a part in some round."""
        return self.workers > 1

    @abstractmethod
    def partition(self, round: int) -> Any:
        """The partition of ``round``: which worker holds which parts."""

    def held(self, round: int) -> list[Any]:
        """The parts that each worker holds in ``round``, as plain data to compare with a checkpoint's."""
        return [list(held) for held in self.partition(round).held]

    @abstractmethod
    def held_parameters(self, round: int) -> list[int]:
        """The number of parameters that each worker holds in ``round``."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Properties that must match for a worker's own tensors to fit, as plain data for a checkpoint."""

    @abstractmethod
    def parts(self) -> list[str]:
        """Names of the partitioned parts, in order."""

    @abstractmethod
    def describe_tensor(self, name: str) -> str:
        """The part that a tensor belongs to, in words, for errors."""

    @abstractmethod
    def describe(self) -> str:
        """A sentence for the user about the division of the model."""

    def warn_about_settings(self) -> None:
        """Warn about settings without the effect that a user may expect."""
        if self.workers > 1:
            self.warn_of_batch_statistics()

    def showing_companion(self) -> AbstractContextManager[None]:
        """Inside, the module has the values of its companion, if there is one."""
        return self.companion.showing() if self.companion is not None else nullcontext()

    def full_tensors(self, states: Iterable[dict[str, Any]]) -> dict[str, Tensor]:
        """The full model, assembled from the workers' states between two rounds, where all holders agree.

        Args:
            states: for each worker in order its ``place`` and its ``own`` state; see :class:`Resumption`.

        Raises:
            CheckpointError: if the states are not of this model.
        """
        tensors: dict[str, Tensor] = {}
        for state in states:
            tensors.update(state["own"]["tensors"])
        return tensors

    def changing(self) -> set[str]:
        """Names of the tensors that training can change now: trainable parameters, buffers, and :attr:`written`.

        Any other frozen parameter is equal everywhere, and an average would round it.
        """
        parameters = {name for name, parameter in self.module.named_parameters() if parameter.requires_grad}
        return parameters | {name for name, _ in self.module.named_buffers()} | self.written

    def local_sgd_bytes(self, syncs: int) -> int:
        """Bytes that a worker would send in so many syncs if nothing was divided and compressed."""
        changing, tensors = self.changing(), self.tensors.registered()
        sizes = averaged_bytes_by_type(tensor for name, tensor in tensors.items() if name in changing)
        return sum(local_sgd_bytes(size, self.workers, syncs) for size in sizes.values())

    def digest(self) -> int:
        """A number that is the same on workers with the same model and settings."""
        tensors = []
        for name, tensor in self.tensors.at_start().items():
            # A slice has other sizes on each worker, and counts as the whole tensor.
            shape = tuple(self.shapes.get(name, tensor.shape))
            tensors.append((name, shape, tensor.dtype, tensor.requires_grad))
        # Identity and settings depend on nothing else that varies, so most handshakes need no new hash.
        varying = (tensors, self.state_dict())
        if varying != self._digested[0]:
            text = repr((varying, self.identity(), self.config.in_words(), self.workers))
            self._digested = varying, int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
        return self._digested[1]

    def warn_of_batch_statistics(self) -> None:
        """Warn that a checkpoint, as a plain model, cannot carry ``batch_norm="batch"``."""
        if self.config.batch_norm == "batch" and norms_with_statistics(self.module):
            warnings.warn(
                "batch_norm='batch' evaluates by the statistics of each batch, but a checkpoint of this model will use "
                "its running statistics elsewhere. Build the network with track_running_stats=False, or choose "
                "batch_norm='recalibrate'.",
                stacklevel=5,
            )
