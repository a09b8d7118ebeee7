"""Messages of Lightning, callbacks and users, which a strategy passes on: none after an error, none beside a sync."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from typing_extensions import override

from resist_lightning.comm.group import group_exists
from resist_lightning.comm.torch_collective import gather_tensor
from resist_lightning.engine.engine import Engine
from resist_lightning.strategies.first import FirstEvaluates
from resist_lightning.strategies.local_steps import LocalSteps
from resist_lightning.strategies.process_group import ProcessGroup


class MessagesStrategy(DDPStrategy):
    """The collectives by which everything but the engine communicates with other workers.

    Attributes:
        group: of the workers; left at the end of each run.
        steps: told of messages within a local step.
        first: the evaluations that worker 0 runs alone; None where all workers evaluate.
    """

    group: ProcessGroup
    steps: LocalSteps
    first: FirstEvaluates | None

    @property
    @abstractmethod
    def engine(self) -> Engine | None:
        """The engine that trains and syncs this worker's part; None before the first ``fit``."""

    @property
    @abstractmethod
    def interrupted(self) -> bool:
        """Whether an error or the user has ended the run, so that nothing may be sent any more."""

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        with self._in_group():
            if self._meet_before_message():
                super().barrier(*args, **kwargs)

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        with self._in_group():
            return super().broadcast(obj, src) if self._meet_before_message() else obj

    @override
    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        with self._in_group():
            return super().reduce(tensor, group, reduce_op) if self._meet_before_message() else tensor

    @override
    def all_gather(self, tensor: torch.Tensor, group: Any | None = None, sync_grads: bool = False) -> torch.Tensor:
        with self._in_group():
            if group_exists() and not self._meet_before_message():
                return tensor.detach()[None]
            self.steps.note_gathering(self.engine, with_gradients=sync_grads)
            if group_exists() and not sync_grads:
                return gather_tensor(tensor.detach(), group)  # torch deprecates Lightning's way, and warns each time
            return super().all_gather(tensor, group=group, sync_grads=sync_grads)

    def _in_group(self) -> AbstractContextManager[None]:
        """Inside there is a group between two runs too: Lightning's hooks after a run and the user's program expect it.

        Collective between two runs: every worker must enter this, in the same order.
        """
        return nullcontext() if self.interrupted else self.group.rejoined(super().barrier)

    def _meet_before_message(self) -> bool:
        """Run a handshake with all workers in training, so that no message pairs with another worker's sync.

        Collective in training: every worker must call this.

        Returns:
            Whether a message may be sent: not after an error.
        """
        if self.interrupted:
            return False
        if self.first is not None and self.first.alone:
            return True  # to itself
        self.steps.explain_message()
        if self.engine is not None and self.engine.running:
            self.engine.meet()
        return True
