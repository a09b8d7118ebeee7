"""What a worker's model consists of, whatever the method divides it by."""

from __future__ import annotations

import hashlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from resist_lightning.comm.collective import Collective
from resist_lightning.comm.tensors import KnownTensors, check_tensors
from resist_lightning.methods.config import CommonConfig, WireName
from resist_lightning.methods.residual import Block
from resist_lightning.state.batch_norm import norms_with_statistics
from resist_lightning.state.companion import Companion


class Layout(ABC):
    """The parts of a model, and who trains which when.

    Args:
        module: the user's module, complete.
        config: the settings of the run.
        workers: number of workers.

    Attributes:
        blocks: the residual blocks that are partitioned; none in a method that divides otherwise.
        shared: by name, the tensors that all workers hold whole in every round.
        scale: factor on the residual branches of ``blocks`` in the full model.
        wire: how trainable parameters are sent at a sync.
        tensors: the parameters and buffers that the layout is of.
        companion: a copy of the module that goes with it; None if there is none.
        written: names of frozen parameters that the program of some worker writes; the same on all workers.

    Raises:
        ValueError: if the module synchronises batch norm, or has tensors that cannot be averaged.
    """

    blocks: tuple[Block, ...] = ()
    shared: dict[str, Tensor]
    scale: float = 1.0
    wire: WireName = "fp32"

    def __init__(self, module: nn.Module, config: CommonConfig, workers: int) -> None:
        _refuse_sync_batch_norm(module)
        check_tensors(module)
        self.tensors = KnownTensors(module)
        self.companion: Companion | None = None
        self.written: set[str] = set()
        self.module = module
        self.config = config
        self.workers = workers

    @property
    @abstractmethod
    def partial(self) -> bool:
        """Whether some worker lacks a part in some round."""

    @abstractmethod
    def partition(self, round: int) -> Any:
        """Who holds what in ``round``."""

    @abstractmethod
    def held(self, round: int) -> list[Any]:
        """For each worker what it holds in ``round``, as plain data to compare with what a checkpoint says."""

    @abstractmethod
    def held_parameters(self, round: int) -> list[int]:
        """For each worker, how many parameters it holds in ``round``."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What must be the same for a worker's own tensors to fit, as plain data."""

    @abstractmethod
    def settings(self) -> dict[str, str]:
        """Settings that all workers must share, by name, in words."""

    @abstractmethod
    def parts(self) -> list[str]:
        """Names of what is partitioned, in order."""

    @abstractmethod
    def describe_tensor(self, name: str) -> str:
        """In words, what the tensor of this name belongs to."""

    @abstractmethod
    def describe(self) -> str:
        """A sentence that says what was chosen."""

    @abstractmethod
    def warn_about_settings(self) -> None:
        """Say what of the settings has less effect than a user may think."""

    def showing_companion(self) -> AbstractContextManager[None]:
        """Inside, the copy that goes with the module, if there is one, is in its place."""
        return self.companion.showing() if self.companion is not None else nullcontext()

    def prepare(self, example: Tensor, collective: Collective) -> None:  # noqa: B027
        """See an input of the network, a batch, before training starts.

        Collective: every worker must call this, in the same order.
        """

    def is_warmup(self, round: int) -> bool:
        """Whether in ``round`` every worker trains all blocks, scaled as at test time."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """What was measured of the workers' speed, as plain data; empty if nothing is measured."""
        return {}

    def learn(self, round: int, seconds: Sequence[float]) -> None:  # noqa: B027
        """Take in each worker's seconds per local step in the round that ends; all workers must give the same."""

    def resume(self, table: Mapping[str, Any], round: int) -> None:  # noqa: B027
        """Go on with what :meth:`state_dict` said, from ``round``."""

    def full_tensors(self, states: Iterable[dict[str, Any]]) -> dict[str, Tensor]:
        """The full model from what all workers, in order, had at the border of a round, where holders agree.

        Args:
            states: the ``place`` and the ``own`` state of each; see :class:`Resumption`.

        Raises:
            CheckpointError: if they are not of this model.
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

    def digest(self) -> int:
        """A number that is the same on workers with the same model and settings."""
        named: list[tuple[str, Tensor]] = [*self.module.named_parameters(), *self.module.named_buffers()]
        tensors = [f"{name}:{self._shape(name, t)}:{t.dtype}:{t.requires_grad}" for name, t in named]
        text = repr((tensors, self.parts(), self._drawn_from()))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")

    def _shape(self, name: str, tensor: Tensor) -> tuple[int, ...]:
        """Of the whole tensor."""
        return tuple(tensor.shape)

    def _warn_of_batch_statistics(self) -> None:
        """A checkpoint, as a plain model, cannot carry that evaluation goes by the statistics of each batch."""
        if self.config.batch_norm == "batch" and norms_with_statistics(self.module):
            warnings.warn(
                "batch_norm='batch' evaluates by the statistics of each batch, but a checkpoint of this model will use "
                "its running statistics elsewhere. Build the network with track_running_stats=False, or choose "
                "batch_norm='recalibrate'.",
                stacklevel=5,
            )

    @abstractmethod
    def _drawn_from(self) -> tuple[Any, ...]:
        """What decides, besides the model, what is sent."""


def _refuse_sync_batch_norm(module: nn.Module) -> None:
    names = [name for name, child in module.named_modules() if isinstance(child, nn.SyncBatchNorm)]
    if names:
        raise ValueError(
            f"{names[0]} is a SyncBatchNorm: it would communicate in every step, in a sub-network that differs between "
            "workers. Use BatchNorm; the full model has statistics of all workers."
        )
