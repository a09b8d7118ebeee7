"""The layout of ResIST: residual blocks are partitioned among the workers, and all other tensors are shared."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from resist_lightning.comm.byte_formulas import WIRE_FORMATS
from resist_lightning.comm.collective import Collective
from resist_lightning.comm.packing import packed_bytes
from resist_lightning.comm.quantize import compressible, is_vector
from resist_lightning.comm.tensors import averaged_bytes_by_type, named_tensors
from resist_lightning.methods.globs import summary
from resist_lightning.methods.layout import Layout
from resist_lightning.methods.residual import parameters_of
from resist_lightning.methods.resist.bypass import compiled_as_a_whole
from resist_lightning.methods.resist.bytes import Sizes
from resist_lightning.methods.resist.config import Config, make_schedule, plan_end
from resist_lightning.methods.resist.folding import foldable
from resist_lightning.methods.resist.fragments import Fragments, mean_of_holders
from resist_lightning.methods.resist.layout_warnings import warn_about_settings
from resist_lightning.methods.resist.network import select_blocks
from resist_lightning.methods.resist.overview import alternatives, costs
from resist_lightning.methods.resist.overview_text import brief, brief_of_shared
from resist_lightning.methods.resist.scaling import BranchScaling, coverage
from resist_lightning.methods.resist.seen_ends import agree_on_ends, assume_ends, ends_of
from resist_lightning.schedule.overlap import Overlaps, overlap_of_blocks
from resist_lightning.schedule.partition import Partition
from resist_lightning.schedule.progress import Clock
from resist_lightning.schedule.stages import never_divided
from resist_lightning.state.compiled import compiled_around
from resist_lightning.state.optimizer_state import OptimizerStates
from resist_lightning.state.outer import has_outer_step, outer_bytes


class BlockLayout(Layout):
    """The partitionable blocks of a model, and the workers that train them in each round.

    Raises:
        BlockSelectionError: if the blocks cannot be chosen as asked, or lie in code that is compiled as a whole.
        ValueError: if ``min_blocks`` or ``blocks_per_worker`` does not fit the number of blocks, or the module
            synchronises batch norm.
    """

    def __init__(self, module: nn.Module, config: Config, workers: int, trained: Collection[int] | None = None) -> None:
        super().__init__(module, config, workers, trained)
        self.config: Config = config
        self.blocks = select_blocks(module, config.blocks, trained)
        count = len(self.blocks)
        self.schedule = make_schedule(config, count, workers)
        self.scaling = BranchScaling(
            self.blocks, coverage(self.schedule) if config.test_scale is None else config.test_scale
        )
        if self.partial:
            self._refuse_compiled()
        # Whether all workers know where the branches end: at once where the classes tell.
        self._agreed = all(map(foldable, self.blocks))
        self._warned = False
        in_blocks: set[int] = set()
        for block in self.blocks:
            in_blocks.update(map(id, block.tensors().values()))
        # By identity, as a tensor may have several names.
        self.shared = {name: tensor for name, tensor in named_tensors(module).items() if id(tensor) not in in_blocks}
        self.fragments = Fragments(self.shared, self.blocks, config.fragments)

    @override
    def partition(self, round: int) -> Partition:
        return self.schedule.partition(round)

    @property
    @override
    def overlaps(self) -> Overlaps:
        return self.schedule.overlaps

    def overlap_of_blocks(self, overlap: int) -> int:
        """The local steps at the end of a sync's overlap during which blocks are in transit."""
        blocks = sum(tensor.nbytes for block in self.blocks for tensor in block.tensors().values())
        shared = sum(tensor.nbytes for tensor in self.shared.values())
        return overlap_of_blocks(overlap, shared, round(blocks * coverage(self.schedule)))

    @override
    def held_parameters(self, round: int) -> list[int]:
        sizes = [sum(parameter.numel() for parameter in parameters_of([block])) for block in self.blocks]
        shared = sum(parameter.numel() for parameter in self.module.parameters()) - sum(sizes)
        return [shared + sum(sizes[block] for block in held) for held in self.partition(round).held]

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.schedule.state_dict()

    @property
    @override
    def partial(self) -> bool:
        held = self.usual_partition().held
        return any(len(blocks) < len(self.blocks) for blocks in held)

    @override
    def identity(self) -> dict[str, Any]:
        # All inputs of the partitions but the measured counts, which `state_dict` has.
        drawn = asdict(replace(self.schedule, counts=(), measured_from=None, seconds=()))
        # A run may be prolonged; the holders are compared instead.
        del drawn["overlaps"], drawn["finish_from"], drawn["stages"]
        if self.config.fragments == 1:
            del drawn["fragments"]  # earlier checkpoints do not have it
        kept: dict[str, Any] = {"changes": self.config.wire != "fp32", "local_steps": 0}  # 0 as in earlier checkpoints
        if self.config.growth is not None:
            kept["growth"] = list(self.config.growth)
        if self.config.overlap:  # replicas differ between two rounds
            kept["overlap"] = True
        if self.config.outer != "none":  # left out otherwise, as earlier checkpoints do not have it
            kept["outer"] = True
        return {**drawn, "blocks": [block.name for block in self.blocks], **kept}

    @property
    @override
    def fragment_count(self) -> int:  # type: ignore[override]
        return self.config.fragments

    @override
    def fits_only_some(self) -> str:
        config, blocks = self.config, len(self.blocks)
        if not isinstance(config.blocks_per_worker, str):
            return f"blocks_per_worker={list(config.blocks_per_worker)} fits one number only: choose 'equal' or 'auto'."
        fewest = max(self.schedule.min_blocks, 1)  # the share of each worker, where there are many
        if not blocks or config.fragments <= fewest:
            return ""
        return (
            f"fragments={config.fragments} may not fit more of them: each holds at least {fewest} of the {blocks} "
            f"partitionable blocks, and needs one of each fragment. Choose fragments={fewest} or fewer, or let each "
            "hold more (min_blocks, the first share of growth)."
        )

    @override
    def without_effect(self, clock: Clock, steps: int) -> list[str]:
        schedule, begun = self.schedule, clock.rounds_by(steps)
        complete = clock.rounds_by(steps + 1) - 1
        texts = [self.overlaps.unused(clock.round, begun), schedule.unsynced(complete)]
        if self.partial:
            texts.append(never_divided(schedule.warmup_rounds, schedule.finish_from, begun, "blocks"))
        return [text for text in texts if text]

    @override
    def full_tensors(self, states: Iterable[dict[str, Any]]) -> dict[str, Tensor]:
        if self.config.equal_after_sync:
            return super().full_tensors(states)
        return mean_of_holders(self.module, [state["own"]["tensors"] for state in states])

    @override
    def learn(self, round: int, step_seconds: Sequence[float], sync_seconds: Sequence[float]) -> None:
        overlaps = self.schedule.overlaps.learn(round, step_seconds, sync_seconds)
        self.schedule = replace(self.schedule.learn(round, step_seconds), overlaps=overlaps)

    @override
    def load_state_dict(self, state: Mapping[str, Any], round: int) -> None:
        self.schedule = self.schedule.resumed(state, round)

    @override
    def seen(self) -> dict[str, Any]:
        return ends_of(self.blocks)

    @override
    def assume(self, seen: Mapping[str, Any]) -> None:
        assume_ends(self.blocks, seen)

    @override
    def plan_end(self, clock: Clock, total_steps: int | None) -> None:
        if self.config.needs_total_steps:
            self.schedule = plan_end(self.schedule, self.config, clock, total_steps)
            self.total_steps = total_steps

    def training_scale(self, round: int) -> float:
        """The factor on the residual branches of all blocks while they train in ``round``."""
        return self.schedule.training_scale(round, self.scaling.scale)

    def agree(self, collective: Collective, *, stepped: bool) -> None:
        """Tell all workers the branch ends of blocks that only their holders have seen.

        Collective: every worker must call this, in the same order.

        Args:
            collective: the workers.
            stepped: whether this worker has taken a local step, so that blocks have run.
        """
        if self._agreed:
            return
        self._agreed = agree_on_ends(self.blocks, collective)
        if stepped and collective.rank == 0:
            self._warn_of_hooks()

    def sizes(self, states: OptimizerStates, fragment: int | None = None) -> Sizes:
        """Bytes of the parts, for the closed form of a sync that covers a fragment, or the whole network."""
        wire = WIRE_FORMATS[self.config.wire]
        values = wire and wire.for_values
        changing = self.changing()
        blocks, averaged, travelling, entries, velocities = [], [], [], [], []
        for block in self.blocks:
            plain, compressed = self._split(block.tensors())
            blocks.append(packed_bytes(plain.values()) + (values.bytes(sum(compressed)) if values else 0))
            averaged.append(averaged_bytes_by_type(tensor for name, tensor in plain.items() if name in changing))
            state = states.bytes(parameters_of([block])) if self.config.momentum == "travel" else 0
            copy = self.companion.bytes(block.tensors()) if self.companion is not None else 0
            travelling.append(state + copy)
            entries.append(compressed)
            plain, compressed = self._split({n: t for n, t in block.tensors().items() if has_outer_step(t)})
            compressed_bytes = values.bytes(sum(compressed)) if values else 0
            velocities.append(sum(map(outer_bytes, plain.values())) + compressed_bytes)
        plain, shared_entries = self._split(self.fragments.within(fragment, self.shared))
        return Sizes(
            shared=averaged_bytes_by_type(tensor for name, tensor in plain.items() if name in changing),
            blocks=tuple(blocks),
            averaged=tuple(averaged),
            states=tuple(travelling),
            wire=wire,
            shared_entries=shared_entries,
            block_entries=tuple(entries),
            outer=tuple(velocities) if self.config.outer != "none" else (),
        )

    def _split(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[int, int]]:
        """The tensors that travel as they are, and the entries of matrices and of vectors that are compressed."""
        if self.config.wire == "fp32":
            return dict(tensors), (0, 0)
        plain, matrices, vectors = {}, 0, 0
        for name, tensor in tensors.items():
            if not compressible(tensor):
                plain[name] = tensor
            elif is_vector(tensor):
                vectors += tensor.numel()
            else:
                matrices += tensor.numel()
        return plain, (matrices, vectors)

    @override
    def parts(self) -> list[str]:
        return [block.name for block in self.blocks]

    @override
    def describe_tensor(self, name: str) -> str:
        for block in self.blocks:
            if name in block.tensors():
                return f"block {block.name} ({name})"
        return f"shared tensor {name}"

    @override
    def describe(self) -> str:
        workers = self.workers
        rounds = self.config.rounds_in_words(workers)
        if not self.blocks:
            sentence = f"All parameters are shared by {workers} worker(s); rounds of {rounds}."
            return sentence if workers == 1 else f"{sentence}\n{brief_of_shared(costs(self))}"
        counts = map(len, self.usual_partition().held)
        later = " at first, later in proportion to speed" if self.schedule.measured_from is not None else ""
        sentence = (
            f"{len(self.blocks)} residual blocks are partitioned over {workers} worker(s), "
            f"{', '.join(map(str, counts))} a worker{later}: {summary([block.name for block in self.blocks])}; "
            f"all else is shared. Rounds of {rounds}; test-time scale {self.scaling.scale:.4g}."
        )
        if workers == 1:
            return sentence
        return f"{sentence}\n{brief(costs(self), alternatives(self))}"

    def _refuse_compiled(self) -> None:
        """Refuse code that contains partitioned blocks, and would be compiled again in every round."""
        for block in self.blocks:
            outer = compiled_around(self.module, block.name)
            if outer is not None:
                where = repr(outer) if outer else f"the module ({type(self.module).__name__})"
                raise compiled_as_a_whole(f"block {block.name!r}", where)

    def usual_partition(self) -> Partition:
        """The partition of the first round after the warm-up, without growth or finish."""
        return replace(self.schedule, finish_from=None, stages=()).partition(self.config.warmup_rounds)

    @override
    def warn_about_settings(self) -> None:
        warn_about_settings(self)

    def _warn_of_hooks(self) -> None:
        """Warn, once, about scales that a checkpoint, as a plain model, cannot carry."""
        hooked = [block for block in self.blocks if not foldable(block)]
        if self._warned or not hooked or self.scaling.scale == 1:
            return
        self._warned = True
        reasons = [f" (first: {block.seen.why})" for block in hooked if block.seen.why]
        warnings.warn(
            f"the test-time scale of {summary([block.name for block in hooked])} does not fold into a weight"
            f"{''.join(reasons[:1])}: a hook scales them, and a checkpoint does not evaluate to the reported metrics "
            "without this package. Choose other `blocks`, or declare `residual_branch_end` in the block's class "
            "(docs/adding-a-model.md).",
            stacklevel=4,
        )
