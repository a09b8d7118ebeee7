"""Numbers of IST's paper, as its authors' project page gives them; none of them is ours.

Source: the page of the project (GitHub akyrillidis/ist, IST.html, of July 2021), its text and its Table 3. The body of
the paper was not available to us.
"""

from __future__ import annotations

from experiments.harness.tables import markdown

ACCURACY = (
    ("speech, 2 layers (hidden 4096)", "0.7938", "0.7998", "0.8153"),
    ("speech, 3 layers (hidden 8192)", "0.7950", "0.7992", "0.8327"),
)
SPEED_UP = (("speech, 2 layers", "77 %", "4.2x", "10.6x"), ("speech, 3 layers", "77 %", "6.1x", "16.6x"))


def paper_accuracy() -> str:
    """Final accuracy [page, Table 3]."""
    return markdown(["the paper's own", "data parallel", "local SGD", "IST"], [list(row) for row in ACCURACY])


def paper_speed_up() -> str:
    """Time to an accuracy [page, text]."""
    header = ["the paper's own", "time to", "IST faster than local SGD", "than data parallel"]
    return markdown(header, [list(row) for row in SPEED_UP])
