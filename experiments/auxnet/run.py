"""AuxNet against back-propagation in one process and against torch's own pipeline: accuracy, seconds, memory, bytes.

python experiments/auxnet/run.py folder=PATH                     (all studies; PATH: train/<class>/*, test/<class>/*)
python experiments/auxnet/run.py accuracy tasks=[digits]         (some of them, some of it)
python experiments/auxnet/run.py size=smoke out=FOLDER           (seconds)

Studies: accuracy, sweep, timing, links. Options are key=value, all in settings.py; among them tasks, methods, workers,
seeds, epochs, betas, aux_widths, bandwidths_gbit, out. Every method trains in real processes of one thread each, on the
same images in the same order, in the same loop; nothing else should run on the machine, as all of it is timed. Prints
tables, and writes a JSON file for each study and pictures; the full size into experiments/auxnet/results, and its tables
into README.md. A training that was measured is not measured again, unless fresh=true. Links need root and iproute2:
without, they are unshaped only.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.auxnet.main import main

if __name__ == "__main__":
    main(sys.argv[1:], __doc__ or "")
