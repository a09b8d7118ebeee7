"""``Trainer(strategy="local_sgd")``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from typing_extensions import override

from resist_lightning.methods.config import NormPolicy, check_choice
from resist_lightning.methods.resist.config import BlockChoice, BlockCounts, Config
from resist_lightning.strategies.base import SubnetStrategy
from resist_lightning.strategies.options import LocalTrainingOptions, config_of, takes


@dataclass(frozen=True, kw_only=True)
class LocalSGDOptions(LocalTrainingOptions, Config):
    """Options of :class:`LocalSGDStrategy`: those of :class:`Config` that need no partition.

    Args:
        momentum: treatment of optimizer state at a sync: ``"reset"`` or ``"keep"``; None: ``"reset"`` with SGD,
            ``"keep"`` with other optimizers, whose second moments take long to estimate.
    """

    momentum: Literal["reset", "keep"] | None = None
    batch_norm: NormPolicy = field(init=False, default="running")
    recalibration_batches: int = field(init=False, default=8)
    seed: int = field(init=False, default=0)
    min_blocks: int | None = field(init=False, default=None)
    blocks_per_worker: BlockCounts = field(init=False, default="equal")
    blocks: BlockChoice = field(init=False, default_factory=list)
    warmup_rounds: int = field(init=False, default=0)
    finish_rounds: int = field(init=False, default=0)
    growth: Sequence[float] | None = field(init=False, default=None)
    test_scale: float | None = field(init=False, default=None)

    @override
    def __post_init__(self) -> None:
        """Check every value that :class:`Config` does not."""
        super().__post_init__()
        if self.momentum is not None:
            check_choice("momentum", self.momentum, ("reset", "keep"))


class LocalSGDStrategy(SubnetStrategy):
    """Local SGD: the full model on every worker, averaged once a round. It is ResIST with nothing partitioned."""

    strategy_name = "local_sgd"
    config: Config

    @takes(LocalSGDOptions)
    def __init__(self, options: LocalSGDOptions) -> None:
        super().__init__(config_of(options, Config), options, options.data)
