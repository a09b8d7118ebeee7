"""Warns of settings of ResIST and local SGD without the effect that a user may expect."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from resist_lightning.methods.globs import summary
from resist_lightning.methods.residual import untrained
from resist_lightning.methods.resist.network import ONLY_LOOKING, PARTITIONED, left_out, only_look_residual, share_of

if TYPE_CHECKING:  # which warns with it
    from resist_lightning.methods.resist.layout import BlockLayout


def warn_about_settings(layout: BlockLayout) -> None:
    """Warn before the training, once about each such setting."""
    unused = left_out(layout.module, layout.config.blocks, layout.trained)
    if unused:
        if layout.config.blocks is None:
            why = "stay shared: they have a tensor in common with other modules (tied weights)."
        else:
            why = (
                "match `blocks` but stay shared: they seem to change the shape of their input, are single layers or "
                "chains of layers, or belong to a network that does not train."
            )
        warnings.warn(f"{summary(unused)} {why}", stacklevel=4)
    _warn_of_blocks_that_only_look_residual(layout)
    still = untrained(layout.module, layout.blocks, layout.trained)
    if still:
        warnings.warn(
            f"nothing trains now in the network of {summary([block.name for block in still])}, but `blocks` partitions "
            "them: its outputs differ between workers. If it is a teacher or a moving average, leave it out of "
            "`blocks`; if it will be trained later, ignore this.",
            stacklevel=4,
        )
    if layout.workers == 1:
        return
    _warn_of_idle_fragments(layout)
    if not layout.blocks:
        return
    layout.warn_of_batch_statistics()
    if not isinstance(layout.config.blocks_per_worker, str):  # the user has listed the counts, and knows them
        return
    if not layout.partial and layout.config.min_blocks is None:
        warnings.warn(
            f"nothing is partitioned: the default min_blocks={layout.schedule.min_blocks} gives every worker all "
            f"{len(layout.blocks)} block(s). Set min_blocks=0, choose more `blocks`, or use strategy='local_sgd'.",
            stacklevel=4,
        )
    if any(not held for held in layout.usual_partition().held):
        warnings.warn(
            f"{layout.workers} workers for {len(layout.blocks)} blocks with min_blocks=0: in each round some workers "
            "train only shared layers. Set min_blocks=1 or more, or start fewer workers.",
            stacklevel=4,
        )


def _warn_of_blocks_that_only_look_residual(layout: BlockLayout) -> None:
    if layout.config.blocks is not None or share_of(layout.module, layout.blocks) >= PARTITIONED:
        return
    others = only_look_residual(layout.module)
    if others:
        warnings.warn(f"{summary(others)} {ONLY_LOOKING}: they stay shared.", stacklevel=5)


def _warn_of_idle_fragments(layout: BlockLayout) -> None:
    named = dict(layout.module.named_parameters())
    training = {name: named[name] for name in named.keys() & layout.changing()}
    idle = [part for part in layout.fragments.parts(training) if not part]
    if idle and training:
        warnings.warn(
            f"fragments={layout.config.fragments}: nothing trains in {len(idle)} of them, so their syncs send next to "
            f"nothing. Choose {layout.config.fragments - len(idle)} or fewer.",
            stacklevel=5,
        )
