"""The settings of a run, checked when they are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from torch import nn
from typing_extensions import override

MomentumPolicy: TypeAlias = Literal["reset", "keep", "travel"]
NormPolicy: TypeAlias = Literal["recalibrate", "running", "batch"]
WireName: TypeAlias = Literal["fp32", "bf16", "int8", "int6", "int4"]
BlockCounts: TypeAlias = Literal["equal", "auto"] | Sequence[int]
CheckPolicy: TypeAlias = Literal["sampled", "full", "off"]
NonFinitePolicy: TypeAlias = Literal["raise", "drop"]
BlockChoice: TypeAlias = str | Sequence[str] | Callable[[str, nn.Module], bool] | None
LayerChoice: TypeAlias = str | Sequence[str] | Callable[[str, nn.Module], bool] | None
AuxMethod: TypeAlias = Literal["penalty", "al-net", "penalty-store", "al-store"]
AuxFactory: TypeAlias = Callable[[tuple[int, ...], tuple[int, ...]], nn.Module]

PAPER_MIN_BLOCKS = 5
"""Section 4 of the paper: a minimum of five blocks per worker works best."""


@dataclass(frozen=True, kw_only=True)
class CommonConfig:
    """How a run trains, whatever the method divides the model by.

    Args:
        local_steps: local steps per round, at least 1.
        seed: seed of the partitions; 0 is a seed.
        momentum: what happens to optimizer state at a sync: ``reset`` (all of it restarts, as in the papers), ``keep``
            (state of what a worker keeps), ``travel`` (as keep, and state goes with what is handed over).
        batch_norm: where the full model's batch-norm statistics come from: ``recalibrate`` (re-estimated on recent
            training batches), ``running`` (the workers' running statistics), ``batch`` (of each batch).
        recalibration_batches: recent batches per worker that ``recalibrate`` uses, at least 1.
        check: which entries of the shared tensors are hashed after each sync, and compared between workers:
            ``sampled`` (one in 64 of large tensors, others each round), ``full`` or ``off``.
        non_finite: what happens when a worker comes to a sync with NaN or infinity: ``raise``, or ``drop`` (it is left
            out of the means, and what it alone held is again what it was when the round began; needs a copy of that).

    Raises:
        ValueError: if a value is outside its limits.
    """

    local_steps: int = 50
    seed: int = 0
    momentum: MomentumPolicy = "reset"
    batch_norm: NormPolicy = "recalibrate"
    recalibration_batches: int = 8
    check: CheckPolicy = "sampled"
    non_finite: NonFinitePolicy = "raise"

    def __post_init__(self) -> None:
        """Check every value."""
        check_integer("local_steps", self.local_steps, 1, "1 averages after every step")
        check_integer("recalibration_batches", self.recalibration_batches, 1, "8 is the default")
        check_integer("seed", self.seed, 0, "0 is a seed")
        check_choice("momentum", self.momentum, get_args(MomentumPolicy))
        check_choice("batch_norm", self.batch_norm, get_args(NormPolicy))
        check_choice("check", self.check, get_args(CheckPolicy))
        check_choice("non_finite", self.non_finite, get_args(NonFinitePolicy))


@dataclass(frozen=True, kw_only=True)
class Config(CommonConfig):
    """How a run trains whose residual blocks are partitioned, or (``blocks=[]``) nothing.

    Args:
        min_blocks: least number of partitionable blocks per worker; None means 5, or all where there are fewer, or
            what ``blocks_per_worker`` lists.
        blocks_per_worker: how many each worker holds: ``equal`` (counts differ by at most one), ``auto`` (in proportion
            to the speed that each shows in the first rounds), or a list with a count for each worker.
        blocks: which residual blocks are partitioned: None (the paper's rule: section 3 without its first block), a
            glob or several over module names, a predicate of (name, module), or an empty list (none: local SGD).
        warmup_rounds: first rounds with all blocks on all workers, scaled as at test time.
        test_scale: factor on the residual branches of partitioned blocks in the full model, in (0, 1]; None means the
            chance that a block is held: mean blocks per worker / number of blocks.
        wire: how trainable parameters are sent at a sync: ``fp32`` (as they are), ``bf16``, ``int8``, ``int6`` or
            ``int4`` (with a scale per 256 entries). Needs a copy of the shared parameters unless ``fp32``.

    The others are those of :class:`CommonConfig`.

    Raises:
        ValueError: if a value is outside its limits.
    """

    min_blocks: int | None = None
    blocks_per_worker: BlockCounts = "equal"
    blocks: BlockChoice = None
    warmup_rounds: int = 0
    test_scale: float | None = None
    wire: WireName = "fp32"

    @override
    def __post_init__(self) -> None:
        """Check every value."""
        super().__post_init__()
        check_integer("warmup_rounds", self.warmup_rounds, 0, "0 means no warm-up")
        if self.min_blocks is not None:
            check_integer("min_blocks", self.min_blocks, 0, "0 allows workers without any block")
        _check_counts(self.blocks_per_worker)
        check_choice("wire", self.wire, get_args(WireName))
        if self.test_scale is not None and not 0 < self.test_scale <= 1:
            raise ValueError(f"test_scale={self.test_scale} must lie in (0, 1]; None takes the share of blocks held.")


@dataclass(frozen=True, kw_only=True)
class NeuronConfig(CommonConfig):
    """How a run trains whose hidden neurons are dealt out (IST).

    Args:
        layers: whose neurons are dealt out: None (those of all hidden layers), a glob or several over the names of
            layers, or a predicate of (name, module).

    The others are those of :class:`CommonConfig`.

    Raises:
        ValueError: if a value is outside its limits.
    """

    layers: LayerChoice = None


@dataclass(frozen=True, kw_only=True)
class StageConfig(CommonConfig):
    """How a run trains whose network is cut by depth into stages that all train at the same time (AuxNet).

    Args:
        method: where the guessed input of a stage comes from, and whether it has a multiplier: ``penalty`` and
            ``al-net`` (auxiliary networks), ``penalty-store`` and ``al-store`` (stored by sample; augmentation off).
        beta: weight of the penalty, half the mean square of guess minus truth per element; above 0.
        beta_growth: ``beta`` is multiplied by it for each factor of ten by which the learning rate has fallen.
        lambda_step: step of the guess in units of 1 / beta, in (0, 1]; None takes 1, and 0.1 where guesses of
            three stages or more are stored, as 1 diverges there.
        multiplier_every: steps between two updates of the multipliers, at least 1.
        warmup_steps: first steps, in which the stages wait for each other and train by plain back-propagation, while
            the auxiliary networks learn to make what really comes.
        serial_every: after them, of so many steps one is serial, a correction by the true gradient; 0 is never.
        cuts: names of the modules behind which the network is cut, one fewer than workers; None balances by time.
        network: name of the network in the module; None finds it by its residual blocks.
        aux_network: makes an auxiliary network from the shapes of an image and of a boundary, without the batch; None
            makes a small one of convolutions. With ``al-net`` it is asked for twice the channels.
        aux_width: channels of the auxiliary networks that are made by default, at least 1.
        aux_learning_rate: highest rate of the auxiliary networks, which falls as that of the first optimizer does.

    The others are those of :class:`CommonConfig`; ``local_steps`` is how often the workers look whether all is well.
    Optimizer state is always kept, and a worker with NaN or infinity ends the run.

    Raises:
        ValueError: if a value is outside its limits.
    """

    momentum: MomentumPolicy = "keep"
    method: AuxMethod = "penalty"
    beta: float = 1.0
    beta_growth: float = 1.0
    lambda_step: float | None = None
    multiplier_every: int = 10
    warmup_steps: int = 200
    serial_every: int = 0
    cuts: Sequence[str] | None = None
    network: str | None = None
    aux_network: AuxFactory | None = None
    aux_width: int = 32
    aux_learning_rate: float = 0.1

    @override
    def __post_init__(self) -> None:
        """Check every value."""
        super().__post_init__()
        check_choice("momentum", self.momentum, ["keep"])
        check_choice("non_finite", self.non_finite, ["raise"])
        check_choice("method", self.method, get_args(AuxMethod))
        check_integer("multiplier_every", self.multiplier_every, 1, "10 is the default; 1 may diverge")
        check_integer("warmup_steps", self.warmup_steps, 0, "0 means no warm-up")
        check_integer("serial_every", self.serial_every, 0, "0 means never, 1 means always")
        check_integer("aux_width", self.aux_width, 1, "32 is the default")
        _check_above("beta", self.beta, 0)
        _check_above("aux_learning_rate", self.aux_learning_rate, 0)
        if not self.beta_growth >= 1:
            raise ValueError(f"beta_growth={self.beta_growth!r} must be at least 1 (1 leaves beta as it is).")
        if self.lambda_step is not None and not 0 < self.lambda_step <= 1:
            raise ValueError(f"lambda_step={self.lambda_step!r} must lie in (0, 1]; None takes the default.")
        if isinstance(self.cuts, str):
            raise ValueError(f"cuts={self.cuts!r} must be a list of names, e.g. ['layer2'].")

    @property
    def stored(self) -> bool:
        """Whether guesses are stored by sample, and there are no auxiliary networks."""
        return self.method.endswith("-store")

    def serial(self, step: int) -> bool:
        """Whether the stages wait for each other in this step; ``step`` counts from 0."""
        behind = step - self.warmup_steps
        return behind < 0 or (self.serial_every > 0 and behind % self.serial_every == 0)

    @property
    def multipliers(self) -> bool:
        """Whether there are Lagrange multipliers."""
        return self.method.startswith("al-")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise a ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(map(repr, choices))}.")


def check_integer(name: str, value: object, least: int, hint: str) -> None:
    """Raise a ValueError unless ``value`` is a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least} ({hint}).")


def _check_above(name: str, value: object, limit: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not limit < value < float("inf"):
        raise ValueError(f"{name}={value!r} must be a finite number above {limit}.")


def _check_counts(value: object) -> None:
    if value in ("equal", "auto"):
        return
    counts = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
    if not counts or any(isinstance(count, bool) or not isinstance(count, int) or count < 0 for count in counts):
        raise ValueError(
            f"blocks_per_worker={value!r} must be 'equal', 'auto', or a list of whole numbers of at least 0, one for "
            "each worker."
        )
