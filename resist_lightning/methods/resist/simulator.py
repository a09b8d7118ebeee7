"""The reference simulator of ResIST: S workers in one process, as plain as the paper.

Each worker is a complete copy of the network that skips the blocks it lacks; a sync is a loop over names. It shares
with the engine the partition, the choice of blocks, scaling and recalibration, and for compressed parameters their
encoding and the owners of blocks; the rest of the engine is tested against it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from resist_lightning.comm.quantize import Quantizer, compressible, make_quantizer, noise_for
from resist_lightning.comm.unit_vectors import normalise, unit_vectors
from resist_lightning.methods.config import NormPolicy
from resist_lightning.methods.resist.bypass import Bypass
from resist_lightning.methods.resist.config import Config
from resist_lightning.methods.resist.first_forward import FirstForward
from resist_lightning.methods.resist.folding import fold, foldable, folded
from resist_lightning.methods.resist.layout import BlockLayout
from resist_lightning.methods.resist.network import select_blocks
from resist_lightning.methods.resist.scaling import ScaleHooks
from resist_lightning.methods.resist.simulated_mean import SimulatedMean
from resist_lightning.methods.resist.simulated_momentum import block_momenta, forget_momenta, move_momenta
from resist_lightning.methods.resist.simulated_outer import SimulatedOuter
from resist_lightning.methods.resist.simulated_overlap import SimulatedTransit
from resist_lightning.methods.simulation import (
    SimulatedWorker,
    clock_of,
    flat_of,
    mean_or_maximum,
    pieces_of,
    recalibrate_together,
)
from resist_lightning.schedule.transfers import SyncPlan, plan_outer
from resist_lightning.state.batch_norm import BatchStatistics, norms_with_statistics
from resist_lightning.state.input_recorder import InputRecorder


class Simulator:
    """Trains S simulated workers on one device.

    ::

        simulator = Simulator(model, lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9), Config(), workers=4)
        for batches in zip(*loaders):                       # one loader per worker
            for worker, (x, y) in zip(simulator.workers, batches):
                worker.optimizers[0].zero_grad()
                loss_function(worker.module(x), y).backward()
                worker.optimizers[0].step()
            simulator.after_step()
        evaluate(simulator.full_model())

    Args:
        module: the network; it is copied, not changed.
        make_optimizers: builds the optimizer(s) of a copy.
        config: the settings, as for the engine.
        workers: number of simulated workers, at least 1.
        total_steps: local steps of the run, where the settings need them (``finish_rounds``).

    Raises:
        ValueError: if settings or module do not fit the method, or counts or overlap depend on measured times.
    """

    def __init__(
        self,
        module: nn.Module,
        make_optimizers: Callable[[nn.Module], Optimizer | Sequence[Optimizer]],
        config: Config,
        workers: int,
        total_steps: int | None = None,
    ) -> None:
        if config.blocks_per_worker == "auto":
            raise ValueError("blocks_per_worker='auto': simulated workers have no speed. List a count for each worker.")
        if config.overlap == "auto":
            raise ValueError("overlap='auto': simulated syncs take no time. Give a number of local steps.")
        layout = BlockLayout(module, config, workers)
        self.config = config
        self.scale = layout.scaling.scale
        self._template = copy.deepcopy(module)
        self._forwards: list[list[Any]] = []  # by worker and block; None where it is the class's
        self.workers = [self._make_worker(copy.deepcopy(module), make_optimizers) for _ in range(workers)]
        self.config = config = config.for_optimizers(self.workers[0].optimizers)
        self.clock = clock_of(config, self.workers, self._overlap_of)
        layout.plan_end(self.clock, total_steps)
        self.schedule = layout.schedule
        self._block_of: dict[str, int] = {}
        for number, block in enumerate(layout.blocks):
            self._block_of.update(dict.fromkeys(block.tensors(), number))
        self._fragments = layout.fragments
        self._overlap_of_blocks = layout.overlap_of_blocks
        self._partial = layout.partial
        self._scale_hooks: list[ScaleHooks] = []
        self._wire = make_quantizer(config.wire, feedback=config.feedback) if workers > 1 else None
        self._joint = SimulatedMean(self._wire, workers) if self._wire is not None else None
        self._outer = SimulatedOuter(config, workers)
        self._transit: SimulatedTransit | None = None
        self._begin_round(self.workers[0].copies())

    def after_step(self) -> None:
        """Count a local step of all workers, and sync if the round is complete."""
        self.clock.tick()
        if self.clock.at_border and self._transit is None:
            self._transit = self._begin_sync()
        if self._transit is None:
            return
        if not self._transit.blocks_left and self.clock.steps_left <= self._overlap_of_blocks(self.clock.overlap):
            self._send_blocks(self._transit)
        if self.clock.due:
            self._end_sync(self._transit)

    def full_model(self, batch_norm: NormPolicy | None = None, scale: float | None = None) -> nn.Module:
        """A copy of the full model: mean over holders, scaled, with batch-norm statistics by the policy.

        Args:
            batch_norm: another policy than that of the settings, for comparisons on one training.
            scale: another test-time scale, in (0, 1].
        """
        batch_norm = batch_norm or self.config.batch_norm
        scale = self.scale if scale is None else scale
        state = self._means()
        full = copy.deepcopy(self._template)
        blocks = select_blocks(full, self.config.blocks)
        with torch.no_grad():
            for name, tensor in [*full.named_parameters(), *full.named_buffers()]:
                tensor.copy_(state[name])
        self._agree()
        for block, known in zip(blocks, self.workers[0].blocks, strict=True):
            block.seen.take(known.seen)
        if scale != 1:
            fold(folded(blocks), scale)
            ScaleHooks([block for block in blocks if not foldable(block)], scale)
        if batch_norm == "batch":
            BatchStatistics(norms_with_statistics(full).values())
        elif batch_norm == "recalibrate" and self._partial and all(w.recorder.calls for w in self.workers):
            recalibrate_together(self.workers[:1] if self.config.first_evaluates else self.workers, full)
        return full

    def _make_worker(self, module: nn.Module, make_optimizers: Callable[[nn.Module], Any]) -> SimulatedWorker:
        made = make_optimizers(module)
        optimizers = [made] if isinstance(made, Optimizer) else list(made)
        blocks = select_blocks(module, self.config.blocks)
        FirstForward(blocks, module)
        # A wrapper of torch.compile has its forward as an attribute, as code of the user's may.
        self._forwards.append([vars(block.module).get("forward") for block in blocks])
        return SimulatedWorker(module, optimizers, blocks, InputRecorder(module, self.config.recalibration_batches))

    def _overlap_of(self, round: int) -> int:
        return self.schedule.overlaps.of_round(round)

    def _begin_sync(self) -> SimulatedTransit:
        """Average the tensors that all workers hold."""
        round = self.clock.round
        before, after = self.schedule.partition(round), self.schedule.partition(round + 1)
        plan = self.schedule.plan(round)
        transit = SimulatedTransit(before, after, plan, self._block_of, waits=not self.clock.overlap)
        covered = self._fragments.within(plan.fragment, self.workers[0].tensors())
        names = {name for name in covered if self._block_of.get(name) not in plan.owner}
        sent = self._joint_means(plan, names) if self._wire is not None else {}
        self._send(transit, names, sent)
        if any(self.schedule.training_scale(round + ahead, self.scale) != 1 for ahead in (0, 1)):
            self._agree()
        return transit

    def _send_blocks(self, transit: SimulatedTransit) -> None:
        """Merge and hand over the blocks that not all workers hold."""
        round, plan, blocks = self.clock.round, transit.plan, self.workers[0].blocks
        transit.blocks_left = True
        names = {name for name, block in self._block_of.items() if block in plan.owner}
        sent = self._block_means(self._wire, plan) if self._wire is not None else {}
        self._send(transit, names, sent)
        if self._wire is not None:
            following = self.schedule.coming_plan(plan.fragment, round + 1)
            self._outer.send(self._wire, round, blocks, plan_outer(plan, following, len(self.workers)))
        if self.config.momentum == "travel":
            transit.momenta = block_momenta(self.workers, transit.before.held, self._block_of)

    def _send(self, transit: SimulatedTransit, names: Collection[str], sent: Mapping[str, Tensor]) -> None:
        """Put the results of a sync for some tensors into a transit; ``sent``: those of compressed ones."""
        exact = {name: mean for name, mean in self._means().items() if name in names and name not in sent}
        transit.values.update({**sent, **self._outer.step(exact)})
        if not transit.waits:
            for own, worker in zip(transit.own, self.workers, strict=True):
                own.update({name: tensor for name, tensor in worker.copies().items() if name in names})

    def _end_sync(self, transit: SimulatedTransit) -> None:
        before, after, self._transit = transit.before, transit.after, None
        self.clock.next_round()
        for index, worker in enumerate(self.workers):
            transit.apply(index, worker.tensors())
            stays = set(before.held[index]) & set(after.held[index])
            everywhere: set[int] = set()
            for block in stays:
                if len(before.holders(block)) == len(after.holders(block)) == len(self.workers):
                    everywhere.add(block)
            # Under "travel", each block comes with the mean state, except blocks that do not move at all.
            kept = stays if self.config.momentum == "keep" else everywhere
            covered = self._fragments.within(transit.plan.fragment, worker.tensors())
            if self.config.momentum != "reset":
                move_momenta(worker, self._block_of, covered, kept, set(after.held[index]), transit.momenta)
            elif transit.plan.fragment is None:
                worker.restart_optimizers()
            else:
                forget_momenta(worker, covered)
        self._begin_round(transit.values)

    def _agree(self) -> None:
        """Give all workers each block's branch ends, as the first worker that found any has them."""
        for blocks in zip(*(worker.blocks for worker in self.workers), strict=True):
            known = [block.seen.ends for block in blocks if block.seen.ends is not None]
            for block in blocks if known else ():
                block.seen.ends = next((ends for ends in known if ends), ())

    def _means(self) -> dict[str, Tensor]:
        """Every tensor's mean over the workers that held it (the paper's formula); integers: the maximum."""
        partition = self.schedule.partition(self.clock.round)
        everyone = tuple(range(len(self.workers)))
        copies = [worker.tensors() for worker in self.workers]
        vectors = unit_vectors(self.workers[0].module)
        means: dict[str, Tensor] = {}
        for name in copies[0]:
            block = self._block_of.get(name)
            holders = everyone if block is None else partition.holders(block)
            mean = mean_or_maximum([copies[worker][name] for worker in holders])
            if name in vectors and len(holders) > 1:
                normalise([mean])  # the mean of unit vectors is shorter
            means[name] = mean
        return means

    def _joint_means(self, plan: SyncPlan, names: Collection[str]) -> dict[str, Tensor]:
        """The means of trainable parameters that all workers average, which are sent compressed."""
        assert self._joint is not None
        copies = [worker.tensors() for worker in self.workers]
        # In the order of the message: shared tensors, then the blocks that all hold.
        blocks = [name for block in plan.averaged for name in self.workers[0].blocks[block].tensors()]
        order = [*(name for name in copies[0] if name not in self._block_of), *blocks]
        joint = [name for name in order if name in names]
        others = {name for name in copies[0] if not self._fragments.covers(plan.fragment, name)}
        return self._outer.step(self._joint.of(joint, copies, others))

    def _block_means(self, wire: Quantizer, plan: SyncPlan) -> dict[str, Tensor]:
        """The owners' values of trainable parameters in blocks that have an owner, which are sent compressed."""
        copies, means = [worker.tensors() for worker in self.workers], {}
        for block, root in plan.owner.items():
            tensors = self.workers[0].blocks[block].tensors()
            names = [name for name, tensor in tensors.items() if compressible(tensor)]
            if names:
                means.update(self._block_over(wire, plan, block, root, names, copies))
        return means

    def _block_over(
        self, wire: Quantizer, plan: SyncPlan, block: int, root: int, names: list[str], copies: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """A block's value: the owner's mean with the other holders' compressed values, compressed if it is sent on."""

        def sent_by(worker: int, values: Tensor) -> Tensor:
            noise = noise_for(self.config.seed, self.clock.round, block, worker, values.device)
            return wire.for_values.through(values, noise)

        own = {name: copies[root][name] for name in names}
        held = []
        for transfer in plan.merge:
            if transfer.block == block:
                values = {name: copies[transfer.source][name] for name in names}
                held.append(sent_by(transfer.source, flat_of(values)))
        value = flat_of(own)
        if held:
            # In the order of the owner's computation: after another rounding error it may be quantised differently.
            value = value + torch.stack([values - value for values in held]).sum(0) / (len(held) + 1)
        value = flat_of(self._outer.step(pieces_of(value, own)))
        if any(transfer.block == block for transfer in plan.hand_over):
            value = sent_by(root, value)
        return pieces_of(value, own)

    def _begin_round(self, agreed: Mapping[str, Tensor]) -> None:
        """Begin a round with values that all workers share, from which their changes and outer steps count."""
        partition = self.schedule.partition(self.clock.round)
        self._outer.begin_round(self.workers[0].module, agreed)
        if self._joint is not None:
            self._joint.begin_round(agreed, self.workers[0].tensors())
        for hooks in self._scale_hooks:
            hooks.remove()
        scale = self.schedule.training_scale(self.clock.round, self.scale)
        self._scale_hooks = []
        for worker, forwards, held in zip(self.workers, self._forwards, partition.held, strict=True):
            self._scale_hooks.append(ScaleHooks([worker.blocks[number] for number in held], scale, wait=True))
            for number, (block, own) in enumerate(zip(worker.blocks, forwards, strict=True)):
                for parameter in block.module.parameters():
                    parameter.grad = None  # an absent block has none, so optimizers leave it alone
                vars(block.module).pop("forward", None)
                if own is not None:
                    vars(block.module)["forward"] = own
                if number not in held:
                    block.module.forward = Bypass(block.name, block.module, block.seen, written=True)
