"""Counts a worker's local steps in Lightning's loop, and warns of messages within them.

A message in a training step makes the workers wait for each other in every step, as under DDP.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from resist_lightning.comm.group import messages_sent
from resist_lightning.engine.engine import Engine


class LocalSteps:
    """Counts one local step for each batch in which an optimizer steps; warns of each kind of message once.

    Attributes:
        idle: batches in a row, just before this one, in which no optimizer has stepped.
    """

    def __init__(self) -> None:
        self._sent = 0  # collectives of this process, up to this batch
        self._explained = False
        self._warned: set[str] = set()
        self.begin_training()

    def begin_training(self) -> None:
        """Called before the first batch."""
        self._stepped = False  # in this batch
        self.idle = -1  # no batch is behind the first one

    def begin_batch(self) -> None:
        """Called before each batch, after the messages of a sync."""
        self.idle = 0 if self._stepped else self.idle + 1
        self._stepped = self._explained = False
        self._sent = messages_sent()

    def count(self, engine: Engine | None) -> None:
        """Called after every step of every optimizer, a raw one too. The first in a batch makes it a local step."""
        if engine is None or not engine.running:
            return
        # On the full model every step is refused there, also behind a batch that has stepped.
        if self._stepped and not engine.observing:
            return
        self._stepped = True
        engine.count_step()
        # Messages that bypass the strategy can mix with those of a sync. Stages send in every step.
        if messages_sent() != self._sent and not self._explained and engine.config.trains_alone:
            self._warn_once(_UNKNOWN_MESSAGES)

    def explain_message(self) -> None:
        """Called when Lightning, a callback or the module sends something by the strategy's own collectives."""
        self._explained = True

    def note_gathering(self, engine: Engine | None, *, with_gradients: bool) -> None:
        """Called when the module gathers tensors: in validation that is as usual."""
        if engine is not None and engine.running and not engine.observing:
            self._warn_once(_GATHERED_WITH_GRADIENTS if with_gradients else _GATHERED)

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            rank_zero_warn(text)


def warn_of_metrics(trainer: pl.Trainer) -> None:
    """Warn of metrics that the module reduces over the workers in every batch; the first batch has logged them."""
    results: Any = getattr(trainer.fit_loop.epoch_loop, "_results", {})
    for result in results.values():
        meta = result.meta
        if meta.on_step and meta.sync.should:
            rank_zero_warn(
                f"self.log({meta.name!r}, sync_dist=True) sends a message after every batch, so the workers wait for "
                "each other in every step. Log it with on_step=False, on_epoch=True."
            )


def unwrapped(optimizer: Optimizer | LightningOptimizer) -> Optimizer:
    """The user's optimizer, without Lightning's wrapper."""
    return optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def take_step(trainer: pl.Trainer, step: Callable[..., Any], optimizer: Optimizer, closure: Callable[[], Any]) -> Any:
    """Step, except where a gradient scaler would fail because an optimizer has no gradients.

    Args:
        trainer: of this worker.
        step: takes the optimizer and the closure.
        optimizer: whose parameters may all be absent.
        closure: makes the gradients, or is empty.
    """
    scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
    if not scaled or trainer.lightning_module.automatic_optimization:
        return step(optimizer, closure)
    output = closure()  # before one can say whether there are gradients
    if any(parameter.is_meta for parameter in _parameters(optimizer)) and not _has_gradients(optimizer):
        return output
    return step(optimizer, lambda: output)


def clip_if_any(clip: Callable[..., None], optimizer: Optimizer, *args: Any) -> None:
    """Clip by value, unless an optimizer has no gradients: torch refuses to clip none.

    Its parameters are all absent, or frozen, or of a stage that is delayed.
    """
    if _has_gradients(optimizer):
        clip(optimizer, *args)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _has_gradients(optimizer: Optimizer) -> bool:
    return any(parameter.grad is not None for parameter in _parameters(optimizer))


_UNKNOWN_MESSAGES = (
    "something sends messages in a training step: torch.distributed, or a metric with dist_sync_on_step=True. The "
    "workers wait for each other in every step, and where they are at different steps a message can be matched with "
    "another worker's sync. Send them outside of training_step, by the strategy's reduce, broadcast or all_gather."
)
_GATHERED = (
    "self.all_gather in training sends messages each time, so the workers wait for each other in every step. Gather in "
    "validation, or once a round."
)
_GATHERED_WITH_GRADIENTS = (
    "self.all_gather(sync_grads=True) sends messages in every step, forward and backward. A worker's gradient then "
    "contains the losses of all workers, each through that worker's part of the network, and is not averaged over "
    "workers before the step, as it would be under DDP."
)
