"""Computes a stage whose gradients arrive some steps late, while the stages behind it work on the same batches.

Two stages, a delay of one step; F and B are forward and backward passes, numbered by batch::

    stage 0   F0     F1 B0     F2 B1     F3 B2
    stage 1      F0 B0     F1 B1     F2 B2

Stage 0 takes its step 1 with the gradient of batch 0. Stage 1, the last one, has no delay. In a warm-up no stage has
one: each backward pass is waited for, and its gradient taken in the same step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import override

from resist_lightning.comm.collective import Collective
from resist_lightning.methods.auxnet.config import StageConfig
from resist_lightning.methods.auxnet.network.chain import Stage
from resist_lightning.methods.auxnet.step.backward import freed_graph_explained
from resist_lightning.methods.auxnet.step.messages import Expected, Messages
from resist_lightning.methods.auxnet.step.spans import Spans

_CHANGED = (
    "the weights of this stage have changed since the last call of the network, and no step was counted in between: by "
    "sharpness-aware training (SAM), by several steps of the optimizer in one training_step, or by a hook. Late "
    "gradients would be of other weights than the step expects. Take one step for each call (accumulate_grad_batches "
    "adds gradients up), or give the strategy delay=0 or method='penalty', under which all of this works."
)

Gradients: TypeAlias = dict[str, Tensor]
"""Gradients by name of the parameter in the network; parameters without a gradient are left out."""


@dataclass
class Pending:
    """A forward pass whose backward pass is still to come.

    Args:
        given: the stage's input.
        made: its output, with the graph.
        weights: the weights of the forward pass, by name.
        reply: the gradient at the output, from the next worker.
    """

    given: Tensor
    made: Tensor
    weights: dict[str, Tensor]
    reply: Expected


class DelayedStage:
    """A stage whose gradient of a batch is used some batches later.

    Both passes over a batch use the same weights, a copy made in the forward pass. The copy is ahead of the weights by
    as many steps as the gradient will be late, each taken to equal the last one: so the gradient is taken near the
    weights that it will change (as in SpecTrain, arXiv 1809.02839).

    Args:
        stage: the worker's stage.
        delay: batches between a forward pass and the step that takes its gradient.
        messages: this worker's messages.
        spans: records its times of computing and waiting.
        device: device of the stage.
        first: whether the stage is the first, which sends no gradient on.
    """

    def __init__(
        self, stage: Stage, delay: int, messages: Messages, spans: Spans, device: torch.device, *, first: bool
    ) -> None:
        self._stage = stage
        self._delay = delay
        self._messages = messages
        self._spans = spans
        self._device = device
        self._first = first
        self._weights = _Weights(stage)
        # By batch, the oldest first: backward passes still to come, or the gradients they have given.
        self._late: deque[Pending | Gradients] = deque()
        self._wait = delay  # number of them that may remain after a batch
        self._due: list[Gradients] = []
        # Weights of this step's forward passes; made at the first one.
        self._ahead: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}  # the weights before the last step

    @property
    def due_parameters(self) -> list[Tensor]:
        """The parameters that train now, if gradients of them are due after the batch of the last :meth:`forward`.

        Else none: autograd would call the hooks of their gradients, without a gradient.
        """
        if not self._due and len(self._late) <= self._wait:
            return []
        return list(self._weights.trained().values())

    @property
    def held_bytes(self) -> int:
        """Bytes of copies of weights, and of gradients that wait, between two steps."""
        kept = [*self._before.values()]
        for late in (*self._late, *self._due):
            kept += (late.weights if isinstance(late, Pending) else late).values()
        return sum(tensor.nbytes for tensor in kept)

    def forward(self, given: Tensor, reply: Expected, accumulate: int, *, warmup: bool) -> Tensor:
        """The stage's output for a batch.

        Args:
            given: the stage's input.
            reply: the gradient at the output, which has yet to arrive.
            accumulate: number of batches in a step.
            warmup: whether this step takes the gradient of this batch.

        Raises:
            RuntimeError: if the weights have changed within a step, and gradients are late.
        """
        self._wait = 0 if warmup else self._delay
        if self._ahead and self._changed_within_step():
            if self._delay:
                raise RuntimeError(_CHANGED)
            self._ahead = {}
        if not self._ahead:
            self._ahead = self._look_ahead(self._wait / accumulate)
        made: Tensor = self._weights.use(self._ahead, lambda: self._stage(given))
        self._late.append(Pending(given, made, self._ahead, reply))
        return made

    def work_off(self, *, but: int = 0) -> None:
        """Compute the backward passes whose gradients this step takes. Waits for the next worker.

        Args:
            but: number of the newest batches that are left.
        """
        while len(self._late) > max(self._wait, but):
            late = self._late.popleft()
            self._spans.begin("backward")
            self._due.append(self._backward(late) if isinstance(late, Pending) else late)

    def settle(self) -> None:
        """Compute all backward passes to come; their gradients are used when they are due.

        Collective: every worker must call this, between two batches.
        """
        self._late = deque(self._backward(late) if isinstance(late, Pending) else late for late in self._late)

    def take_gradients(self) -> list[Tensor | None]:
        """For each of :attr:`due_parameters` its gradient, if it has one. Waits for the next worker."""
        self.work_off()
        due, self._due = self._due, []
        if not due:
            return []
        found: list[Tensor | None] = []
        for name in self._weights.trained():
            parts = [gradients[name] for gradients in due if name in gradients]
            found.append(sum(parts[1:], start=parts[0]) if parts else None)
        return found

    def end_step(self) -> None:
        """The optimizer has taken its step: the next forward pass makes new copies."""
        self._ahead = {}

    def state_dict(self) -> dict[str, Any]:
        """Gradients that wait or are due, weights before the last step and in this one. Only after :meth:`settle`."""
        cpu = torch.device("cpu")
        due = [_moved(gradients, cpu) for gradients in self._due]  # where the user's loop has skipped a step
        late = [_moved(gradients, cpu) for gradients in self._late if not isinstance(gradients, Pending)]
        # In the middle of a step, the weights that its other batches will use too.
        ahead = {name: weight.detach() for name, weight in self._ahead.items()}
        return {"late": late, "due": due, "before": _moved(self._before, cpu), "ahead": _moved(ahead, cpu)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a :meth:`state_dict`."""
        self._late = deque(_copied(late, self._device) for late in state["late"])
        self._due = [_copied(gradients, self._device) for gradients in state.get("due", ())]
        self._before = _copied(state["before"], self._device)
        ahead = _copied(state.get("ahead", {}), self._device)
        self._ahead = {name: weight.requires_grad_() for name, weight in ahead.items()}

    def _changed_within_step(self) -> bool:
        """Whether weights are not those of the copies that this step has made."""
        # Weights that are exchanged for a validation may return with an error of rounding, which is no reason to raise.
        rounding = 8.0 if self._delay else 0.0
        changes = []
        for name, weight in self._weights.trained().items():
            if name in self._before:
                change = (weight.detach() - self._before[name]).abs().sum()
                limit = rounding * torch.finfo(weight.dtype).eps * weight.detach().abs().sum()
                changes.append(change > limit)  # not where it is NaN, which a handshake tells
        # All at once, to wait for a GPU once only.
        return bool(changes) and bool(torch.stack(changes).any())

    def _look_ahead(self, steps: float) -> dict[str, Tensor]:
        """Copies of the trained weights, ``steps`` ahead."""
        ahead: dict[str, Tensor] = {}
        now = self._weights.trained()
        for name, weight in now.items():
            copy = weight.detach().clone()
            if name in self._before:
                copy += steps * (weight.detach() - self._before[name])
            ahead[name] = copy.requires_grad_()
        self._before = {name: weight.detach().clone() for name, weight in now.items()}
        return ahead

    # A batch may be settled inside an evaluation, where no gradients are recorded.
    @torch.inference_mode(mode=False)
    @torch.enable_grad()
    def _backward(self, late: Pending) -> Gradients:
        with self._spans.inside("wait for target"):
            gradient = late.reply.take()
        wanted = late.weights if self._first else {**late.weights, "": late.given}
        found: Gradients = {}
        if late.made.requires_grad and wanted:
            parts = self._gradients(late, list(wanted.values()), gradient.to(late.made.dtype))
            found = {name: part for name, part in zip(wanted, parts, strict=True) if part is not None}
        if not self._first:
            before = found.pop("", None)
            self._messages.send_gradient(torch.zeros_like(late.given) if before is None else before)
        return found

    def _gradients(self, late: Pending, wanted: list[Tensor], gradient: Tensor) -> Sequence[Tensor | None]:
        """Gradients of ``wanted``, without the autocast of a forward pass of the user's module that is under way."""

        def compute() -> Sequence[Tensor | None]:
            return torch.autograd.grad(late.made, wanted, gradient, allow_unused=True)

        with torch.autocast(self._device.type, enabled=False), freed_graph_explained():
            # With the weights in place, as a block with activation checkpointing computes its forward pass again.
            found: Sequence[Tensor | None] = self._weights.use(late.weights, compute)
            return found


