"""IST against local SGD, DDP and one process: accuracy on equal samples, memory, and bytes of the paper's networks.

python experiments/ist/run.py                                (all studies; about an hour on two cores)
python experiments/ist/run.py accuracy tasks=[digits]        (some of them, some of it)
python experiments/ist/run.py size=sample out=FOLDER         (seconds)

Studies: accuracy, memory, shapes. Options are key=value, all in settings.py; among them seeds, workers, widths, jobs, out.
Prints tables, and writes a JSON file for each study and pictures; the full size into experiments/ist/results, and its
tables into README.md. A training that was measured is not measured again, unless fresh=true. What real links take is
measured by experiments/links/run.py and experiments/time_to_accuracy/run.py with size=ist.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.ist.main import main

if __name__ == "__main__":
    main(sys.argv[1:], __doc__ or "")
