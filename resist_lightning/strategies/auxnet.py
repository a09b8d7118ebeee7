"""``Trainer(strategy="auxnet")``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from resist_lightning.engine.engine import Engine
from resist_lightning.methods.auxnet.config import AuxFactory, AuxMethod, StageConfig
from resist_lightning.methods.auxnet.step.agreement import check_equal, named_tensors
from resist_lightning.methods.auxnet.step.worker import CHECKED_STEPS, StageWorker
from resist_lightning.methods.config import CheckPolicy, NormPolicy
from resist_lightning.strategies.base import SubnetStrategy
from resist_lightning.strategies.data.example_input import example_input
from resist_lightning.strategies.data.seeded_loader import key_loader, unkey_loader
from resist_lightning.strategies.launching.guard import DEFAULT_SILENCE
from resist_lightning.strategies.launching.launchers import DEFAULT_TIMEOUT, Launch, StartMethod
from resist_lightning.strategies.saving.restarts import SaveErrors, Saving, WorkerLoss


class AuxNetStrategy(SubnetStrategy):
    """Stages of a residual network that train at the same time, one per worker (AuxNet, arXiv 2112.05387).

    The network is cut by depth. Each stage but the first is fed by a small auxiliary network, which guesses from the
    image what the stages before would give it, so no stage waits for another's forward pass; and each but the last is
    trained to give what the next one wants, so none waits for another's backward pass. In a step, neighbours exchange
    the guess and what really came, behind their computing. Every worker sees the same batches, augmented alike.

    The module's `training_step` runs on every worker, once a batch, and calls the network once: what the network
    returns there is its true output (the last worker sends it to the others), so losses, logs and metrics are true and
    equal everywhere; the gradient of the loss trains the last stage, and what lies outside of the network. The loss
    must be a mean over the batch. For evaluation, for checkpoints and after ``fit`` the module is the whole network, on
    every worker, without auxiliary networks.

    Equations and defaults are derived from the paper's abstract; see docs/auxnet.md.

    Args:
        method: ``"penalty"``; ``"al-net"`` (augmented Lagrangian, multipliers by a second head of the auxiliary
            networks); ``"penalty-store"`` and ``"al-store"`` (no auxiliary networks: guesses and multipliers are kept
            for each sample, and random transforms of the data set are frozen; the first epoch is serial).
        beta: weight of the penalty, half the mean square per element of guess minus truth; above 0.
        beta_growth: ``beta`` is multiplied by it for each factor of ten by which the learning rate has fallen; at
            least 1.
        lambda_step: step of the guesses in units of 1 / beta, in (0, 1]; None takes 1, and 0.1 where guesses of
            three stages or more are stored, as 1 diverges there.
        multiplier_every: steps between two updates of the multipliers, at least 1.
        warmup_steps: first steps, in which the stages wait for each other: plain back-propagation, while the auxiliary
            networks learn to give what really comes.
        serial_every: after them, of so many steps one is serial and corrects by the true gradient: accuracy at the
            price of speed. 4 makes every fourth step wait; 0 (default) is never, 1 always: back-propagation.
        cuts: names of the modules behind which the network is cut, one fewer than workers, such as ``["layer2"]``; None
            balances the stages by measured time.
        network: name of the network in the module; None finds it by its residual blocks.
        input: which part of a batch is the network's input, an index or a key; None takes the first tensor. It is
            looked at before the first step, to learn shapes and times; what `training_step` gives to the network must
            have the same shape.
        aux_network: makes an auxiliary network from the shapes of an image and of a boundary (channels, height, width);
            None makes a small one of convolutions. With ``"al-net"`` it is asked for twice the channels.
        aux_width: channels of the first layer of the auxiliary networks that are made by default, at least 1.
        aux_learning_rate: highest learning rate of the auxiliary networks (SGD with momentum 0.9); it falls as that of
            the first optimizer does.
        check_every_n_steps: how often the workers meet to look whether all is well: a round of the other strategies.
        seed: seed of the order of the samples, of their augmentation and of the auxiliary networks; 0 is a seed.
        batch_norm: batch-norm statistics of the whole network: ``"recalibrate"``, ``"running"`` (gathered on guesses)
            or ``"batch"``.
        check: which entries of what all workers have are hashed and compared: ``"sampled"``, ``"full"`` or ``"off"``.
        on_save_error: what happens where a checkpoint cannot be written, e.g. to a full disk: ``"raise"`` ends the
            training on all workers, ``"warn"`` goes on; the checkpoint before it stays as it is.
        snapshots: a folder to which every worker writes what it holds, best one that all can read; when torchrun starts
            the workers again, they go on from the newest by themselves. Removed at the end of the training. None: none.
        snapshot_every_n_rounds: write one at every so many handshakes, at least 1.
        on_worker_loss: what happens where torchrun starts again with another number of workers: ``"stop"``, or
            ``"shrink"`` (cut anew for those that are there; needs ``snapshots``).
        parallel_devices: devices of this host's workers where ``Trainer(devices=...)`` cannot say it.
        process_group_backend: ``"gloo"``, which is the default on GPUs too: messages that are posted early would block
            each other under NCCL.
        timeout: after how long a worker that waits for another one gives up.
        silence: after how long without a sign of life (one a second) a worker counts as lost.
        start_method: how Lightning starts workers: ``"popen"``, ``"spawn"``, ``"fork"``, ``"forkserver"``.

    Raises:
        ValueError: if a value is outside its limits.
    """

    strategy_name = "auxnet"

    def __init__(
        self,
        *,
        method: AuxMethod = "penalty",
        beta: float = 1.0,
        beta_growth: float = 1.0,
        lambda_step: float | None = None,
        multiplier_every: int = 10,
        warmup_steps: int = 200,
        serial_every: int = 0,
        cuts: Sequence[str] | None = None,
        network: str | None = None,
        input: int | str | None = None,
        aux_network: AuxFactory | None = None,
        aux_width: int = 32,
        aux_learning_rate: float = 0.1,
        check_every_n_steps: int = 50,
        seed: int = 0,
        batch_norm: NormPolicy = "recalibrate",
        check: CheckPolicy = "sampled",
        on_save_error: SaveErrors = "raise",
        snapshots: str | os.PathLike[str] | None = None,
        snapshot_every_n_rounds: int = 1,
        on_worker_loss: WorkerLoss = "stop",
        parallel_devices: list[torch.device] | None = None,
        process_group_backend: str | None = "gloo",
        timeout: timedelta = DEFAULT_TIMEOUT,
        silence: timedelta = DEFAULT_SILENCE,
        start_method: StartMethod = "popen",
    ) -> None:
        config = StageConfig(
            method=method,
            beta=beta,
            beta_growth=beta_growth,
            lambda_step=lambda_step,
            multiplier_every=multiplier_every,
            warmup_steps=warmup_steps,
            serial_every=serial_every,
            cuts=cuts,
            network=network,
            aux_network=aux_network,
            aux_width=aux_width,
            aux_learning_rate=aux_learning_rate,
            local_steps=check_every_n_steps,
            seed=seed,
            batch_norm=batch_norm,
            check=check,
        )
        super().__init__(
            config,
            "same",
            Saving(on_save_error, snapshots, snapshot_every_n_rounds, on_worker_loss),
            Launch(parallel_devices, _only_gloo(process_group_backend), timeout, silence, start_method),
        )
        self._input = input
        self._loaders = 0

    @override
    def check_before_launch(self, trainer: pl.Trainer) -> None:
        """Called by the launcher, before any process starts: raise for what cannot work."""
        super().check_before_launch(trainer)
        if trainer.precision in ("16-mixed", "16"):
            raise ValueError(
                f"precision={trainer.precision!r} scales the loss, which trains the last stage only, and stages would "
                "be scaled differently. Use 'bf16-mixed' or '32-true'."
            )
        if _clips_by_norm(trainer):
            rank_zero_warn(
                f"gradient_clip_val={trainer.gradient_clip_val} limits the norm of each stage's gradients by itself: "
                "no worker knows that of all."
            )

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Called by Lightning for each loader: in training all of the data, in the same order for all workers."""
        if self._making_training_loaders:
            return {"num_replicas": 1, "rank": 0, "seed": self.config.seed}
        return super().distributed_sampler_kwargs

    @override
    def process_dataloader(self, dataloader: object) -> object:
        """Called by Lightning for each loader: augmentation follows from (seed, epoch, sample)."""
        dataloader = super().process_dataloader(dataloader)
        trainer = self._trainer()
        if self._making_training_loaders and self.world_size > 1:
            assert isinstance(self.config, StageConfig)
            self._loaders += 1
            return key_loader(
                dataloader,
                self.config.seed,
                partial(_epoch, trainer),
                stream=self._loaders - 1,
                frozen=self.config.stored,
            )
        return dataloader

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Called before each batch: the first ones of an epoch are compared with the other workers'."""
        super().on_train_batch_start(batch, batch_idx)
        self._loaders = 0  # those that are made from now on are made anew
        trainee = self._trainee
        if trainee is None or self.engine is None:
            return
        trainer = self._trainer()
        trainee.accumulate = trainer.accumulate_grad_batches
        trainee.epoch_batches = _batches_of_all_data(trainer)
        if batch_idx < CHECKED_STEPS:
            check_equal(self.engine.collective, named_tensors(batch), f"batch {batch_idx}")

    @override
    def teardown(self) -> None:
        """Called at the end, after an error too: loaders that the user has combined are the user's again."""
        self._loaders = 0
        module = self.lightning_module
        attached = module is not None and module._trainer is not None  # not where a launch was refused
        combined = self._trainer().fit_loop._combined_loader if attached else None
        if combined is not None:
            combined.flattened = [unkey_loader(loader) for loader in combined.flattened]
        super().teardown()

    @property
    def _trainee(self) -> StageWorker | None:
        return self.engine.sync.trainee if self.engine is not None else None

    @override
    def _prepare(self, engine: Engine) -> None:
        trainer, module = self._trainer(), self.lightning_module
        assert module is not None
        outside = [name for name, tensor in engine.layout.shared.items() if tensor.requires_grad]
        if engine.collective.workers > 1 and outside and _clips_by_norm(trainer):
            raise ValueError(
                f"gradient_clip_val={trainer.gradient_clip_val} clips by the norm of what a worker has, so "
                f"{outside[0]}, which lies outside of the stages and is trained alike on all workers, would part. Clip "
                "by value (gradient_clip_algorithm='value'), or make it a part of the network."
            )
        if engine.collective.workers > 1:
            engine.prepare(example_input(trainer, module, self._input))
            rank_zero_info(f"{type(self).__name__}: {engine.layout.describe()}")


def _clips_by_norm(trainer: pl.Trainer) -> bool:
    return bool(trainer.gradient_clip_val) and trainer.gradient_clip_algorithm in (None, "norm")


def _batches_of_all_data(trainer: pl.Trainer) -> int:
    """Which an epoch would have without limit_train_batches; of data of unknown length, more than there can be."""
    combined = trainer.fit_loop._combined_loader
    lengths = [sized_len(loader) for loader in combined.flattened] if combined is not None else []
    return max((sys.maxsize if length is None else length for length in lengths), default=sys.maxsize)


def _epoch(trainer: pl.Trainer) -> int:
    """Which Lightning tells to samplers."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    return int(progress.processed)


def _only_gloo(backend: str | None) -> str:
    if backend not in (None, "gloo"):
        raise ValueError(
            f"process_group_backend={backend!r}: the stages' messages are posted early, and only 'gloo' lets later "
            "ones overtake them. Leave it out; tensors on GPUs are sent through the host."
        )
    return "gloo"
