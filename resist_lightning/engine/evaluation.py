"""Assembles the full model in a module that is training, to evaluate or save it, and puts the worker's part back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from resist_lightning.checks.handshake import Handshake
from resist_lightning.checks.hashing import mark
from resist_lightning.checks.header import Purpose
from resist_lightning.comm.mean import mean_inside
from resist_lightning.methods.layout import Layout
from resist_lightning.methods.sync import Plan, Sync
from resist_lightning.schedule.progress import Clock
from resist_lightning.state.absent import ENDED_ELSEWHERE
from resist_lightning.state.batch_norm import BatchStatistics, Call, norms_with_statistics, recalibrate
from resist_lightning.state.input_recorder import InputRecorder
from resist_lightning.state.own_tensors import OwnTensors, versions

_NOT_RECORDED = (
    "batch norm keeps its running statistics: the network was only called without gradients, so no input was recorded "
    "to re-estimate them. Under checkpoint(..., use_reentrant=True) of the whole network use use_reentrant=False."
)
_NOT_SAVED = (
    "the file has no inputs of the network, on which batch norm is re-estimated: they are of a class that files cannot "
    "hold, or its run did not record them. The first evaluations after the resume have fewer inputs than those of an "
    "uninterrupted run; the training is exact."
)


class Observation:
    """Turns a worker's part into the full model, and back.

    The full model differs from the mean of the workers' weights in its test-time scale and batch-norm statistics.

    Attributes:
        active: whether the full model is assembled now.
        whole: whether it is assembled here; else worker 0 alone has it, and this worker's module stays its part.
        own: copies of this worker's part.
    """

    def __init__(
        self,
        layout: Layout,
        sync: Sync[Any, Any],
        handshake: Handshake,
        device: torch.device,
        forward_context: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.active = self.whole = False
        self._layout = layout
        self._sync = sync
        self._handshake = handshake
        self._device = device
        self._forward_context = forward_context
        self._recorder: InputRecorder | None = None
        self._warned = False
        self.own = OwnTensors(layout.module)
        # Counters of writes to shared tensors: from the beginning of the round, and since, up to this observation.
        self._writes_at_start = self._writes_unsynced = 0
        self._originals: dict[str, Tensor] = {}
        self._statistics: dict[str, Tensor] = {}
        self._batch_statistics = BatchStatistics([])

    def start(self) -> None:
        """Begin to record inputs where batch norm will be re-estimated; called once, when training starts."""
        config = self._layout.config
        if config.batch_norm == "recalibrate" and self._layout.partial and not self._elsewhere(config.first_evaluates):
            self._recorder = InputRecorder(self._layout.module, config.recalibration_batches)

    def end(self) -> None:
        """Stop recording; called once, when training has ended."""
        if self._recorder is not None:
            self._recorder.remove()
        self._recorder = None

    def begin_round(self) -> None:
        """Note the state at the beginning of the round."""
        self._writes_at_start = self._writes()
        self._handshake.divergence.frozen.note(self._sync.unsettled)

    def state_dict(self) -> dict[str, Any]:
        """This worker's tensors as in training, recorded inputs, and number of writes since the last sync."""
        unsynced = self._writes_unsynced
        # While the full model is assembled, here or on worker 0, own tensors may lie beside the assembled ones.
        own = self.own.as_in_training() if self.active else {}
        named = self._layout.tensors.registered()
        if self.whole:
            tensors = {name: own[id(tensor)] for name, tensor in named.items() if id(tensor) in own}
        else:
            tensors = {name: own.get(id(tensor), tensor) for name, tensor in named.items() if not tensor.is_meta}
        if self.active:
            unsynced += len(self.own.written())
        return {
            "tensors": {name: tensor.detach().cpu() for name, tensor in tensors.items()},
            "inputs": self._recorder.state_dict() if self._recorder is not None else None,
            "unsynced": unsynced,
        }

    def load_state_dict(self, own: dict[str, Any]) -> None:
        """Resume in the middle of a round, after :meth:`begin_round`."""
        if self._recorder is not None and own["inputs"] is not None:
            self._recorder.load_state_dict(own["inputs"], self._device)
        elif self._recorder is not None and self._sync.exchange.collective.rank == 0:
            warnings.warn(_NOT_SAVED, stacklevel=4)
        self._writes_at_start = self._writes() - own["unsynced"]

    def note_weights(self) -> None:
        """Copy the weights before code runs that may exchange them for an evaluation. Sends nothing."""
        if self._elsewhere(self._layout.config.first_evaluates):
            return  # nothing will be put back here
        with torch.inference_mode(False):
            self._layout.tensors.keep()
            self.own.note(self._own_tensors())

    def assemble(self, purpose: Purpose, clock: Clock, kind: str, *, keep: bool) -> None:
        """Make the module the full model, as if the round ended here.

        Collective: every worker must call this, in the same order.

        Args:
            purpose: the purpose, which all workers compare.
            clock: this worker's position in the run.
            kind: name under which the bytes are counted.
            keep: whether :meth:`put_back` will be called.
        """
        if self.active:  # it would be scaled twice
            raise RuntimeError("the module is the full model already; leave `full_model()` first.")
        self._layout.tensors.keep()
        calls: list[Call] = []
        still: Collection[str] = ()
        if self._recorder is not None:
            calls, still = list(self._recorder.calls), self._recorder.still
            if self._recorder.missed and not calls and not self._warned:
                self._warned = True
                warnings.warn(_NOT_RECORDED, stacklevel=5)
        self._writes_unsynced = self._writes() - self._writes_at_start
        changes = clock.step + self._writes_unsynced
        companion = self._layout.companion
        differ_between_rounds = companion is not None and companion.shown  # the workers' copies
        if differ_between_rounds or not self._layout.config.equal_after_sync:
            changes += 1
        changes = changes or int(self.own.swapped_since_note(self._own_tensors()))  # averages, right after a sync
        reports = self._handshake.run(purpose, clock, [len(calls), changes])
        # After the handshake, which may leave workers out.
        plan: Plan = self._sync.plan_full_model(clock.round, self._handshake.divergence.left_out)
        at_first = self._at_first(purpose)
        elsewhere = self._elsewhere(at_first)
        if keep and (not elsewhere or plan.left_out or self._sync.writes_to_assemble(plan)):
            self.own.keep(self._own_tensors())  # before the averages of `assemble` overwrite them
        # Where no worker has stepped or written, replicas are equal already, and need not be averaged.
        unequal = any(changes for _, changes in reports)
        self._sync.assemble(plan, kind, unequal=unequal, at_first=at_first)
        self.active, self.whole = True, not elsewhere
        if elsewhere:
            return
        if self._layout.config.first_evaluates:  # each worker that estimates needs inputs of its own
            reports = reports[: self._sync.exchange.collective.members]
        estimate = all(recorded for recorded, _ in reports)
        # Before they are estimated, for resuming from a checkpoint of this full model.
        buffers = self._norm_buffers()
        self._statistics = {name: buffer.detach().clone() for name, buffer in buffers.items()}
        self._originals = self._layout.scaling.apply()
        # Statistics are estimated last, as they depend on the scale.
        if self._layout.config.batch_norm == "batch":
            self._batch_statistics = BatchStatistics(norms_with_statistics(self._layout.module).values())
        elif estimate:
            estimated = recalibrate(self._layout.module, calls, self._forward_context, still) if calls else []
            self._share_estimates(estimated, None if at_first else kind, plan.left_out)
        self.own.watch(self._layout.scaling.tensors().keys() | buffers.keys())

    def put_back(self, round: int) -> None:
        """Return to this worker's part in ``round``, bit for bit; writes by user code stay. Sends nothing."""
        self._writes_unsynced += len(self.own.written())
        whole = self.whole
        self._batch_statistics.remove()
        self._layout.scaling.take_off()
        # Before make_room, which gives tensors new memory, as a write by the user's code would.
        written = self._close()
        if self._layout.companion is not None:
            self._layout.companion.keep(written)
        if whole:
            self._sync.make_room(round)
        self.own.restore()
        self._writes_at_start = self._writes() - self._writes_unsynced

    def settle(self) -> None:
        """End the observation without a way back: the module stays the full model, with its hooks."""
        if not self.whole:
            self._sync.incomplete = ENDED_ELSEWHERE
        elif self._layout.companion is not None:
            self._layout.companion.settle()
        self._close()

    def written(self) -> Collection[str]:
        """Names of the tensors that the user's code has written in this observation; these writes stay."""
        return self.own.written().keys()

    def written_values(self) -> dict[str, Tensor]:
        """The values of :meth:`written`, on the CPU."""
        return {name: tensor.detach().cpu() for name, tensor in self.own.written().items()}

    def write(self, values: Mapping[str, Tensor]) -> None:
        """Write worker 0's :meth:`written_values` into the tensors that are present on this worker."""
        present = self.own.write(values)
        if self._layout.companion is not None:
            self._layout.companion.keep(present)

    def full_state(self) -> dict[str, Any]:
        """State for :meth:`undo` and :func:`attach_hooks`, without the weights of the full model."""
        return {
            **self._layout.scaling.state_dict(),
            "batch_statistics": self._layout.config.batch_norm == "batch",
            "originals": {name: tensor.cpu() for name, tensor in self._originals.items()},
            "norm_statistics": {name: tensor.cpu() for name, tensor in self._statistics.items()},
            "left": {name: mark(tensor) for name, tensor in self._not_as_trained().items()},
        }

    def undo(self, state: Mapping[str, Any]) -> None:
        """Turn weights of a full model back into weights to train, exactly.

        Tensors that have been written since, e.g. by loading other weights, are taken as they are.
        """
        buffers = self._norm_buffers()
        untouched: set[str] | None = None  # checkpoints without marks: treat all tensors
        if "left" in state:
            untouched = self._untouched(state["left"], {**self._layout.scaling.tensors_of(state), **buffers})
        self._layout.scaling.undo(state, untouched)
        with torch.no_grad():
            for name, statistic in state["norm_statistics"].items():
                if name in buffers and (untouched is None or name in untouched):
                    buffers[name].copy_(statistic)

    def _untouched(self, marks: Mapping[str, list[Any]], tensors: Mapping[str, Tensor]) -> set[str]:
        """Names of the tensors that have not been written since they were marked; warns if only some have been."""
        present = [name for name in marks if name in tensors]
        untouched = {name for name in present if mark(tensors[name], marks[name]) == marks[name]}
        written = sorted(set(present) - untouched)
        if untouched and written and self._sync.exchange.collective.rank == 0:
            warnings.warn(
                f"{len(written)} tensors of the full model were changed after it was assembled, e.g. {written[0]}: "
                f"their new values are trained on. The test-time scale is removed from the {len(untouched)} others, "
                "and batch-norm statistics return to their values in training. To start from the module as it is, use "
                "a new Trainer.",
                stacklevel=6,
            )
        return untouched

    def _close(self) -> Collection[str]:
        """End the observation; returns the names of tensors that the user's code has written in it."""
        self._originals, self._statistics = {}, {}
        self.active = self.whole = False
        return self.own.stop_watching()

    def _share_estimates(self, estimated: list[Tensor], kind: str | None, left_out: Sequence[int]) -> None:
        """Share batch-norm statistics among workers with the full model; ``kind`` is None if only worker 0 has it."""
        exchange = self._sync.exchange
        # The members of a worker have seen different batches; messages between workers must be equal on them.
        mean_inside(exchange.collective, estimated)
        if kind is not None and self._layout.config.first_evaluates:
            exchange.broadcast(list(self._norm_buffers().values()), kind)
        elif kind is not None:
            exchange.average(estimated, kind, left_out)

    def _not_as_trained(self) -> dict[str, Tensor]:
        """By name, the tensors whose values in the full model are not those in training."""
        scaling, buffers = self._layout.scaling, self._norm_buffers()
        found = dict(scaling.tensors())
        for name, statistic in self._statistics.items():
            if not torch.equal(buffers[name], statistic):
                found[name] = buffers[name]
        return found

    def _norm_buffers(self) -> dict[str, Tensor]:
        found = {}
        for name, norm in norms_with_statistics(self._layout.module).items():
            for key, buffer in norm.named_buffers(recurse=False):
                found[f"{name}.{key}" if name else key] = buffer
        return found

    def _at_first(self, purpose: Purpose) -> bool:
        """Whether worker 0 alone gets the full model."""
        config, ending = self._layout.config, purpose == Purpose.FINISH
        return self._layout.workers > 1 and (config.first_ends if ending else config.first_evaluates)

    def _elsewhere(self, at_first: bool) -> bool:
        """Whether the full model is not assembled here, where worker 0 alone may get it."""
        return at_first and self._sync.exchange.collective.worker > 0

    def _writes(self) -> int:
        return versions(self._layout.shared.values())

    def _own_tensors(self) -> list[Tensor]:
        return [*self._layout.shared.values(), *self._sync.owned_tensors()]
