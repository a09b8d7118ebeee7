"""The strategies that a Lightning ``Trainer`` takes, and the code that connects them to its loops."""

from resist_lightning.strategies.auxnet import AuxNetStrategy
from resist_lightning.strategies.ist import ISTStrategy
from resist_lightning.strategies.local_sgd import LocalSGDStrategy
from resist_lightning.strategies.registry import register_strategies
from resist_lightning.strategies.resist import ResISTStrategy

__all__ = ["AuxNetStrategy", "ISTStrategy", "LocalSGDStrategy", "ResISTStrategy", "register_strategies"]
