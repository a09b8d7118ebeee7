"""What a configuration may say of a strategy; part of `experiments.app.schema`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from omegaconf import MISSING

from experiments.harness.settings import limited
from resist_lightning.comm.bytes import WIRE_FORMATS
from resist_lightning.methods.auxnet.config import AuxMethod

WIRE_HINT = "bits of a parameter at a sync; fp32 sends it as it is"


@dataclass
class Timeout:
    _target_: str = MISSING
    seconds: float = limited(above=0, hint="longer than the slowest worker's lag in a round; 600 is the default")


@dataclass
class Silence:
    _target_: str = MISSING
    seconds: float = limited(least=3, hint="workers give a sign of life every second; 30 is the default")


@dataclass
class Workers:
    """What the strategies of this package have in common."""

    _target_: str = MISSING
    check: str = limited(choices=("sampled", "full", "off"), hint="hashes of shared tensors, compared after each sync")
    parallel_devices: list[str] | None = MISSING
    process_group_backend: str | None = limited(choices=("gloo", "nccl"), hint="null chooses by the device")
    timeout: Timeout = MISSING
    silence: Silence = MISSING
    on_save_error: str = limited(choices=("raise", "warn"), hint="warn goes on without the checkpoint")
    snapshots: str | None = MISSING
    snapshot_every_n_rounds: int = limited(least=1, hint="1 writes one before each round")
    on_worker_loss: str = limited(choices=("stop", "shrink"), hint="shrink needs snapshots, and torchrun")
    start_method: str = limited(
        choices=("spawn", "fork", "forkserver", "popen"), hint="spawn works in sweeps, popen under torchrun"
    )


@dataclass
class Rounds(Workers):
    """Those whose workers average, or hand over, after each round."""

    local_steps: int = limited(least=1, hint="the paper takes 50; 1 averages after every step")
    non_finite: str = limited(
        choices=("raise", "drop"), hint="drop leaves a worker with NaN or infinity out of a round"
    )
    data: str = limited(choices=("shard", "copy"), hint="copy is the paper's: all images on every worker")


@dataclass
class ResIST(Rounds):
    wire: str = limited(choices=tuple(WIRE_FORMATS), hint=WIRE_HINT)
    momentum: str = limited(choices=("reset", "keep", "travel"), hint="the paper restarts it: reset")
    batch_norm: str = limited(choices=("recalibrate", "running", "batch"), hint="recalibrate is the default")
    min_blocks: int | None = limited(least=0, hint="0 allows workers without a block; null takes 5, as the paper")
    blocks_per_worker: Any = MISSING
    blocks: Any = MISSING
    seed: int = limited(least=0, hint="0 is a seed")
    warmup_rounds: int = limited(least=0, hint="0 means no warm-up")
    test_scale: float | None = limited(above=0, most=1, hint="null takes the share of the blocks that a worker holds")


@dataclass
class IST(Rounds):
    momentum: str = limited(choices=("reset", "keep", "travel"), hint="the authors' groups restart it: reset")
    batch_norm: str = limited(choices=("recalibrate", "running", "batch"), hint="recalibrate is the default")
    layers: Any = MISSING
    seed: int = limited(least=0, hint="0 is a seed")


@dataclass
class AuxNet(Workers):
    method: str = limited(choices=get_args(AuxMethod), hint="penalty is the default; those with -store keep guesses")
    beta: float = limited(above=0, hint="weight of the penalty")
    beta_growth: float = limited(least=1, hint="1 leaves beta as it is")
    lambda_step: float | None = limited(above=0, most=1, hint="null takes 1, or 0.1 where three stages store")
    multiplier_every: int = limited(least=1, hint="10 is the default; 1 may diverge")
    warmup_steps: int = limited(least=0, hint="0 means no warm-up")
    serial_every: int = limited(least=0, hint="0 means never, 1 means always")
    cuts: Any = MISSING
    network: str | None = MISSING
    input: Any = MISSING
    aux_network: Any = MISSING
    aux_width: int = limited(least=1, hint="channels of the auxiliary networks")
    aux_learning_rate: float = limited(above=0, hint="it falls as optimizer.lr does")
    check_every_n_steps: int = limited(least=1, hint="50 is the default")
    seed: int = limited(least=0, hint="0 is a seed")
    batch_norm: str = limited(choices=("recalibrate", "running", "batch"), hint="recalibrate is the default")


@dataclass
class LocalSGD(Rounds):
    wire: str = limited(choices=tuple(WIRE_FORMATS), hint=WIRE_HINT)
    momentum: str = limited(choices=("reset", "keep"), hint="the authors restart it: reset")


@dataclass
class DDP:
    _target_: str = MISSING
    process_group_backend: str | None = limited(choices=("gloo", "nccl"), hint="null chooses by the device")
    timeout: Timeout = MISSING
    start_method: str = limited(choices=("spawn", "fork", "forkserver", "popen"), hint="spawn works in sweeps")


@dataclass
class Plain:
    _target_: str = MISSING
    object: str = limited(choices=("auto",), hint="this strategy has no settings")
