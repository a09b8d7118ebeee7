"""The settings of ResIST and local SGD."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, TypeAlias, get_args

from torch import nn
from typing_extensions import override

from resist_lightning.methods.config import (
    GrowingConfig,
    OuterName,
    WireName,
    check_choice,
    check_integer,
)
from resist_lightning.methods.resist.partition import Schedule
from resist_lightning.methods.resist.shares import check_counts
from resist_lightning.schedule.overlap import OverlapChoice, Overlaps, waiting_rounds
from resist_lightning.schedule.progress import Clock
from resist_lightning.schedule.round_length import in_words, shortest_round
from resist_lightning.schedule.stages import parts_of, plan_stages

BlockCounts: TypeAlias = Literal["equal", "auto"] | Sequence[int]
BlockChoice: TypeAlias = str | Sequence[str] | Callable[[str, nn.Module], bool] | None

PAPER_MIN_BLOCKS = 5
"""Section 4 of the paper: a minimum of five blocks per worker works best."""

_LARGEST_OUTER_MOMENTUM = 0.9
"""DiLoCo's, for eight workers. Its memory is ten rounds; with more, the last ones would still follow earlier ones."""

_NOT_IN_PARTS = (
    ("non_finite", "drop", "'raise'"),  # tensors that a sync does not cover would keep their NaN
    ("blocks_per_worker", "auto", "a list with a count for each worker"),
)
"""Settings that work only where a sync covers everything at once: name, value, and a replacement."""


