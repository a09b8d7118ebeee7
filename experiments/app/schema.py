"""What a configuration may say: keys, types and limits. Data only; `experiments.app.checks` compares a config
with it.

Fields have no defaults: those stand in ``conf/``, once. A section is checked against the class of its
``_target_``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torchvision
from omegaconf import MISSING

from experiments.app.strategy_schema import DDP, IST, AuxNet, LocalSGD, Plain, ResIST
from experiments.harness.settings import limited
from experiments.networks import NORMS
from resist_lightning.models import SECTIONS_OF_DEPTH

RESNETS = tuple(
    name for name in torchvision.models.list_models(torchvision.models) if name.startswith(("resne", "wide_resnet"))
)


@dataclass
class PreAct:
    _target_: str = MISSING
    depth: int = limited(choices=tuple(SECTIONS_OF_DEPTH), hint="101, 152 and 200 are the paper's; 38 suits a CPU")
    width_multiplier: float = limited(above=0, hint="1.0 is the paper's width")
    track_running_stats: bool = MISSING


@dataclass
class Torchvision:
    _target_: str = MISSING
    name: str = limited(choices=RESNETS, hint="resnet18 is the smallest")
    small_images: bool = MISSING
    pretrained: bool = MISSING


@dataclass
class MLP:
    _target_: str = MISSING
    depth: int = limited(least=2, hint="linear layers; 2 and 3 are the paper's, 2 has one hidden layer")
    width: int = limited(least=1, hint="neurons of each hidden layer; 4096 and 8192 are the paper's")
    norm: str = limited(choices=NORMS, hint="batch is the paper's")
    output_norm: bool = MISSING
    dropout: float = limited(least=0, below=1, hint="0 is the paper's")


@dataclass
class Data:
    _target_: str = MISSING
    batch_size: int = limited(least=1, hint="images per local step of one worker; the paper takes 128")
    eval_batch_size: int = limited(least=1, hint="256 is the default")
    holdout: float = limited(above=0, below=1, hint="share of the training images for validation; 0.1 is the paper's")
    limit: int | None = limited(least=1, hint="training images of each class; null takes all")
    limit_test: int | None = limited(least=1, hint="test images of each class; null takes all")
    augment: bool = MISSING
    drop_last: bool = MISSING
    num_workers: int = limited(least=0, hint="0 loads in the training process")


@dataclass
class Digits(Data):
    crop_padding: int = limited(least=0, hint="0 for no random crop")


@dataclass
class CIFAR(Data):
    folder: str = MISSING


@dataclass
class ImageFolder(Data):
    folder: str = MISSING
    cache_dir: str = MISSING
    image_size: int = limited(least=8, hint="height and width in pixels; 32 is the default")
    test_fraction: float = limited(above=0, below=1, hint="used where the folder has no train/ and test/")
    mean: list[float] = MISSING
    std: list[float] = MISSING


@dataclass
class Fake(Data):
    train_size: int = limited(least=2, hint="images for training and validation")
    test_size: int = limited(least=1, hint="images for the test")
    image_size: int = limited(least=1, hint="height and width in pixels")
    channels: int = limited(least=1, hint="3 for colour")
    classes: int = limited(least=2, hint="10 as in CIFAR-10")


@dataclass
class SpeechCommands(Data):
    folder: str = MISSING
    cache_dir: str = MISSING
    download: bool = MISSING


@dataclass
class SpeechShaped(Data):
    train_size: int = limited(least=2, hint="examples for training and validation; 8192 is the default")
    test_size: int = limited(least=1, hint="examples for the test; 2048 is the default")
    features: int = limited(least=1, hint="4096 as in Speech Commands")
    classes: int = limited(least=2, hint="35 as in Speech Commands")
    seed: int = limited(least=0, hint="0 is a seed; another one is another task")


@dataclass
class Trainer:
    _target_: str = MISSING
    accelerator: str = limited(choices=("auto", "cpu", "gpu", "cuda", "mps"), hint="auto takes what is there")
    devices: int = limited(least=1, hint="workers on this host; 1 is plain training")
    num_nodes: int = limited(least=1, hint="hosts")
    precision: str = MISSING
    max_epochs: int | None = limited(
        least=1, hint="passes over a worker's images; limit by trainer.max_steps instead: null"
    )
    max_steps: int = limited(least=-1, hint="local steps; -1 for no limit")
    accumulate_grad_batches: int = limited(least=1, hint="1 steps after every batch")
    gradient_clip_val: float | None = limited(above=0, hint="null for no clipping")
    check_val_every_n_epoch: int = limited(least=1, hint="1 validates after every epoch")
    limit_train_batches: int | float | None = limited(above=0, hint="a whole number of batches, a share, or null")
    limit_val_batches: int | float | None = limited(least=0, hint="a whole number of batches, a share, or null")
    limit_test_batches: int | float | None = limited(above=0, hint="a whole number of batches, a share, or null")
    overfit_batches: int | float = limited(least=0, hint="0 for usual training")
    num_sanity_val_steps: int = limited(least=-1, hint="0 for none")
    log_every_n_steps: int = limited(least=1, hint="10 is enough for a curve")
    fast_dev_run: int | bool = MISSING
    deterministic: bool = MISSING
    detect_anomaly: bool = MISSING
    enable_progress_bar: bool = MISSING
    enable_model_summary: bool = MISSING
    default_root_dir: str = MISSING


@dataclass
class Optimizer:
    lr: float = limited(above=0, hint="0.03 is the paper's for CIFAR-100")
    momentum: float = limited(least=0, below=1, hint="0.9 is the paper's")
    weight_decay: float = limited(least=0, hint="5e-4 is the paper's")
    schedule: str = limited(choices=("multistep", "constant"), hint="multistep is the paper's")


@dataclass
class Train:
    """The root of ``conf/train.yaml``. Sections of type Any are checked by their own ``_target_``."""

    seed: int = limited(least=0, hint="0 is a seed")
    ckpt_path: str | None = MISSING
    threads: int | None = limited(least=1, hint="CPU threads of each worker; null divides the cores")
    output_dir: str = MISSING
    optimizer: Optimizer = MISSING
    trainer: Trainer = MISSING
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
    split: str = limited(choices=("test", "val"), hint="val is the hold-out of the training images")
    accelerator: str = limited(choices=("auto", "cpu", "gpu", "cuda", "mps"), hint="auto takes what is there")
    devices: int = limited(least=1, hint="1 unless a strategy is named")
    seed: int = limited(least=0, hint="0 is a seed")
    output_dir: str = MISSING


STRATEGIES: dict[str, type] = {
    "resist_lightning.ResISTStrategy": ResIST,
    "resist_lightning.ISTStrategy": IST,
    "resist_lightning.AuxNetStrategy": AuxNet,
    "resist_lightning.LocalSGDStrategy": LocalSGD,
    "lightning.pytorch.strategies.DDPStrategy": DDP,
    "builtins.str": Plain,
}
STRATEGY_NAMES = {
    "resist_lightning.ResISTStrategy": "resist",
    "resist_lightning.ISTStrategy": "ist",
    "resist_lightning.AuxNetStrategy": "auxnet",
    "resist_lightning.LocalSGDStrategy": "local_sgd",
    "lightning.pytorch.strategies.DDPStrategy": "ddp",
    "builtins.str": "single",
}
MODELS: dict[str, type] = {
    "resist_lightning.models.preact_resnet": PreAct,
    "experiments.networks.torchvision_resnet": Torchvision,
    "experiments.networks.mlp": MLP,
}
IMAGE_MODELS = frozenset({"resist_lightning.models.preact_resnet", "experiments.networks.torchvision_resnet"})
DATA: dict[str, type] = {
    "experiments.data.Digits": Digits,
    "experiments.data.CIFAR10": CIFAR,
    "experiments.data.CIFAR100": CIFAR,
    "experiments.data.ImageFolder": ImageFolder,
    "experiments.data.Fake": Fake,
    "experiments.data.SpeechCommands": SpeechCommands,
    "experiments.data.SpeechShaped": SpeechShaped,
}
