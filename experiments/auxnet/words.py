"""Methods in words."""

from __future__ import annotations

from experiments.auxnet.cases import HYBRID_EVERY

TITLES = {
    "serial": "one process",
    "penalty": "AuxNet, penalty",
    "al-net": "AuxNet, augmented Lagrangian",
    "hybrid": f"AuxNet, every {HYBRID_EVERY}th step serial",
    "penalty-store": "penalty, stored guesses",
    "al-store": "augmented Lagrangian, stored guesses",
    "pipeline": "pipeline (torch's)",
    "serial-stages": "stages in series (AuxNet's warm-up)",
}


def title(method: str, schedule: str | None = None) -> str:
    """A method, and the schedule of a pipeline where there are several."""
    return TITLES[method] + (f", {schedule}" if schedule else "")
