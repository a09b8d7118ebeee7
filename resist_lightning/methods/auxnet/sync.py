"""The sync of AuxNet: a worker holds its stage in all rounds, and receives the others for the full model only."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from resist_lightning.comm.collective import Collective, Finish
from resist_lightning.comm.payload import Payload
from resist_lightning.errors import PartialModelError
from resist_lightning.methods.auxnet.layout import StageLayout
from resist_lightning.methods.auxnet.step.spans import NAMES, measured_speedup, step_seconds, typical_step
from resist_lightning.methods.auxnet.step.worker import StageWorker
from resist_lightning.methods.sync import Sync
from resist_lightning.schedule.transfers import SyncPlan, plan_assembly, plan_sync
from resist_lightning.state.memory import Memory
from resist_lightning.state.optimizer_state import OptimizerStates

_ROUNDING = 1e-3  # share of a norm by which workers on unlike machines may differ in a round


class StageSync(Sync[StageLayout, SyncPlan]):
    """A worker's side of the syncs of an AuxNet run; see :class:`Sync`.

    Attributes:
        stage_worker: computes this worker's stage; None with one worker, and before the training.
    """

    def __init__(
        self,
        layout: StageLayout,
        states: OptimizerStates,
        collective: Collective,
        device: torch.device,
    ) -> None:
        super().__init__(layout, states, collective, device)
        self._collective = collective
        self._absent: dict[int, Memory] = {}  # the other workers' stages
        self._reports: list[list[float]] = []  # in the last round: for each worker its mismatch, then its seconds
        self._history: list[Any] = []
        self._holding = False  # whether the module is this worker's stage alone
        self._forward: Any = None  # the user's forward, if it was set on the object
        self._warned = False  # of layers outside that differ
        self._guards: list[RemovableHandle] = []
        self.stage_worker: StageWorker | None = None

    @override
    def keep_own_parts(self, round: int) -> None:
        super().keep_own_parts(round)
        layout, chain = self._layout, self._layout.chain
        if chain is None:
            return
        first, last = layout.units(self._worker)
        self.stage_worker = StageWorker(
            chain.stage(first, last),
            layout.boundary_shapes,
            # Worker 0 has no boundary before its stage.
            layout.nonnegative[self._worker - 1] if self._worker else False,
            layout.config,
            collective=self._collective,
            device=self._device,
            rate=self._states.rate,
        )

    @override
    def end(self) -> None:
        super().end()
        self._restore_forward()
        for memory in self._absent.values():
            memory.absence.end(self.incomplete)

    @override
    def end_step(self) -> None:
        if self.stage_worker is not None:
            self.stage_worker.end_step()

    @override
    def state_dict(self, *, with_full_model: bool) -> dict[str, Any]:
        # Late gradients can be saved, graphs cannot.
        self._settle()
        stage = self.stage_worker.state_dict() if self.stage_worker is not None else {}
        return {**super().state_dict(with_full_model=with_full_model), "stage": stage}

    @override
    def load_state_dict(self, own: dict[str, Any]) -> None:
        super().load_state_dict(own)
        if self.stage_worker is not None:
            self.stage_worker.load_state_dict(own["stage"])

    @override
    def plan(self, round: int, left_out: tuple[int, ...]) -> SyncPlan:
        before, after = self._layout.partition(round), self._layout.partition(round + 1)
        return plan_sync(before, after, left_out)

    @override
    def start_average(self, plan: SyncPlan) -> Finish:
        # One worker can tell whether any other's differ, by their mean.
        mine: dict[str, Tensor] = {}
        if self._worker == 0 and not self._warned:
            for name, tensor in self._averaged(plan).items():
                if isinstance(tensor, nn.Parameter):
                    mine[name] = tensor.detach().clone()
        finish = super().start_average(plan)

        def finish_and_compare() -> None:
            finish()
            self._warn_if_apart(mine)

        return finish_and_compare

    def _warn_if_apart(self, mine: dict[str, Tensor]) -> None:
        apart: list[str] = []
        for name, before in mine.items():
            mean = self._layout.shared[name].detach()
            if (mean - before).norm() > _ROUNDING * mean.norm():
                apart.append(name)
        if apart:
            self._warned = True
            warnings.warn(
                f"{apart[0]}, outside of the network that is cut, differed between the workers before a handshake, "
                "which has averaged it: between two handshakes they did not train it alike. Reasons are clipping by "
                "the norm of a worker's own gradients (clip by value), random numbers that differ between workers, and "
                "code that depends on the rank.",
                stacklevel=2,
            )

    @override
    def replicated_tensors(self, round: int) -> dict[str, Tensor]:
        return self._layout.shared

    @override
    def owned_tensors(self) -> list[Tensor]:
        return list(self._layout.stage_tensors(self._worker).values())

    @override
    def hand_over(self, plan: SyncPlan, round: int) -> None:
        # Stages never move; the workers only exchange their measurements of the round.
        if self.stage_worker is not None:
            self._reports = self._collective.gather_numbers(self.stage_worker.report())
            self._history.append([round, self.metrics()])

    @override
    def assemble(self, plan: SyncPlan, kind: str, *, unequal: bool, at_first: bool) -> None:
        assert not at_first  # its settings cannot ask for it
        if self.stage_worker is not None:
            # Messages of the last batch may still be in transit.
            self.stage_worker.finish()
            self._settle()
            self.stage_worker.spans.pause()
        plan = plan_assembly(plan, self._worker, self._layout.workers)
        if unequal:
            replicas = list(self._averaged(plan).values())
            self.exchange.average(replicas, kind, plan.left_out)
        self.exchange.hand_over(plan, self._payload, self._hold_all, kind)

    @override
    def make_room(self, round: int) -> None:
        """Hold this worker's stage alone, and compute it when the network is called."""
        layout, chain = self._layout, self._layout.chain
        if chain is None or self._holding:
            return
        absent: dict[str, Tensor] = {}
        for worker in range(layout.workers):
            if worker == self._worker:
                continue
            tensors = layout.stage_tensors(worker)
            absent.update(tensors)
            if worker not in self._absent:
                self._absent[worker] = self._memory_of(worker, tensors)
        # Other workers train these: optimizer state for them would only take memory.
        parameters = [tensor for tensor in absent.values() if isinstance(tensor, nn.Parameter)]
        self._states.drop(parameters)
        for memory in self._absent.values():
            memory.free()
        if layout.companion is not None:
            layout.companion.hold([*layout.shared, *layout.stage_tensors(self._worker)])
        self._replace_forward(chain.network, absent)
        self._holding = True

    @override
    def metrics(self) -> dict[str, float]:
        """Mismatch of each boundary, and speed-up over one process, predicted and measured, in the round that ended."""
        if not self._reports:
            return {}
        found = {}
        guessed = not self._layout.config.delayed
        for boundary in range(1, self._layout.workers if guessed else 1):
            found[f"auxnet/mismatch_{boundary}"] = self._reports[boundary][0]
        spans = self._span_seconds()
        seconds = step_seconds(spans)
        if seconds is not None:
            found["auxnet/speedup_predicted"] = seconds.predicted(self._layout.workers)
            found["auxnet/speedup_measured"] = measured_speedup(spans)
        return found

    @override
    def summary(self) -> dict[str, Any]:
        """The stages, the measurements of each round, and the timeline of a typical step."""
        layout = self._layout
        if self.stage_worker is None:
            return {}
        recent = json.dumps(list(self.stage_worker.spans.recent)).encode()
        rows = self._collective.gather_bytes(recent)
        held = self._collective.gather_numbers([self.stage_worker.held_bytes])
        return {
            "stages": layout.parts(),
            "shapes": [list(shape) for shape in layout.boundary_shapes.boundaries],
            "method": layout.config.method,
            "guess_bytes": [int(row[0]) for row in held],
            "rounds": self._history,
            "seconds": self._span_seconds(),
            "timeline": typical_step([json.loads(row) for row in rows]),
        }

    def _settle(self) -> None:
        """Compute backward passes to come. Collective: every worker must call this, in the same order."""
        if self.stage_worker is not None and self.stage_worker.delayed is not None:
            self.stage_worker.delayed.settle()
            self.stage_worker.spans.pause()

    def _span_seconds(self) -> list[dict[str, float]]:
        """For each worker, the mean seconds of its spans in a step of the round that ended."""
        seconds: list[dict[str, float]] = []
        for _, *spans in self._reports:
            named: dict[str, float] = dict(zip(NAMES, spans, strict=True))
            seconds.append(named)
        return seconds

    def _payload(self, stage: int) -> Payload:
        return Payload(list(self._layout.stage_tensors(stage).values()))

    def _owners(self, tensors: Iterable[str]) -> dict[str, nn.Module]:
        """The modules that own some tensors, by name."""
        owners = {name.rpartition(".")[0] for name in tensors}
        return {owner: self._layout.module.get_submodule(owner) for owner in owners}

    def _memory_of(self, worker: int, tensors: dict[str, Tensor]) -> Memory:
        memory = Memory(tensors, self._owners(tensors))
        memory.absence.reason = f"it belongs to the stage of worker {worker}, and this is worker {self._worker}"
        return memory

    def _hold_all(self) -> None:
        if self._holding:
            for memory in self._absent.values():
                memory.allocate()
            self._restore_forward()

    def _replace_forward(self, network: nn.Module, absent: dict[str, Tensor]) -> None:
        """Have a call of the network compute this worker's stage, and refuse calls of the absent parts."""
        self._forward = vars(network).get("forward")
        network.forward = torch.compiler.disable(self._train_stage)
        # The network itself may own tensors, and must be called: it computes this worker's stage.
        parts = set(self._owners(absent).values()) - {network}
        self._guards = [part.register_forward_pre_hook(self._refuse_part) for part in parts]

    def _restore_forward(self) -> None:
        if not self._holding or self._layout.chain is None:
            return
        network = self._layout.chain.network
        for guard in self._guards:
            guard.remove()
        # Once it is deleted from the object, the class's forward shows again.
        if self._forward is None:
            del network.forward
        else:
            network.forward = self._forward
        self._holding = False

    def _train_stage(self, x: Tensor, *others: Any, **options: Any) -> Tensor:
        chain = self._layout.chain
        assert chain is not None
        assert self.stage_worker is not None
        # Outside of a training step the call would take part in the next step's late gradients, or guesses.
        in_step = self.part_guard.stepping is not False
        if not (in_step and chain.network.training and torch.is_grad_enabled()):
            raise PartialModelError(
                f"worker {self._worker} has one stage of {chain.name or 'the module'} only, and was asked to evaluate "
                "it: outside training_step, in eval mode, or without gradients. Evaluate in validation hooks or inside "
                "`engine.full_model()`; to train with frozen batch norms, set those to eval mode, not the network."
            )
        given = [value for value in options.values() if value is not None]
        if others or given:
            raise PartialModelError("the network was cut for one input; call it with that tensor alone.")
        return self.stage_worker(x)

    def _refuse_part(self, part: nn.Module, _: Any) -> None:
        chain = self._layout.chain
        assert chain is not None
        raise PartialModelError(
            f"worker {self._worker} was asked to compute a {type(part).__name__} of another worker's stage. Call "
            f"{chain.name or 'the module'} as a whole in training, not its parts; or name with network= the part that "
            "is called."
        )
