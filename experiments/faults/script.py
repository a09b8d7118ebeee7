"""A user's training script: ``python -m experiments.faults.script FOLDER``, alone or under torchrun."""

from __future__ import annotations

import sys
from pathlib import Path

from experiments.faults.training import train

if __name__ == "__main__":
    train(Path(sys.argv[1]))
