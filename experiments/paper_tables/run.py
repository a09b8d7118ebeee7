"""The paper's own accounting, from our planner and networks: Table 1, parameters, MACs and memory per worker.

python experiments/paper_tables/run.py
python experiments/paper_tables/run.py size=smoke

Options: size=smoke|full, out=FOLDER, rounds=N (plans in a mean of bytes), processes=[2,4,8] (groups of real workers whose
memory is measured; [] for none). Prints tables and writes paper_tables.jsonl and gb_per_round.png; the full size into
experiments/paper_tables/results, and its tables into README.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.paper_tables.main import main

if __name__ == "__main__":
    main(sys.argv[1:], __doc__ or "")
