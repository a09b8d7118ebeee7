"""Watches every optimizer step of the process: each must be counted, and by an optimizer that the engine knows."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any
from weakref import WeakMethod

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from resist_lightning.methods.layout import Layout
from resist_lightning.schedule.progress import Clock, one_round
from resist_lightning.state.optimizer_state import OptimizerStates


class StepWatch:
    """Watches the optimizers of a run while it trains.

    Attributes:
        on_step: called after each step, for a host that counts local steps itself; without it the user's loop must call
            ``engine.after_step()``, and is warned if it forgets.
    """

    def __init__(self, layout: Layout, states: OptimizerStates, clock: Clock) -> None:
        self.on_step: Callable[[], None] | None = None
        self._module = layout.module
        self._ours = set(map(id, states.optimizers))
        self._clock = clock
        self._alone = layout.config.trains_alone and layout.workers > 1  # whether nothing is sent between two syncs
        self._turns = Turns(layout.stepped_late())
        self._handles: list[RemovableHandle] = []
        self._outermost: Optimizer | None = None  # stepping now; it may step inner optimizers
        self._taken: Counter[int] = Counter()  # steps of each optimizer before the first local step was counted
        self._counted = False
        self._written, self._batches = 0, 0

    def begin(self) -> None:
        """Begin to watch all steps of this process."""
        self._written = self._writes()
        self._handles = [
            register_optimizer_step_pre_hook(_weakly(self._before)),
            register_optimizer_step_post_hook(_weakly(self._after)),
        ]

    def end(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def note_local_step(self) -> None:
        """Note that a local step has been counted."""
        self._counted = True
        self._turns.end_step()

    def check_counted(self, *, finished: bool) -> None:
        """Check, before the workers assemble the full model, that local steps are counted at all.

        Args:
            finished: whether the training is over.

        Raises:
            RuntimeError: if optimizers have stepped, and no local step was ever counted.
        """
        if self._counted:
            return
        taken = max(self._taken.values(), default=0)
        # A loop may assemble the full model between `optimizer.step()` and `engine.after_step()`.
        allowed = 0 if finished else 1
        if taken > allowed:
            raise RuntimeError(
                f"optimizers took {taken} step(s), but no local step was counted, so the workers never averaged. Call "
                "engine.after_step() after optimizer.step(), on every worker."
            )

    def warn_of_one_round(self) -> None:
        """Warn, at the end of a plain loop, of workers that trained alone and averaged only once."""
        clock = self._clock
        # A strategy knows the length of the training, and has warned when it started.
        if self._alone and self.on_step is None and clock.round == 0 and 0 < clock.step < clock.local_steps:
            warnings.warn(one_round(clock.step, clock), stacklevel=4)

    def check_batch(self, accumulated: int) -> None:
        """Check, between two batches of a loop that counts by :attr:`on_step`, that optimizers step.

        Args:
            accumulated: batches whose gradients are added up before a step.

        Raises:
            RuntimeError: if batch after batch changes parameters, and no optimizer steps.
        """
        if self._counted:
            return
        written = self._writes()
        self._batches += self._written != written
        self._written = written
        # Gradients may add up over batches, and a program may write parameters before it trains.
        if self._batches > 3 + 2 * accumulated:
            raise RuntimeError(
                f"{self._batches} batches changed parameters, but no optimizer of `configure_optimizers` has stepped, "
                "so no local step was counted and the workers never average. Change parameters by the step() of an "
                "optimizer that `configure_optimizers` returns."
            )

    def _before(self, optimizer: Optimizer, *_: Any) -> None:
        if self._outermost is not None:  # an optimizer inside of a known one
            return
        if id(optimizer) in self._ours:
            self._outermost = optimizer
            return
        # Looked up each time: a parameter that was replaced since may have left its id to one of another model.
        parameters = {id(parameter) for parameter in self._module.parameters()}
        members = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if any(id(parameter) in parameters for parameter in members):
            raise RuntimeError(
                f"{type(optimizer).__name__} steps parameters of the module but is not registered: its state would not "
                "move with them between workers. Return it from `configure_optimizers` (with "
                "`self.automatic_optimization = False` training_step may step it itself); in a plain loop, give it to "
                "the Engine."
            )

    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        if optimizer is not self._outermost:
            return
        self._outermost = None
        if self.on_step is not None:
            self.on_step()
        elif not self._counted:
            self._taken[id(optimizer)] += 1
            taken = self._taken[id(optimizer)]
            if taken == self._clock.local_steps + 1:
                warnings.warn(
                    f"{type(optimizer).__name__} took {taken} steps, but no local step was counted: no round will end. "
                    "Call engine.after_step() after optimizer.step().",
                    stacklevel=3,
                )
        self._turns.note(optimizer)  # behind `on_step`, which ends the local step before

    def _writes(self) -> int:
        return sum(parameter._version for parameter in self._module.parameters())


class Turns:
    """Refuses optimizers that take turns where gradients are late: one would step by gradients of another's turn.

    Args:
        late: ids of the parameters whose steps take gradients of earlier batches.
    """

    def __init__(self, late: Collection[int]) -> None:
        self._late = late
        self._now: set[int] = set()  # optimizers that have stepped in this local step
        self._ever: set[int] = set()
        self._passed_over: set[int] = set()

    def end_step(self) -> None:
        """Note that a local step has ended; right behind its optimizers, or with the first one of the next step."""
        if self._now:
            self._passed_over |= self._ever - self._now
            self._ever |= self._now
            self._now = set()

    def note(self, optimizer: Optimizer) -> None:
        """Note an optimizer that has stepped.

        Raises:
            RuntimeError: if it has stepped before, and others have stepped without it since.
        """
        members = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if not any(id(parameter) in self._late for parameter in members):
            return
        if id(optimizer) in self._passed_over:
            raise RuntimeError(
                f"{type(optimizer).__name__} steps again after a step in which only another optimizer of the network "
                "stepped. Gradients are late: what it takes now is the gradient of that other turn (of its loss, or "
                "none where toggle_optimizer froze the parameters). Let all optimizers of the network step in every "
                "step, or give the strategy delay=0."
            )
        self._now.add(id(optimizer))


def _weakly(method: Callable[..., None]) -> Callable[..., None]:
    """A global hook that keeps nothing alive: an engine that an error leaves open would keep its model in memory."""
    reference = WeakMethod(method)

    def call(*args: Any) -> None:
        alive = reference()
        if alive is not None:
            alive(*args)

    return call
