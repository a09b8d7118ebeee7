"""Limits of the configuration where no class of ours checks it: the root, Lightning's trainer, the optimizer.

Fields have no defaults: those stand in ``conf/``, once. All other sections are checked against their targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from experiments.harness.settings import option

ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
BATCHES = "a whole number of batches, a share, or null"


@dataclass
class Trainer:
    _target_: str = MISSING
    accelerator: str = option(choices=ACCELERATORS, hint="auto uses what the host has")
    devices: int = option(least=1, hint="workers on this host; 1 is plain training")
    num_nodes: int = option(least=1, hint="hosts")
    precision: str = MISSING
    max_epochs: int | None = option(least=1, hint="passes over a worker's images; null: limited by trainer.max_steps")
    max_steps: int = option(least=-1, hint="local steps; -1 for no limit")
    accumulate_grad_batches: int = option(least=1, hint="1: a step after every batch")
    gradient_clip_val: float | None = option(above=0, hint="null for no clipping")
    check_val_every_n_epoch: int = option(least=1, hint="1: validates after every epoch")
    limit_train_batches: int | float | None = option(above=0, hint=BATCHES)
    limit_val_batches: int | float | None = option(least=0, hint=BATCHES)
    limit_test_batches: int | float | None = option(above=0, hint=BATCHES)
    overfit_batches: int | float = option(least=0, hint="0 for normal training")
    num_sanity_val_steps: int = option(least=-1, hint="0 for none")
    log_every_n_steps: int = option(least=1, hint="10 is the default")
    fast_dev_run: int | bool = MISSING
    deterministic: bool = MISSING
    detect_anomaly: bool = MISSING
    enable_progress_bar: bool = MISSING
    enable_model_summary: bool = MISSING
    default_root_dir: str = MISSING


@dataclass
class Duration:
    _target_: str = MISSING
    seconds: float = option(above=0, hint="600 is the default of timeout, 30 of silence")


@dataclass
class Optimizer:
    lr: float = option(above=0, hint="0.03 is the paper's for CIFAR-100")
    momentum: float = option(least=0, below=1, hint="0.9 is the paper's")
    weight_decay: float = option(least=0, hint="5e-4 is the paper's")
    schedule: str = option(choices=("multistep", "constant"), hint="multistep is the paper's")


@dataclass
class Train:
    """The root of ``conf/train.yaml``."""

    seed: int = option(least=0, hint="0 is a seed")
    ckpt_path: str | None = MISSING
    threads: int | None = option(least=1, hint="CPU threads of each worker; null divides the cores")
    output_dir: str = MISSING
    optimizer: Any = MISSING
    trainer: Any = MISSING
    strategy: Any = MISSING
    model: Any = MISSING
    data: Any = MISSING
    callbacks: Any = MISSING
    logger: Any = MISSING


@dataclass
class Evaluate:
    """The root of ``conf/evaluate.yaml``."""

    ckpt_path: str = MISSING
    run_dir: str | None = MISSING
    strategy: Any = MISSING
    split: str = option(choices=("test", "val"), hint="val: images held out of the training set")
    accelerator: str = option(choices=ACCELERATORS, hint="auto uses what the host has")
    devices: int = option(least=1, hint="1 unless a strategy is set")
    seed: int = option(least=0, hint="0 is a seed")
    output_dir: str = MISSING


@dataclass
class Follow:
    """The root of ``conf/follow.yaml``."""

    folder: str = MISSING
    run_dir: str | None = MISSING
    strategy: Any = MISSING
    logger: Any = MISSING
    monitor: str = MISSING
    mode: str = option(choices=("min", "max"), hint="max for an accuracy")
    silence: float = option(above=0, hint="seconds; 3600 is the default")
    poll_seconds: float = option(above=0, hint="5 is the default")
    accelerator: str = option(choices=ACCELERATORS, hint="auto uses what the host has")
    threads: int | None = option(least=1, hint="CPU threads; null takes all cores")
    seed: int = option(least=0, hint="0 is a seed")
    output_dir: str = MISSING
