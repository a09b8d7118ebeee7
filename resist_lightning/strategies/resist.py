"""``Trainer(strategy="resist")``."""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from resist_lightning.methods.resist.config import Config
from resist_lightning.strategies.base import SubnetStrategy
from resist_lightning.strategies.options import LocalTrainingOptions, config_of, takes


@dataclass(frozen=True, kw_only=True)
class ResISTOptions(LocalTrainingOptions, Config):
    """Options of :class:`ResISTStrategy`.

    Args:
        blocks: the residual blocks to partition: None (section 3 of a ResNet without its first block, as in the paper,
            or the blocks of all sections where those are less than half of the parameters), a glob or several over
            module names such as ``"layer3.*"``, or a predicate of (name, module).
    """

    @override
    def __post_init__(self) -> None:
        """Check every value that :class:`Config` does not."""
        super().__post_init__()
        if self.blocks is not None and not callable(self.blocks) and not len(self.blocks):
            raise ValueError("blocks is empty, so nothing would be partitioned; use strategy='local_sgd' for that.")


class ResISTStrategy(SubnetStrategy):
    """Independent sub-networks of a residual network, one per worker (ResIST, arXiv 2107.00961).

    Each round, every worker trains the shared layers and a random part of the residual blocks for ``local_steps``
    steps without communicating; then shared layers are averaged, blocks are handed over, and a new partition is drawn.
    For evaluation, for checkpoints and after ``fit`` the module is the full model, on every worker.
    """

    strategy_name = "resist"
    config: Config

    @takes(ResISTOptions)
    def __init__(self, options: ResISTOptions) -> None:
        super().__init__(config_of(options, Config), options, options.data)
