"""Train deep residual networks on workers that are joined by slow links and have little memory.

``import resist_lightning`` registers the strategies ``resist``, ``ist``, ``auxnet`` and ``local_sgd`` with Lightning.
"""

from resist_lightning.config import Config, NeuronConfig, StageConfig
from resist_lightning.engine import Engine
from resist_lightning.errors import (
    BlockSelectionError,
    CheckpointError,
    CheckpointNotWritten,
    LayerSelectionError,
    NotFinite,
    PartialModelError,
    StageSelectionError,
    WorkerLost,
    WorkersDisagree,
)
from resist_lightning.neuron_simulator import NeuronSimulator
from resist_lightning.simulator import Simulator
from resist_lightning.stage_simulator import StageSimulator
from resist_lightning.strategies import (
    AuxNetStrategy,
    ISTStrategy,
    LocalSGDStrategy,
    ResISTStrategy,
    register_strategies,
)

__all__ = [
    "AuxNetStrategy",
    "BlockSelectionError",
    "CheckpointError",
    "CheckpointNotWritten",
    "Config",
    "Engine",
    "ISTStrategy",
    "LayerSelectionError",
    "LocalSGDStrategy",
    "NeuronConfig",
    "NeuronSimulator",
    "NotFinite",
    "PartialModelError",
    "ResISTStrategy",
    "Simulator",
    "StageConfig",
    "StageSelectionError",
    "StageSimulator",
    "WorkerLost",
    "WorkersDisagree",
]

register_strategies()
