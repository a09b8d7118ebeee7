"""Train deep residual networks on workers that are joined by slow links and have little memory.

``import resist_lightning`` registers the strategies ``resist``, ``ist``, ``auxnet`` and ``local_sgd`` with Lightning.
"""

from resist_lightning.engine.engine import Engine
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
from resist_lightning.methods.auxnet.config import StageConfig
from resist_lightning.methods.auxnet.simulator import StageSimulator
from resist_lightning.methods.ist.config import NeuronConfig
from resist_lightning.methods.ist.simulator import NeuronSimulator
from resist_lightning.methods.resist.config import Config
from resist_lightning.methods.resist.simulator import Simulator
from resist_lightning.schedule.round_length import QSR, PostLocal
from resist_lightning.strategies import (
    AuxNetStrategy,
    ISTStrategy,
    LocalSGDStrategy,
    ResISTStrategy,
    register_strategies,
)

__all__ = [
    "QSR",
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
    "PostLocal",
    "ResISTStrategy",
    "Simulator",
    "StageConfig",
    "StageSelectionError",
    "StageSimulator",
    "WorkerLost",
    "WorkersDisagree",
]

register_strategies()