def default_min_blocks(blocks: int) -> int:
    """The paper's least number of blocks per worker, or half of them where there are few."""
    return min(PAPER_MIN_BLOCKS, max(1, blocks // 2), blocks)


@dataclass(frozen=True, kw_only=True)
class Config(GrowingConfig):
    """Settings of a run whose residual blocks are partitioned, or, with ``blocks=[]``, nothing (local SGD).

    Args:
        min_blocks: minimum number of partitionable blocks per worker; None: 5, as in the paper, or half of them where
            there are fewer than 10, or the smallest number that ``blocks_per_worker`` lists.
        blocks_per_worker: blocks that each worker holds: ``equal`` (counts differ by at most one), ``auto`` (in
            proportion to its speed in the first rounds), or a list with a count for each worker.
        blocks: residual blocks to partition: None (section 3 of a ResNet without its first block, as in the
            paper, or the blocks of all sections where those are less than half of the parameters), a glob or several
            over module names, a predicate of (name, module), or an empty list (none: local SGD).
        warmup_rounds: first rounds with all blocks on all workers, scaled as at test time.
        finish_rounds: last rounds with all blocks on all workers, scaled as at test time. Needs the number of local
            steps of the run: a training that ends by steps or epochs, and rounds of known lengths.
        growth: minimum shares of the blocks that each worker holds, each for an equal part of the rounds: ``(0.25,
            0.5, 1)`` begins small, and ends with all blocks; None: equal in all rounds. Branches are scaled by the
            first share divided by the present one. Needs the number of local steps of the run, as ``finish_rounds``.
        test_scale: factor on the residual branches of partitioned blocks in the full model, in (0, 1]; None means the
            probability that a block is held: mean blocks per worker / number of blocks.
        wire: format of trainable parameters at a sync: ``fp32`` (as they are), ``bf16``, ``int8``, ``int6``,
            ``int4`` (with a scale per 256 entries) or ``int2`` (the rounding error of a mean is added to the next
            one, unless ``outer`` is set; blocks that are handed over, and their velocities, in 8 bits). Needs a copy of
            the shared parameters unless ``fp32``, and another one where rounding errors are kept.
        outer: start of a round: ``none`` (the mean of the last one) or ``nesterov`` (a step of the outer optimizer: SGD
            with Nesterov momentum on the change of the last round; with local SGD this is DiLoCo). It keeps two
            copies of the shared parameters and of the blocks that a worker merges.
        outer_rate: learning rate of the outer optimizer, above 0; 1 goes to the mean itself.
        outer_momentum: momentum of the outer optimizer, in [0, 1); None: 1 - ``outer_rate`` / number of workers, at
            most 0.9, so that a change that each round repeats counts as often as there are workers (0.65 for two).
        overlap: local steps that a sync may take: it begins that many before the end of its round, from copies of the
            worker's tensors, and is applied at the end, so a slow link delays nobody. Workers keep training meanwhile,
            and blocks that move lose these steps. Below ``local_steps``; 0: the training waits for each sync;
            ``auto``: it waits in the first three rounds (two more for each further fragment), and then uses as many
            steps as a sync was measured to need.
        fragments: number of fragments of the network; each sync covers one of them, in turn, so each is averaged and
            drawn again every ``fragments * local_steps`` local steps. Sends as many bytes per local step as rounds that
            are ``fragments`` times as long, in syncs so short that a short ``overlap`` hides them. At most the number
            of blocks that a worker holds; 1: each sync covers the whole network.

    The others are those of :class:`GrowingConfig`.

    Raises:
        ValueError: if a value is outside its limits.
    """

    min_blocks: int | None = None
    blocks_per_worker: BlockCounts = "equal"
    blocks: BlockChoice = None
    warmup_rounds: int = 0
    test_scale: float | None = None
    wire: WireName = "fp32"
    outer: OuterName = "none"
    outer_rate: float = 0.7
    outer_momentum: float | None = None
    overlap: OverlapChoice = 0
    fragments: int = 1

    @override
    def __post_init__(self) -> None:
        """Check every value."""
        super().__post_init__()
        check_integer("warmup_rounds", self.warmup_rounds, 0, "0 means no warm-up")
        counts = None if self.blocks_per_worker == "equal" else self.blocks_per_worker
        self.refuse_beside_growth(min_blocks=self.min_blocks, test_scale=self.test_scale, blocks_per_worker=counts)
        if self.min_blocks is not None:
            check_integer("min_blocks", self.min_blocks, 0, "0 allows workers without any block")
        _check_counts(self.blocks_per_worker)
        check_choice("wire", self.wire, get_args(WireName))
        self._check_outer()
        self._check_overlap()
        self._check_fragments()
        if self.test_scale is not None and not 0 < self.test_scale <= 1:
            raise ValueError(f"test_scale={self.test_scale} must lie in (0, 1]; None takes the share of blocks held.")

    @property
    @override
    def overlaps_syncs(self) -> bool:
        return self.overlap != 0

    @property
    @override
    def equal_after_sync(self) -> bool:
        return self.overlap == 0 and self.fragments == 1

    @property
    @override
    def sync_before_evaluation(self) -> bool:
        # At the end of a training there would be no sync: so none that rounds, or steps beyond the mean.
        exact = self.wire == "fp32" and self.outer == "none" and self.equal_after_sync
        return exact and super().sync_before_evaluation

    def outer_momentum_of(self, workers: int) -> float:
        """The momentum of the outer optimizer, for a number of workers."""
        if self.outer_momentum is not None:
            return self.outer_momentum
        # A change that each round repeats adds up to rate / (1 - momentum) times of it.
        return min(max(0.0, 1 - self.outer_rate / workers), _LARGEST_OUTER_MOMENTUM)

    def rounds_in_words(self, workers: int) -> str:
        """The settings of a round in words, after "rounds of", for a number of workers."""
        wire = "" if self.wire == "fp32" else f", parameters sent as {self.wire}"
        rate, momentum = self.outer_rate, self.outer_momentum_of(workers)
        outer = f", outer steps of rate {rate:g} and momentum {momentum:g}" if self.outer != "none" else ""
        finish = f", all blocks everywhere in the last {self.finish_rounds}" if self.finish_rounds else ""
        growth = "" if self.growth is None else f", shares of {list(self.growth)} of the blocks in turn"
        fragments = f", each sync of one of {self.fragments} fragments" if self.fragments > 1 else ""
        return f"{in_words(self.local_steps)}{fragments}{self._overlap_in_words()}{growth}{finish}{wire}{outer}"

    def _overlap_in_words(self) -> str:
        if self.overlap == "auto":
            waiting = waiting_rounds(self.fragments)
            return f", each sync under way during as many of the last as it needs (0 in {waiting} rounds before)"
        return f", each sync under way during the last {self.overlap}" if self.overlap else ""

    @property
    def feedback(self) -> bool:
        """Whether a wire format with error feedback uses it: not with an outer step, whose momentum would repeat it."""
        return self.outer == "none"

    def _check_outer(self) -> None:
        check_choice("outer", self.outer, get_args(OuterName))
        for name, limits in (("outer_rate", "above 0"), ("outer_momentum", "of at least 0 and below 1")):
            value = getattr(self, name)
            default = next(field.default for field in fields(self) if field.name == name)
            if value == default:
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not (0 < value < float("inf") if name == "outer_rate" else 0 <= value < 1):
                raise ValueError(f"{name}={value!r} must be a finite number {limits}.")
            if self.outer == "none":
                raise ValueError(
                    f"{name}={value!r} has no effect with outer='none'; set outer='nesterov', or leave {name} out."
                )

    def _check_overlap(self) -> None:
        least = 1
        if self.overlap != "auto":
            check_integer("overlap", self.overlap, 0, "0: the training waits for each sync; or 'auto'")
            least = self.overlap
        if not least:
            return
        shortest = shortest_round(self.local_steps)
        if least >= shortest:
            raise ValueError(
                f"overlap={self.overlap!r} with local_steps={self.local_steps}: a sync begins `overlap` local steps "
                f"before the end of its round, and the shortest round has {shortest}. Choose an overlap below that, or "
                "longer rounds."
            )
        # The state of a block that stays has seen steps that arriving state has not.
        self._refuse_beside("overlap", 0, ("momentum", "travel", "'keep' or 'reset'"), *_NOT_IN_PARTS)

    def _check_fragments(self) -> None:
        check_integer("fragments", self.fragments, 1, "1: each sync covers the whole network")
        if self.fragments > 1:
            self._refuse_beside("fragments", 1, *_NOT_IN_PARTS)

    def _refuse_beside(self, name: str, off: int, *others: tuple[str, str, str]) -> None:
        """Raise a ValueError if another setting has the value that does not work with the setting ``name``."""
        for other, refused, instead in others:
            if getattr(self, other) == refused:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} does not work with {other}={refused!r} yet: use {instead}, or "
                    f"{name}={off}."
                )


