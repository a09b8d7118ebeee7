"""The settings common to all methods, checked when they are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, TypeAlias, get_args

from torch.optim import SGD, Optimizer
from typing_extensions import Self, override

from resist_lightning.schedule.round_length import QSR, LocalStepsRule, PostLocal
from resist_lightning.schedule.stages import check_growth

MomentumPolicy: TypeAlias = Literal["reset", "keep", "travel"]
NormPolicy: TypeAlias = Literal["recalibrate", "running", "batch"]
WireName: TypeAlias = Literal["fp32", "bf16", "int8", "int6", "int4", "int2"]
CheckPolicy: TypeAlias = Literal["sampled", "full", "off"]
NonFinitePolicy: TypeAlias = Literal["raise", "drop"]
OuterName: TypeAlias = Literal["none", "nesterov"]
WorkersChoice: TypeAlias = Literal["all", "first"]


@dataclass(frozen=True, kw_only=True)
class CommonConfig:
    """Settings of a run that every method has.

    Args:
        local_steps: local steps per round, at least 1; or a rule that decides them when a round begins: `QSR` (longer
            rounds as the learning rate falls) or `PostLocal` (short rounds first).
        seed: seed of the partitions; 0 is a seed.
        momentum: policy for optimizer state at a sync: ``reset`` (all of it restarts, as in the papers), ``keep`` (the
            state of parts that a worker keeps stays), ``travel`` (as keep, and state moves with parts that are handed
            over). None: ``reset`` with SGD, ``keep`` with others, whose second moments take long to estimate.
        batch_norm: source of the full model's batch-norm statistics: ``recalibrate`` (re-estimated on recent
            training batches), ``running`` (the workers' running statistics), ``batch`` (of each batch).
        recalibration_batches: recent batches per worker that ``recalibrate`` uses, at least 1; the host keeps
            that many.
        check: entries of the shared tensors that are hashed after each sync and compared between workers: ``sampled``
            (one in 64 of large tensors, others each round), ``full`` or ``off``.
        non_finite: reaction to NaN or infinity in a worker at a sync: ``raise``, or ``drop`` (the worker is left out of
            the means, and parts that it alone holds are reset to the beginning of the round, of which it keeps a copy).

    Raises:
        ValueError: if a value is outside its limits.
    """

    trains_alone: ClassVar[bool] = True
    """Whether a worker sends nothing between two syncs."""

    local_steps: LocalStepsRule = 50
    seed: int = 0
    momentum: MomentumPolicy | None = None
    batch_norm: NormPolicy = "recalibrate"
    recalibration_batches: int = 8
    check: CheckPolicy = "sampled"
    non_finite: NonFinitePolicy = "raise"

    def __post_init__(self) -> None:
        """Check every value."""
        if not isinstance(self.local_steps, QSR | PostLocal):
            check_integer("local_steps", self.local_steps, 1, "1 averages after every step; or QSR or PostLocal")
        check_integer("recalibration_batches", self.recalibration_batches, 1, "8 is the default")
        check_integer("seed", self.seed, 0, "0 is a seed")
        if self.momentum is not None:
            check_choice("momentum", self.momentum, get_args(MomentumPolicy))
        check_choice("batch_norm", self.batch_norm, get_args(NormPolicy))
        check_choice("check", self.check, get_args(CheckPolicy))
        check_choice("non_finite", self.non_finite, get_args(NonFinitePolicy))

    def for_optimizers(self, optimizers: Sequence[Optimizer]) -> Self:
        """These settings, with a momentum policy that suits the optimizers if none was chosen."""
        if self.momentum is not None:
            return self
        plain = all(isinstance(optimizer, SGD) for optimizer in optimizers)
        return replace(self, momentum="reset" if plain else "keep")

    @property
    def needs_total_steps(self) -> bool:
        """Whether the division depends on the number of local steps of the run."""
        return False

    @property
    def overlaps_syncs(self) -> bool:
        """Whether a sync may be under way beside the training."""
        return False

    @property
    def equal_after_sync(self) -> bool:
        """Whether all replicas are equal when a round begins."""
        return True

    @property
    def sync_before_evaluation(self) -> bool:
        """Whether a sync that is due may come before an evaluation, whose result it does not change."""
        return self.trains_alone and not isinstance(self.local_steps, QSR)  # its rate may change in between

    @property
    def first_evaluates(self) -> bool:
        """Whether the full model of evaluations and checkpoints is assembled on worker 0 alone."""
        return False

    @property
    def first_ends(self) -> bool:
        """Whether worker 0 alone has the full model when the training has ended."""
        return False

    def in_words(self) -> dict[str, str]:
        """Every setting by name, in words that are the same on workers with the same settings."""
        return {field.name: _in_words(getattr(self, field.name)) for field in fields(self)}


@dataclass(frozen=True, kw_only=True)
class GrowingConfig(CommonConfig):
    """Settings of a run in which every worker has a part of the network that may change in size.

    Args:
        finish_rounds: last rounds in which every worker holds everything. Needs the number of local steps of the run,
            so a training that ends by steps or epochs, and rounds of known lengths.
        growth: minimum shares of the parts that each worker holds, each for an equal part of the rounds: ``(0.25,
            0.5, 1)`` begins small, and ends with everything; None: equal in all rounds. Needs the number of local
            steps of the run, as ``finish_rounds`` does.
        evaluate_on: workers that evaluate, and have the full model then: ``all`` (a shard of the data each) or
            ``first`` (worker 0 alone, all of the data; the others send it the missing parts, keep theirs, and wait, so
            ``timeout`` must exceed an evaluation). Checkpoints are assembled there too.
        full_model_on: workers with the full model after the training: ``all`` or ``first`` (worker 0 alone; the
            others keep their part). ``first`` needs ``evaluate_on="first"``.

    Raises:
        ValueError: if a value is outside its limits.
    """

    finish_rounds: int = 0
    growth: Sequence[float] | None = None
    evaluate_on: WorkersChoice = "all"
    full_model_on: WorkersChoice = "all"

    @override
    def __post_init__(self) -> None:
        """Check every value."""
        super().__post_init__()
        check_integer("finish_rounds", self.finish_rounds, 0, "0 means no finish")
        if self.growth is not None:
            check_growth(self.growth)
        if self.needs_total_steps and isinstance(self.local_steps, QSR):
            raise ValueError(
                f"{self.by_total_steps} with local_steps={self.local_steps}: the last rounds are not known in advance, "
                "because QSR derives lengths from future learning rates. Set local_steps to a number or PostLocal."
            )
        self._check_first()

    @property
    @override
    def first_evaluates(self) -> bool:
        return self.evaluate_on == "first"

    @property
    @override
    def first_ends(self) -> bool:
        return self.full_model_on == "first"

    def _check_first(self) -> None:
        check_choice("evaluate_on", self.evaluate_on, get_args(WorkersChoice))
        check_choice("full_model_on", self.full_model_on, get_args(WorkersChoice))
        if self.first_ends and not self.first_evaluates:
            raise ValueError(
                "full_model_on='first' with evaluate_on='all': after the training every worker would be asked to test "
                "a model that worker 0 alone has. Set evaluate_on='first' too, or full_model_on='all'."
            )

    @property
    @override
    def needs_total_steps(self) -> bool:
        return self.finish_rounds > 0 or self.growth is not None

    @property
    def by_total_steps(self) -> str:
        """The setting that needs the number of local steps of the run, in words."""
        return f"finish_rounds={self.finish_rounds}" if self.growth is None else f"growth={self.growth}"

    def refuse_beside_growth(self, **given: object) -> None:
        """Raise a ValueError where ``growth`` and another setting both decide a worker's share.

        Args:
            **given: the other settings by name, None where they are not set.
        """
        if self.growth is None:
            return
        for name, value in given.items():
            if value is not None:
                raise ValueError(
                    f"growth={self.growth!r} and {name}={value!r} set the same thing; leave one of them out."
                )


def _in_words(value: Any) -> str:
    if callable(value):
        return "a predicate"  # its choices are compared instead
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = list(value)  # a list and a tuple mean the same
    return str(value)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise a ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(map(repr, choices))}.")


def check_integer(name: str, value: object, least: int, hint: str) -> None:
    """Raise a ValueError unless ``value`` is a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least} ({hint}).")
