"""A model of shared tensors and partitionable residual blocks, and the schedule of the rounds."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from resist_lightning.comm.bytes import WIRE_FORMATS
from resist_lightning.comm.quantize import compressible
from resist_lightning.comm.tensors import averaged_bytes
from resist_lightning.methods.globs import summary
from resist_lightning.methods.layout import Layout
from resist_lightning.methods.residual import Block, untrained
from resist_lightning.methods.resist.bytes import Sizes
from resist_lightning.methods.resist.config import PAPER_MIN_BLOCKS, Config
from resist_lightning.methods.resist.network import left_out, select_blocks
from resist_lightning.methods.resist.partition import Schedule
from resist_lightning.methods.resist.scaling import BranchScaling, coverage, foldable
from resist_lightning.methods.resist.shares import check_counts
from resist_lightning.schedule.partition import Partition
from resist_lightning.state.optimizer_state import OptimizerStates


class BlockLayout(Layout):
    """The blocks of a model, and who trains which when.

    Args:
        module: the user's module, complete.
        config: the settings of the run.
        workers: number of workers.
        trained: ids of the parameters that optimizers have; None if they are not known yet.

    Raises:
        BlockSelectionError: if the blocks cannot be chosen as asked.
        ValueError: if ``min_blocks`` or ``blocks_per_worker`` does not fit the number of blocks, or the module
            synchronises batch norm.
    """

    def __init__(self, module: nn.Module, config: Config, workers: int, trained: Collection[int] | None = None) -> None:
        super().__init__(module, config, workers, trained)
        self.config: Config = config
        self.blocks = select_blocks(module, config.blocks, trained)
        count = len(self.blocks)
        self.schedule = _make_schedule(config, count, workers)
        self.scaling = BranchScaling(
            self.blocks, coverage(self.schedule) if config.test_scale is None else config.test_scale
        )
        in_blocks = {id(tensor) for block in self.blocks for tensor in block.tensors().values()}
        named: list[tuple[str, Tensor]] = [*module.named_parameters(), *module.named_buffers()]
        self.shared = {name: tensor for name, tensor in named if id(tensor) not in in_blocks}

    @override
    def partition(self, round: int) -> Partition:
        return self.schedule.partition(round)

    @override
    def held_parameters(self, round: int) -> list[int]:
        sizes = [sum(parameter.numel() for parameter in block.module.parameters()) for block in self.blocks]
        shared = sum(parameter.numel() for parameter in self.module.parameters()) - sum(sizes)
        return [shared + sum(sizes[block] for block in held) for held in self.partition(round).held]

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.schedule.state_dict()

    @property
    @override
    def partial(self) -> bool:
        held = self.schedule.partition(self.config.warmup_rounds).held
        return any(len(blocks) < len(self.blocks) for blocks in held)

    @override
    def identity(self) -> dict[str, Any]:
        """What must be the same for a worker's own tensors to fit: who holds which blocks, and how changes are sent."""
        drawn = asdict(replace(self.schedule, local_steps=0, counts=(), measured_from=None, seconds=()))
        return {**drawn, "blocks": [block.name for block in self.blocks], "changes": self.config.wire != "fp32"}

    @override
    def learn(self, round: int, seconds: Sequence[float]) -> None:
        """Take in each worker's seconds per local step in the round that ends; all workers must give the same."""
        self.schedule = self.schedule.learn(round, seconds)

    @override
    def load_state_dict(self, state: Mapping[str, Any], round: int) -> None:
        """Resume with the counts that a run had measured, if counts shall follow speed.

        Where the state is of other workers or blocks, or empty, measuring begins anew in ``round``.
        """
        if self.config.blocks_per_worker == "auto":
            schedule = self.schedule
            self.schedule = schedule.with_state_dict(state) if schedule.fits(state) else schedule.measuring(round)

    def sizes(self, states: OptimizerStates) -> Sizes:
        """Bytes of the parts, for the closed form of a sync."""
        travels = self.config.momentum == "travel"
        wire = WIRE_FORMATS[self.config.wire]
        changing = self.changing()
        plain = [self._plain(block.tensors()) for block in self.blocks]
        entries = [self._entries(block.tensors()) for block in self.blocks]
        return Sizes(
            shared=_averaged_bytes(tensor for name, tensor in self._plain(self.shared).items() if name in changing),
            blocks=tuple(
                sum(map(_bytes, tensors.values())) + (wire.bytes(count) if wire else 0)
                for tensors, count in zip(plain, entries, strict=True)
            ),
            averaged=tuple(
                _averaged_bytes(tensor for name, tensor in tensors.items() if name in changing) for tensors in plain
            ),
            states=tuple(
                (states.bytes(block.module.parameters()) if travels else 0)
                + (self.companion.bytes(block.tensors()) if self.companion is not None else 0)
                for block in self.blocks
            ),
            wire=wire,
            shared_entries=self._entries(self.shared),
            block_entries=tuple(entries),
        )

    def _plain(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of some tensors that travel as they are."""
        if self.config.wire == "fp32":
            return dict(tensors)
        return {name: tensor for name, tensor in tensors.items() if not compressible(tensor)}

    def _entries(self, tensors: Mapping[str, Tensor]) -> int:
        """Numbers in those of some tensors that are compressed."""
        return sum(tensor.numel() for tensor in tensors.values()) - sum(
            tensor.numel() for tensor in self._plain(tensors).values()
        )

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
        """A sentence that says what was chosen."""
        workers = self.workers
        if not self.blocks:
            return f"All parameters are shared by {workers} worker(s); rounds of {self._rounds()}."
        counts = map(len, self.schedule.partition(self.config.warmup_rounds).held)
        later = " at first, later in proportion to speed" if self.schedule.measured_from is not None else ""
        return (
            f"{len(self.blocks)} residual blocks are partitioned over {workers} worker(s), "
            f"{', '.join(map(str, counts))} a worker{later}: {summary([block.name for block in self.blocks])}; "
            f"all else is shared. Rounds of {self._rounds()}; test-time scale {self.scaling.scale:.4g}."
        )

    def _rounds(self) -> str:
        wire = "" if self.config.wire == "fp32" else f", parameters sent as {self.config.wire}"
        return f"{self.config.local_steps} local steps{wire}"

    @override
    def warn_about_settings(self) -> None:
        unused = left_out(self.module, self.config.blocks, self._trained)
        if unused:
            warnings.warn(
                f"{summary(unused)} match `blocks` but stay shared: they seem to change the shape of their input, are "
                "single layers or chains of layers, or are of a network that does not train.",
                stacklevel=3,
            )
        still = untrained(self.module, self.blocks, self._trained)
        if still:
            warnings.warn(
                f"nothing trains now in the network of {summary([block.name for block in still])}, and `blocks` deals "
                "them out all the same: what it computes depends on the worker. If it is a teacher or a moving "
                "average, leave it out of `blocks`; if it is trained later, all is well.",
                stacklevel=3,
            )
        if not self.blocks or self.workers == 1:
            return
        self._warn_of_plain_checkpoints()
        if not isinstance(self.config.blocks_per_worker, str):
            return
        if not self.partial and self.config.min_blocks is None:
            warnings.warn(
                f"nothing is partitioned: the default min_blocks={PAPER_MIN_BLOCKS} gives every worker all "
                f"{len(self.blocks)} blocks. Set a lower min_blocks (0 to {len(self.blocks) - 1}), choose more "
                "`blocks`, or use strategy='local_sgd'.",
                stacklevel=3,
            )
        if any(not held for held in self.schedule.partition(self.config.warmup_rounds).held):
            warnings.warn(
                f"{self.workers} workers for {len(self.blocks)} blocks with min_blocks=0: some workers train "
                "shared layers only in each round.",
                stacklevel=3,
            )

    def _warn_of_plain_checkpoints(self) -> None:
        """Name what a checkpoint, as a plain model, cannot carry."""
        hooked = [block.name for block in self.blocks if not foldable(block)]
        if hooked and self.scaling.scale != 1:
            warnings.warn(
                f"the test-time scale of {summary(hooked)} does not fold into a weight: a hook scales them, and a "
                "checkpoint does not evaluate to the reported metrics without this package. Declare "
                "`residual_branch_end` in the block's class (docs/adding-a-model.md).",
                stacklevel=4,
            )
        self._warn_of_batch_statistics()


def _make_schedule(config: Config, blocks: int, workers: int) -> Schedule:
    given = config.blocks_per_worker
    least = min(PAPER_MIN_BLOCKS, blocks) if config.min_blocks is None else config.min_blocks
    if not isinstance(given, str):
        listed, least = tuple(given), min(given) if config.min_blocks is None else least
        check_counts(listed, blocks, workers, least)
        schedule = Schedule(blocks, workers, least, config.seed, config.local_steps, config.warmup_rounds)
        return replace(schedule, counts=((0, listed),))
    schedule = Schedule(blocks, workers, least, config.seed, config.local_steps, config.warmup_rounds)
    schedule.partition(config.warmup_rounds)  # raises where min_blocks is impossible
    return schedule.measuring(0) if given == "auto" else schedule


def _bytes(tensor: Tensor) -> int:
    """Of an absent one, too."""
    return tensor.numel() * tensor.element_size()


def _averaged_bytes(tensors: Iterable[Tensor]) -> Counter[str]:
    """By data type: each has an all-reduce of its own."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[str(tensor.dtype)] += averaged_bytes(tensor)
    return sizes


def parameters_of(blocks: Sequence[Block]) -> list[nn.Parameter]:
    """The parameters of some blocks."""
    return [parameter for block in blocks for parameter in block.module.parameters()]
