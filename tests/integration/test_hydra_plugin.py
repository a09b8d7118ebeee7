"""In a Hydra application the names need no import by the user (docs/decisions/0006)."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.programs import run_interpreter

APPLICATION = """
import sys
import hydra
import lightning as L

@hydra.main(version_base="1.3", config_path=None)
def main(cfg):
    trainer = L.Trainer(strategy="resist", accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    print("made", type(trainer.strategy).__name__)

assert "resist_lightning" not in sys.modules
main()
"""


def test_the_name_is_known_without_an_import(tmp_path: Path) -> None:
    (tmp_path / "application.py").write_text(APPLICATION)
    assert "made ResISTStrategy" in run_interpreter(["application.py"], tmp_path)
