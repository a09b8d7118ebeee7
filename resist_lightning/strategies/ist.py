"""``Trainer(strategy="ist")``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from resist_lightning.methods.ist.config import NeuronConfig
from resist_lightning.schedule.round_length import LocalStepsRule
from resist_lightning.strategies.base import SubnetStrategy
from resist_lightning.strategies.options import LocalTrainingOptions, config_of, takes


@dataclass(frozen=True, kw_only=True)
class ISTOptions(LocalTrainingOptions, NeuronConfig):
    """Options of :class:`ISTStrategy`."""

    without: ClassVar[Mapping[str, str]] = {
        "fragments": "each sync draws all neurons again, as in the paper.",
        "overlap": "a slice that moves could not train meanwhile: the old holder's tensors have no place for it.",
    }
    local_steps: LocalStepsRule = 20


class ISTStrategy(SubnetStrategy):
    """Independent subnets across the width of a fully connected network, one per worker (IST, arXiv 1910.02120).

    Each round, the neurons of every hidden layer are dealt out to the workers; inputs and outputs go to all. With two
    workers each neuron goes to one of them, with more to several, so that each worker has half (``min_share``). Every
    worker trains a network of full depth and less width for ``local_steps`` steps without communicating; then copies of
    a neuron are averaged, and the neurons are dealt anew. Of a matrix between two hidden layers a worker with a share p
    of the neurons trains p² of the entries; entries that nobody trains in a round are kept in the memory of one
    worker's host. For evaluation, for checkpoints and after ``fit`` the module is the full model, on every worker.

    The hidden layers are found in the module, which is not edited: `Linear`, norm, activation, dropout, `Linear` in any
    nesting, and convolutional chains, whose channels are neurons. For residual networks use ``strategy="resist"``.
    """

    strategy_name = "ist"
    config: NeuronConfig

    @takes(ISTOptions)
    def __init__(self, options: ISTOptions) -> None:
        super().__init__(config_of(options, NeuronConfig), options, options.data)
