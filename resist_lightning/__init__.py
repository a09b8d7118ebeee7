"""Train deep residual networks on workers that are joined by slow links and have little memory.

``import resist_lightning`` registers the strategies ``resist`` and ``local_sgd`` with Lightning.
"""

from resist_lightning.config import Config
from resist_lightning.engine import Engine
from resist_lightning.errors import (
    BlockSelectionError,
    CheckpointError,
    CheckpointNotWritten,
    NotFinite,
    PartialModelError,
    WorkerLost,
    WorkersDisagree,
)
from resist_lightning.simulator import Simulator
from resist_lightning.strategies import LocalSGDStrategy, ResISTStrategy, register_strategies

__all__ = [
    "BlockSelectionError",
    "CheckpointError",
    "CheckpointNotWritten",
    "Config",
    "Engine",
    "LocalSGDStrategy",
    "NotFinite",
    "PartialModelError",
    "ResISTStrategy",
    "Simulator",
    "WorkerLost",
    "WorkersDisagree",
]

register_strategies()
