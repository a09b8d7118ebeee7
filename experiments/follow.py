"""Evaluates the checkpoints of a training on the hold-out images, beside it, and keeps the best in FOLDER/evaluations.

python experiments/train.py callbacks=followed trainer.limit_val_batches=0 hydra.run.dir=RUN_DIR
python experiments/follow.py folder=RUN_DIR/checkpoints
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hydra
import lightning as L
from omegaconf import DictConfig

from experiments.app.build import (
    build_data,
    build_module,
    build_strategy,
    check_follow,
    is_plain,
    make,
    refused_by_lightning,
)
from experiments.app.launch import check_command_line
from experiments.app.quiet import hush
from experiments.evaluate import own_strategy, run_config
from experiments.harness.cli import readable_errors
from experiments.harness.settings import ConfigError
from experiments.train import cpu_threads
from resist_lightning.evaluator import CheckpointEvaluator, Evaluation

hush()


@hydra.main(version_base="1.3", config_path="../conf", config_name="follow")
def main(cfg: DictConfig) -> None:
    with readable_errors():
        check_follow(cfg)
        with cpu_threads(cfg.threads):
            found = follow(cfg)
        best = next((each for each in reversed(found) if each.best), None)
        if best is not None:  # NaN is never the best
            where = Path(cfg.folder, "evaluations", "best.ckpt")
            value = best.metrics[cfg.monitor]
            print(f"{len(found)} models; best {cfg.monitor} {value:.4f} at step {best.step}: {where}")


def follow(cfg: DictConfig) -> list[Evaluation]:
    """Evaluate until the training has ended."""
    trained = run_config(Path(cfg.folder), cfg.run_dir)
    strategy = "auto" if is_plain(cfg.strategy) else build_strategy(own_strategy(cfg.strategy, trained.strategy))
    L.seed_everything(cfg.seed, workers=True)
    data = build_data(trained.data)
    module = build_module(trained, data)
    loggers = [make(node, f"logger.{key}") for key, node in (cfg.logger or {}).items() if node is not None]
    with refused_by_lightning(f"accelerator={cfg.accelerator}"):
        trainer = L.Trainer(
            strategy=strategy,
            accelerator=cfg.accelerator,
            devices=1,
            precision=trained.trainer.precision,
            logger=loggers or False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            default_root_dir=cfg.output_dir,
        )
    try:
        options = {key: cfg[key] for key in ("monitor", "mode", "silence", "poll_seconds")}
        return CheckpointEvaluator(trainer, **options).follow(module, cfg.folder, datamodule=data)
    except ValueError as error:
        raise ConfigError(str(error)) from error


if __name__ == "__main__":
    check_command_line("follow", check_follow)
    main()
