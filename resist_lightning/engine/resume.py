"""Saves a worker's own state, and resumes from it in any step of any round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from resist_lightning.comm.tensors import named_tensors
from resist_lightning.engine.evaluation import Observation
from resist_lightning.errors import CheckpointError
from resist_lightning.methods.layout import Layout
from resist_lightning.methods.sync import Sync
from resist_lightning.schedule.progress import Clock
from resist_lightning.schedule.round_length import shortest_round
from resist_lightning.state.names import as_named_in
from resist_lightning.state.optimizer_state import OptimizerStates
from resist_lightning.state.unmade import is_unmade

STATE_VERSION = 2
"""Version of the saved format; version 1 had no worker's own state."""


class Resumption:
    """Collects a worker's resume state, and restores it.

    Attributes:
        changed_settings: settings that differ from the checkpoint's, in words, with both values.
        steps_left: the local steps that are still to come, where the host knows; set before :meth:`restore`.
    """

    def __init__(
        self,
        layout: Layout,
        clock: Clock,
        states: OptimizerStates,
        sync: Sync[Any, Any],
        observation: Observation,
        total_steps: int | None,
    ) -> None:
        self._layout = layout
        self._clock = clock
        self._states = states
        self._sync = sync
        self._observation = observation
        self._members = sync.exchange.collective.members
        self.changed_settings: list[str] = []
        self._own: dict[str, Any] | None = None
        self._knows_length = False
        self.steps_left: int | None = None
        self._total_steps = total_steps
        self._uncounted = 0  # of the total: steps that were taken before this run's clock began
        self._plan_end()

    def place(self) -> dict[str, Any]:
        """The round, the step and the partition; enough to resume, with the own states of all workers."""
        return {
            "version": STATE_VERSION,
            "identity": self._layout.identity(),
            "members": self._members,
            "held": self._layout.held(self._clock.round),
            "held_next": self._held_next(),
            "table": self._layout.state_dict(),
            "seen": self._layout.seen(),
            "round": self._clock.round,
            "step": self._clock.step,
            "steps_before": self._clock.steps_before,
            "round_steps": self._clock.local_steps,
            "local_steps": str(self._layout.config.local_steps),
            "total_steps": self._total_steps,
            "uncounted": self._uncounted,
            "written": sorted(self._layout.written),
        }

    def state_dict(self) -> dict[str, Any]:
        """This worker's own state: its tensors in mid-round, optimizer state, recorded inputs.

        Numbers, strings, lists and tensors on the CPU only, which may be the live ones.
        """
        sync = self._sync.state_dict(with_full_model=self._observation.whole)
        own = {"optimizers": self._states.state_dict(), **sync, **self._observation.state_dict()}
        companion = self._layout.companion
        if companion is not None:
            # While the copy is shown, the worker's own weights are hidden, but for those that were written meanwhile.
            written = self._observation.written()
            for name, weight in companion.weights.items():
                if name not in written:
                    own["tensors"][name] = weight.cpu()
            own["companion"] = companion.state()
        return own

    def restore(self, state: dict[str, Any], own: dict[str, Any] | None) -> bool:
        """Go to the place of ``state``; see :meth:`resist_lightning.Engine.restore`."""
        if not state:
            self._leave_out_earlier(state)
            return True
        state, own = as_named_in(self._layout.module, (state, own))
        # A snapshot has the weights in training, not those of a full model; unmade tensors come from worker 0.
        if "scale" in state and not is_unmade(self._layout.module):
            self._observation.undo(state)
        self._restore_clock(state)
        self._leave_out_earlier(state)
        self._layout.load_state_dict(state.get("table", {}), self._clock.round)
        # A run that is complete has no forward that would find these, and its full model is scaled all the same.
        self._layout.assume(state.get("seen", {}))
        # The module may have changed since: a name that is gone has nothing to average.
        self._layout.written = self._layout.shared.keys() & state.get("written", ())
        same_members = state.get("members", 1) == self._members  # each has its batches and random numbers
        theirs, ours = state.get("identity") or {}, self._layout.identity()
        self.changed_settings = _differences(theirs, ours)
        same_layout = same_members and theirs == ours
        self._plan_end()
        held, held_next = self._layout.held(self._clock.round), self._held_next()
        same = same_layout and state.get("held") == held and state.get("held_next", held_next) == held_next
        self._own = own if same else None
        if self._own is not None:
            self._states.check_fits(self._own["optimizers"])
        # Another partition cannot begin in mid-round; the full model equals the result of a sync.
        if not same and self._clock.step:
            self._clock.next_round()
            self._knows_length = False
        return same

    def _held_next(self) -> Any:
        """Holders in the coming rounds, which decide where a block is merged and its outer state is kept."""
        ahead = [self._layout.held(self._clock.round + 1 + more) for more in range(self._layout.fragment_count)]
        return ahead[0] if len(ahead) == 1 else ahead

    def _restore_clock(self, state: Mapping[str, Any]) -> None:
        rule, clock = self._layout.config.local_steps, self._clock
        clock.round = int(state["round"])
        clock.step = int(state["step"])
        if "steps_before" in state:
            clock.steps_before = int(state["steps_before"])
        else:  # of an earlier version, whose rounds were all as long as `local_steps` said
            clock.steps_before = clock.round * shortest_round(rule)
        # Another rule decides from here on, in this round too.
        if state.get("local_steps") == str(rule):
            clock.resume_round(int(state["round_steps"]))
            self._knows_length = True

    def begin_round(self) -> None:
        """Decide the length of the round that the training begins in, unless the checkpoint had it."""
        if not self._knows_length:
            self._clock.begin_round()
        self._plan_end()

    def _plan_end(self) -> None:
        total = self._total_steps
        self._layout.plan_end(self._clock, None if total is None else total - self._uncounted)

    def _leave_out_earlier(self, state: Mapping[str, Any]) -> None:
        """Find the steps of the total that the clock has not counted: by another strategy, or in other batches."""
        if self._total_steps is None or self.steps_left is None:
            return
        taken = self._total_steps - self.steps_left
        self._uncounted = taken - self._clock.total_steps
        # The same training goes on as it was planned, even if not every batch had a step.
        if taken and state.get("total_steps") == self._total_steps:
            self._uncounted = int(state["uncounted"])

    def numbers(self) -> list[float]:
        """Flags for the other workers: whether this worker has its own state, and whether it needs more to resume."""
        return [float(self._own is not None), float(self._own is not None and self._sync.lacks(self._own))]

    def agree(self, numbers: Sequence[Sequence[float]]) -> tuple[bool, bool]:
        """Decide, from the :meth:`numbers` of all workers, the way in which they resume.

        Returns:
            Whether every worker uses its own state, and whether this is all that they need.
        """
        # One worker without its own file would train on tensors that do not fit the others': then nobody uses its own.
        exact = all(has_own for has_own, _ in numbers)
        if not exact:
            self._forget_own()
        return exact, exact and not any(lacks for _, lacks in numbers)

    def _forget_own(self) -> None:
        """Resume from the full model alone."""
        self._own = None
        self._states.reset_stateless()
        if self._clock.due:  # the full model is already the result of this sync
            self._clock.next_round()

    def load_tensors(self) -> None:
        """Load this worker's tensors, when it holds the parts of the round."""
        if self._own is not None:
            self.put(self._own["tensors"])
            if self._layout.companion is not None and "companion" in self._own:
                self._layout.companion.load(self._own["companion"])

    def load_rest(self) -> None:
        """Load the rest of its state, when the round has begun."""
        if self._own is not None:
            self._states.load_state_dict(self._own["optimizers"])
            self._sync.load_state_dict(self._own)
            self._observation.load_state_dict(self._own)
        self._own = None  # it may hold a copy of the model

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors, unscaled, into the module's of the same name, buffers that are not persistent included."""
        named = named_tensors(self._layout.module)
        with torch.no_grad():
            for name, tensor in tensors.items():
                if name not in named or named[name].shape != tensor.shape:
                    here = f"has {tuple(named[name].shape)} in the module" if name in named else "is not in the module"
                    raise CheckpointError(
                        f"{name} has the shape {tuple(tensor.shape)} in the file, but {here}. Create tensors in "
                        "__init__ or `configure_model`, or resume without the workers' own files."
                    )
                named[name].copy_(tensor)


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """The settings that two layouts both have and differ in, with both values."""
    found = []
    for name in ours.keys() & theirs.keys():
        # A list, such as stages, would say little.
        if theirs[name] != ours[name] and isinstance(theirs[name], str | int | float):
            found.append(f"{name}={theirs[name]!r}, here {ours[name]!r}")
    return sorted(found)