def make_delayed(
    stage: Stage,
    config: StageConfig,
    messages: Messages,
    spans: Spans,
    collective: Collective,
    device: torch.device,
) -> DelayedStage | None:
    """The delayed stage of each worker but the last, where the settings delay gradients; else None."""
    behind = collective.workers - 1 - collective.worker
    if not config.delayed or behind == 0:
        return None
    return DelayedStage(stage, config.delay * behind, messages, spans, device, first=collective.worker == 0)


def _moved(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _copied(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Like :func:`_moved`, but always copies: a loaded file may be memory-mapped, and is overwritten later."""
    return {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}


class _Weights:
    """The parameters of a stage by name, with other tensors in their place during a call."""

    def __init__(self, stage: Stage) -> None:
        # The same objects throughout a run; under all of their names, where weights are tied.
        self._parameters = dict(stage.parts.named_parameters(remove_duplicate=False))
        self._holder = _Holder(stage.network)

    def trained(self) -> dict[str, Tensor]:
        """The parameters that train now, each by the first of its names."""
        found: dict[int, tuple[str, Tensor]] = {}
        for name, weight in self._parameters.items():
            if weight.requires_grad:
                found.setdefault(id(weight), (name, weight))
        return dict(found.values())

    def use(self, weights: dict[str, Tensor], act: Callable[[], Any]) -> Any:
        """Call ``act`` with these tensors in the place of the parameters of the same name."""
        replaced = {id(self._parameters[name]): weight for name, weight in weights.items()}
        placed: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            if id(parameter) in replaced:
                placed[f"network.{name}"] = replaced[id(parameter)]
        return functional_call(self._holder, placed, (act,), tie_weights=False)


class _Holder(nn.Module):
    """Calls a function: for `functional_call`, which replaces tensors while a module is called."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @override
    def forward(self, act: Callable[[], Any]) -> Any:
        """Call ``act`` and return its result."""
        return act()
