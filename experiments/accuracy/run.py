"""Accuracy on equal samples: one process, DDP, local SGD and ResIST with 2, 4 and 8 workers; and the paper's ablations.

python experiments/accuracy/run.py folder=PATH                 (all studies; PATH: train/<class>/*, test/<class>/*)
python experiments/accuracy/run.py main check folder=PATH      (some of them)
python experiments/accuracy/run.py data=cifar10 folder=PATH    (torchvision downloads CIFAR-10 to PATH)
python experiments/accuracy/run.py size=smoke out=/tmp/smoke   (seconds, on digits)

Studies: main check design local_steps momentum batch_norm scale wire rates. Options are key=value: see settings.py. A
result is written as soon as it is there (results/STUDY.jsonl); a second call goes on from there, fresh=true begins anew.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.accuracy.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], __doc__ or ""))
