"""Looking at the full model while the training goes on: assemble it, and go back as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from resist_lightning.checks.handshake import Handshake
from resist_lightning.checks.header import Purpose
from resist_lightning.engine.full_model import FullModel
from resist_lightning.methods.layout import Layout
from resist_lightning.methods.resist.scaling import ScaleHooks
from resist_lightning.methods.sync import Plan, Sync
from resist_lightning.schedule.progress import Clock
from resist_lightning.state.batch_norm import InputRecorder
from resist_lightning.state.user_writes import version


class Observation:
    """What a worker does besides training: it helps to assemble the full model, and puts its own part back.

    Args:
        layout: the model's parts.
        sync: this worker's side of the syncs.
        handshake: how the workers meet.
        device: where present tensors live.
        forward_context: a context in which recorded inputs are replayed.
    """

    def __init__(
        self,
        layout: Layout,
        sync: Sync[Any, Any],
        handshake: Handshake,
        device: torch.device,
        forward_context: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.full = FullModel(layout, sync.exchange, forward_context)
        self.recorder: InputRecorder | None = None
        self._layout = layout
        self._sync = sync
        self._handshake = handshake
        self._device = device
        self._warmup_hooks = ScaleHooks([], 1.0)
        self._writes_at_start = self._writes_unsynced = 0

    def start(self) -> None:
        """Call it once, when training starts: remember inputs, where batch norm will be re-estimated on them."""
        config = self._layout.config
        if config.batch_norm == "recalibrate" and self._layout.partial:
            self.recorder = InputRecorder(self._layout.module, config.recalibration_batches)

    def end(self) -> None:
        """Call it once, when training has ended."""
        self._warmup_hooks.remove()
        if self.recorder is not None:
            self.recorder.remove()
        self.recorder = None

    def begin_round(self, round: int) -> None:
        """Note that all workers agree, and scale the blocks in a warm-up round."""
        self._writes_at_start = self._writes()
        self._handshake.divergence.frozen.note()
        self._hook_warmup(round)

    def state_dict(self) -> dict[str, Any]:
        """This worker's tensors as in training, and what evaluation needs of it."""
        module = self._layout.module
        named: list[tuple[str, Tensor]] = [*module.named_parameters(), *module.named_buffers()]
        tensors = {name: tensor.detach() for name, tensor in named if not tensor.is_meta}
        unsynced = self._writes_unsynced
        if self.full.active:
            own = self.full.state_dict()
            tensors = {name: own[id(tensor)].detach() for name, tensor in named if id(tensor) in own}
            unsynced += len(self.full.written())
        return {
            "tensors": {name: tensor.cpu() for name, tensor in tensors.items()},
            "inputs": self.recorder.state_dict() if self.recorder is not None else None,
            "unsynced": unsynced,
        }

    def load_state_dict(self, own: dict[str, Any]) -> None:
        """Go on in the middle of a round, after :meth:`begin_round`."""
        if self.recorder is not None and own["inputs"] is not None:
            self.recorder.load_state_dict(own["inputs"], self._device)
        self._writes_at_start = self._writes() - own["unsynced"]

    @property
    def swapped(self) -> bool:
        """Whether weights were exchanged between :meth:`note_weights` and the full model that was assembled last."""
        return self.full.swapped

    def note_weights(self) -> None:
        """Call it before code that may exchange weights for an evaluation. Sends nothing."""
        with torch.inference_mode(False):
            self._layout.tensors.keep()
            self.full.note(self._own_tensors())

    def forget_notes(self) -> None:
        """Give the memory of :meth:`note_weights` back, when the evaluation has ended."""
        self.full.forget_notes()

    def assemble(self, purpose: Purpose, clock: Clock, sync_plan: Callable[[], Plan], kind: str, *, keep: bool) -> None:
        """Make the module the full model, as if the round ended here.

        Collective: every worker must call this, in the same order.

        Args:
            purpose: why the workers meet.
            clock: where this worker is.
            sync_plan: the plan of the sync that would come next; asked for when the workers have met.
            kind: how the bytes are counted.
            keep: whether :meth:`put_back` will be called.
        """
        self._layout.tensors.keep()
        calls = list(self.recorder.calls) if self.recorder is not None else []
        still = self.recorder.still if self.recorder is not None else ()
        self._writes_unsynced = self._writes() - self._writes_at_start
        companion = self._layout.companion  # its copies differ at the border of a round too
        unsynced = clock.step + self._writes_unsynced + int(companion is not None and companion.shown)
        reports = self._handshake.run(purpose, clock, [len(calls), unsynced])
        self._warmup_hooks.remove()
        plan = sync_plan()
        if keep:
            self.full.remember(self._own_tensors())
        changed = any(changes for _, changes in reports)  # otherwise what several workers hold is equal already
        self._sync.assemble(plan, kind, unequal=changed)
        self.full.open(calls if all(recorded for recorded, _ in reports) else [], still, kind, plan.left_out)

    def put_back(self, round: int) -> None:
        """Go back to this worker's part in ``round``, bit for bit; what user code has written stays. Sends nothing."""
        self._writes_unsynced += len(self.full.written())
        self.full.close()
        self._sync.make_room(round)
        self.full.restore()
        self._writes_at_start = self._writes() - self._writes_unsynced
        self._hook_warmup(round)

    def _writes(self) -> int:
        """Moves whenever a shared parameter or counter is written to."""
        return sum(version(tensor) for tensor in self._layout.shared.values())

    def _own_tensors(self) -> list[Tensor]:
        return [*self._layout.shared.values(), *self._sync.owned_tensors()]

    def _hook_warmup(self, round: int) -> None:
        self._warmup_hooks.remove()
        if self._layout.is_warmup(round):
            self._warmup_hooks = ScaleHooks(self._layout.blocks, self._layout.scale)
