"""The settings of an IST run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import nn
from typing_extensions import override

from resist_lightning.methods.config import GrowingConfig, MomentumPolicy
from resist_lightning.methods.ist.partition import NeuronSchedule
from resist_lightning.schedule.progress import Clock
from resist_lightning.schedule.round_length import in_words
from resist_lightning.schedule.stages import plan_stages

HALF = 0.5  # of the neurons: within two points of local SGD, for two fifths of its bytes (decision 64)

LayerChoice: TypeAlias = str | Sequence[str] | Callable[[str, nn.Module], bool] | None


@dataclass(frozen=True, kw_only=True)
class NeuronConfig(GrowingConfig):
    """Settings of a run that partitions hidden neurons (IST).

    Args:
        momentum: as in the other methods, but always ``reset`` by default: a worker could keep only a small part.
        layers: layers whose neurons are dealt out: None (all hidden layers that can be divided; the others stay whole),
            a glob or several over the names of layers, or a predicate of (name, module), which must choose none that
            cannot be divided.
        min_share: minimum share of the neurons of each hidden layer that a worker holds, from 0 to 1. Above
            1 / workers, several workers hold a neuron, and its values are averaged at a sync. 0: one holder for each
            neuron, as in the paper. None, the default: one holder with two workers; half of the neurons with more,
            where a single holder loses much accuracy.
        finish_rounds: last rounds with all neurons on all workers, as in local SGD. Needs the number of local steps of
            the run: a training that ends by steps or epochs, and rounds of known lengths.
        growth: minimum shares of the neurons that each worker holds, each for an equal part of the rounds: ``(0.25,
            0.5)`` begins small; None: ``min_share`` in all rounds. Needs the number of local steps of the run, as
            ``finish_rounds`` does.

    The others are those of :class:`CommonConfig`.

    Raises:
        ValueError: if a value is outside its limits.
    """

    momentum: MomentumPolicy | None = "reset"
    layers: LayerChoice = None
    min_share: float | None = None

    @override
    def __post_init__(self) -> None:
        """Check every value."""
        super().__post_init__()
        share: object = self.min_share
        given = share is not None
        if given and (isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1):
            raise ValueError(
                f"min_share={share!r} must be a number from 0 (one holder for each neuron) to 1 (every worker holds "
                "all neurons, as in local SGD), or None (half of them with more than two workers)."
            )
        self.refuse_beside_growth(min_share=share or None)

    def min_share_of(self, workers: int) -> float:
        """The least share of the neurons that each of ``workers`` holds, in the first round where it grows."""
        if self.growth is not None:
            return self.growth[0]
        if self.min_share is not None:
            return self.min_share
        return 0.0 if workers <= 2 else HALF

    @property
    def rounds_in_words(self) -> str:
        """The settings of a round in words, after "rounds of"."""
        growth = "" if self.growth is None else f", shares of {list(self.growth)} of the neurons in turn"
        finish = f", all neurons everywhere in the last {self.finish_rounds}" if self.finish_rounds else ""
        return f"{in_words(self.local_steps)}{growth}{finish}"


def make_schedule(config: NeuronConfig, widths: tuple[int, ...], workers: int) -> NeuronSchedule:
    """The schedule of the settings, to which :func:`plan_end` adds the stages of growth and finish."""
    return NeuronSchedule(widths, workers, config.seed, config.min_share_of(workers))


def plan_end(schedule: NeuronSchedule, config: NeuronConfig, clock: Clock, total_steps: int | None) -> NeuronSchedule:
    """The partitions of all rounds, where the settings treat the last ones apart.

    Raises:
        ValueError: if it is not known which rounds are the last.
    """
    stages = plan_stages(
        config.growth or (), config.finish_rounds, config.local_steps, clock, total_steps, by=config.by_total_steps
    )
    return replace(schedule, stages=stages)
