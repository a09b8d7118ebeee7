"""Networks of the paper, for experiments and tests. Torch only; nothing else in the package imports them."""

from resist_lightning.models.preact import (
    SECTIONS_OF_DEPTH,
    PreActBlock,
    PreActResNet,
    preact_resnet,
)

__all__ = ["SECTIONS_OF_DEPTH", "PreActBlock", "PreActResNet", "preact_resnet"]