def _check_counts(value: object) -> None:
    if value in ("equal", "auto"):
        return
    counts = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
    if not counts or any(isinstance(count, bool) or not isinstance(count, int) or count < 0 for count in counts):
        raise ValueError(
            f"blocks_per_worker={value!r} must be 'equal', 'auto', or a list of whole numbers of at least 0, one for "
            "each worker."
        )


def make_schedule(config: Config, blocks: int, workers: int) -> Schedule:
    """The partitions of all rounds, by the settings.

    Raises:
        ValueError: if ``min_blocks`` or ``blocks_per_worker`` does not fit the number of blocks.
    """
    given, least = config.blocks_per_worker, config.min_blocks
    listed = None if isinstance(given, str) else tuple(given)
    if config.growth is not None:
        least = parts_of(config.growth[0], blocks)
    if least is None:
        least = min(listed) if listed is not None else default_min_blocks(blocks)
    overlaps = _overlaps(config, workers)
    schedule = Schedule(
        blocks, workers, least, config.seed, config.warmup_rounds, overlaps=overlaps, fragments=config.fragments
    )
    if listed is not None:
        check_counts(listed, blocks, workers, least)
        schedule = replace(schedule, counts=((0, listed),))
    fewest = min(map(len, schedule.partition(config.warmup_rounds).held))  # raises where min_blocks is impossible
    if blocks and config.fragments > max(fewest, 1):
        raise ValueError(
            f"fragments={config.fragments}: a worker holds {fewest} of the {blocks} partitionable blocks, and needs at "
            f"least one of each fragment. Choose fragments={max(fewest, 1)} or fewer, or let each worker hold more "
            "(min_blocks, blocks_per_worker, the first share of growth)."
        )
    if listed is not None:
        return schedule
    return schedule.measuring(0) if given == "auto" else schedule


def _overlaps(config: Config, workers: int) -> Overlaps:
    if config.overlap != "auto":
        return Overlaps(config.overlap)
    # Not in a warm-up, whose syncs send more than later ones.
    shortest = shortest_round(config.local_steps)
    return Overlaps(0, shortest, workers, config.warmup_rounds, fragments=config.fragments)


def plan_end(schedule: Schedule, config: Config, clock: Clock, total_steps: int | None) -> Schedule:
    """The partitions of all rounds, where the settings treat the last ones apart.

    Args:
        schedule: from :func:`make_schedule`.
        config: the settings.
        clock: the position in the run, at the beginning of a round or in it.
        total_steps: local steps from the run's beginning to its end; None if that is not known.

    Raises:
        ValueError: if it is not known which rounds are the last.
    """
    found = plan_stages(
        config.growth or (),
        config.finish_rounds,
        config.local_steps,
        clock,
        total_steps,
        by=config.by_total_steps,
        first=config.warmup_rounds,
    )
    stages = tuple((first, parts_of(share, schedule.blocks)) for first, share in found.shares)
    return replace(schedule, finish_from=found.finish_from, stages=stages)
