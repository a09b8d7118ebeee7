"""Trains, tests the full model and reports; everything lands in Hydra's run folder.

python experiments/train.py model.depth=38 trainer.devices=2 strategy.local_steps=50
python experiments/train.py strategy=single trainer.devices=1
python experiments/train.py -m strategy.local_steps=10,50 trainer.devices=1,2
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also in spawned workers, which import this file

import hydra
import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.callbacks import LearningRateMonitor
from omegaconf import DictConfig

from experiments.app.build import (
    build_data,
    build_module,
    build_strategy,
    check_train,
    count_workers,
    make,
    strategy_name,
)
from experiments.app.launch import check_command_line
from experiments.app.quiet import hush
from experiments.app.results import remove_results, write_run
from experiments.evaluate import evaluate
from experiments.harness.cli import readable_errors
from experiments.harness.settings import ConfigError
from experiments.report import report
from resist_lightning.strategies.base import SubnetStrategy

hush()


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
def main(cfg: DictConfig) -> float:
    """Run a job; returns its test accuracy, for sweepers that optimise."""
    with readable_errors():
        sweep = HydraConfig.get().mode == RunMode.MULTIRUN
        check_train(cfg, sweep=sweep)
        with cpu_threads(cfg.threads):
            return run(cfg)


def run(cfg: DictConfig) -> float:
    """Fit, test and report.

    Returns:
        Test accuracy of the full model, 0 to 1; not a number in processes that do not report.
    """
    L.seed_everything(cfg.seed, workers=True)
    torch.set_float32_matmul_precision("high")
    data = build_data(cfg.data)
    module = build_module(cfg, data)
    # Before the strategy takes blocks away.
    full_parameters = sum(p.numel() for p in module.parameters())
    trainer = build_trainer(cfg)
    # In the data type in which it will train, as the strategy will convert it.
    parameters = trainer.precision_plugin.convert_module(module).parameters()
    gradient_bytes = sum(parameter.nbytes for parameter in parameters if parameter.requires_grad)
    if trainer.local_rank == 0:
        data.prepare_data()  # here and not in a worker: the others would wait for it, no longer than their timeout
    if trainer.is_global_zero:
        remove_results(Path(cfg.output_dir))
    earlier = last_checkpoints(cfg, trainer)
    started = time.perf_counter()
    fit(trainer, module, data)
    wall_seconds = time.perf_counter() - started
    # Under torchrun every worker comes here: all test under a strategy, and one reports.
    testing = testing_strategy(cfg)
    reporting = trainer.is_global_zero
    if not reporting and (testing is None or trainer.interrupted):
        return float("nan")
    if trainer.interrupted:
        raise ConfigError("the training was interrupted; there is nothing to report")
    checkpoint = tested_checkpoint(cfg, trainer, earlier)
    metrics = evaluate(module, data, cfg, checkpoint=checkpoint, strategy=testing)
    if not reporting:
        return float("nan")
    write_run(
        Path(cfg.output_dir),
        {
            "strategy": strategy_name(cfg.strategy),
            "workers": count_workers(trainer.strategy, cfg.trainer),
            "seed": cfg.seed,
            "full_parameters": full_parameters,
            "gradient_bytes": gradient_bytes,
            "wall_seconds": wall_seconds,
            "checkpoint": str(checkpoint) if checkpoint else None,
            "test": metrics,
        },
    )
    return report(Path(cfg.output_dir))["test"]["accuracy"]


@contextmanager
def cpu_threads(threads: int | None) -> Iterator[None]:
    """Give this process and the workers that it starts so many threads; None leaves it to torch and Lightning."""
    if threads is None:
        yield
        return
    usual = torch.get_num_threads()
    told = os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        yield
    finally:  # the next job of a sweep may want another number
        torch.set_num_threads(usual)
        os.environ.pop("OMP_NUM_THREADS")
        if told is not None:
            os.environ["OMP_NUM_THREADS"] = told


def build_trainer(cfg: DictConfig) -> L.Trainer:
    """The trainer with its strategy, callbacks and loggers; an entry that is null is left out.

    So is a monitor of the learning rate where no logger is left, which Lightning would refuse in the workers.
    """
    strategy = build_strategy(cfg.strategy)
    chosen = {key: node for key, node in (cfg.callbacks or {}).items() if node is not None}
    if not isinstance(strategy, SubnetStrategy):
        chosen.pop("round_monitor", None)  # it would warn that there is nothing to report
    loggers = [make(node, f"logger.{key}") for key, node in (cfg.logger or {}).items() if node is not None]
    made = [make(node, f"callbacks.{key}") for key, node in chosen.items()]
    callbacks = [one for one in made if loggers or not isinstance(one, LearningRateMonitor)]
    return make(
        cfg.trainer,
        "trainer",
        strategy=strategy,
        callbacks=callbacks,
        logger=loggers or False,
        enable_checkpointing="model_checkpoint" in chosen,
        enable_progress_bar=cfg.trainer.enable_progress_bar and "progress_bar" in chosen,
    )


def fit(trainer: L.Trainer, module: L.LightningModule, data: L.LightningDataModule) -> None:
    """Train; an error of the strategy's checks before any process starts becomes a ConfigError."""
    try:
        trainer.fit(module, datamodule=data)
    except ValueError as error:
        # An error of a worker comes wrapped; a bare one is the strategy's own check of model and settings.
        if trainer.num_devices > 1 and trainer.strategy.__class__.__module__.startswith("resist_lightning"):
            raise ConfigError(str(error)) from error
        raise


def last_checkpoints(cfg: DictConfig, trainer: L.Trainer) -> dict[Path, int]:
    """The files of last checkpoints, also of earlier runs in this folder, with their times of writing."""
    given = getattr(trainer.checkpoint_callback, "dirpath", None)
    folder = Path(given or Path(cfg.output_dir) / "checkpoints")
    return {path: path.stat().st_mtime_ns for path in folder.glob("last*.ckpt")}


def tested_checkpoint(cfg: DictConfig, trainer: L.Trainer, earlier: Mapping[Path, int]) -> Path | None:
    """The file whose model is tested; None for the model as the training left it.

    Args:
        cfg: the configuration.
        trainer: after its training.
        earlier: `last_checkpoints` before its training, of an earlier run.
    """
    saved = trainer.checkpoint_callback
    if cfg.ckpt_path is None or (saved is None and cfg.ckpt_path in ("best", "last")):
        return None
    if cfg.ckpt_path == "best":
        best: Any = getattr(saved, "best_model_path", "")
        return Path(best) if best else None
    if cfg.ckpt_path == "last":
        written = {path: when for path, when in last_checkpoints(cfg, trainer).items() if earlier.get(path) != when}
        return max(written, key=lambda path: written[path], default=None)
    return Path(cfg.ckpt_path)


def testing_strategy(cfg: DictConfig) -> DictConfig | None:
    """None, for the plain module in one process: exact, as no image is counted twice to fill up a worker's
    batch.

    Statistics of each batch are not in a checkpoint, so with that policy the strategy must evaluate.
    """
    return cfg.strategy if cfg.strategy.get("batch_norm") == "batch" else None


if __name__ == "__main__":
    check_command_line("train", check_train)
    main()
