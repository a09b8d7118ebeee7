"""A user's program with LightningCLI, for tests: ``python -m tests.helpers.command_line fit ...``."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch.cli import LightningCLI

import resist_lightning  # noqa: F401  registers the strategies
from tests.helpers.launched import Data
from tests.helpers.plain import Classifier

if __name__ == "__main__":
    cli = LightningCLI(Classifier, Data)
    if cli.trainer.is_global_zero:
        torch.save(cli.model.state_dict(), Path(cli.trainer.default_root_dir) / "weights.pt")
