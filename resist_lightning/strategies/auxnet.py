"""``Trainer(strategy="auxnet")``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from resist_lightning.engine.engine import Engine
from resist_lightning.errors import StageSelectionError
from resist_lightning.methods.auxnet.config import StageConfig
from resist_lightning.methods.auxnet.step.agreement import check_equal, named_tensors
from resist_lightning.methods.auxnet.step.backward import freed_graph_explained
from resist_lightning.methods.auxnet.step.worker import CHECKED_STEPS, StageWorker
from resist_lightning.methods.config import MomentumPolicy, NonFinitePolicy
from resist_lightning.schedule.round_length import LocalStepsRule
from resist_lightning.strategies.base import SubnetStrategy
from resist_lightning.strategies.data.example_input import example_input, given_example
from resist_lightning.strategies.data.seeded_loader import seed_loader, unseed_loader
from resist_lightning.strategies.options import StrategyOptions, config_of, takes
from resist_lightning.strategies.session import making_training_loaders

_NOT_ALONE = (
    "it assembles the whole network on every worker. To evaluate beside the training, use "
    "resist_lightning.evaluator.CheckpointEvaluator."
)


@dataclass(frozen=True, kw_only=True)
class AuxNetOptions(StrategyOptions, StageConfig):
    """Options of :class:`AuxNetStrategy`.

    Args:
        check_every_n_steps: steps between two handshakes, in which the workers check one another: a round of the other
            strategies.
        input: index, key or name of the network's input in a batch; None takes the first tensor. It is read before the
            first step, for its shape and to measure times; `training_step` must give the network an input of the same
            shape. Where the network cannot take it, the module's `example_input_array` stands for it.
        seed: seed of the order of the samples, of their augmentation and of auxiliary networks; 0 is a seed.
        process_group_backend: ``"gloo"``, on GPUs too: messages that are posted early would block each other under
            NCCL.
    """

    without: ClassVar[Mapping[str, str]] = {
        "evaluate_on": _NOT_ALONE,
        "full_model_on": _NOT_ALONE,
        "fragments": "nothing is averaged; its stages exchange messages in every step.",
        "overlap": "nothing is averaged; its stages exchange messages in every step, beside their computing.",
    }
    check_every_n_steps: int = 50
    input: int | str | None = None
    process_group_backend: str | None = "gloo"
    local_steps: LocalStepsRule = field(init=False, default=50)
    momentum: MomentumPolicy | None = field(init=False, default="keep")
    non_finite: NonFinitePolicy = field(init=False, default="raise")

    @override
    def __post_init__(self) -> None:
        """Check every value that :class:`StageConfig` does not."""
        super().__post_init__()
        if self.devices_per_worker != 1:
            raise ValueError(
                f"devices_per_worker={self.devices_per_worker!r}: an AuxNet worker holds one stage of the network and "
                "exchanges every batch with its neighbours, so its batches cannot be split. Leave it out, and start "
                "one process for each stage; strategy='resist', 'ist' and 'local_sgd' have such workers."
            )
        if self.process_group_backend not in (None, "gloo"):
            raise ValueError(
                f"process_group_backend={self.process_group_backend!r}: the stages' messages are posted early, and "
                "only 'gloo' lets later ones overtake them. Leave it out; tensors on GPUs are sent through the host."
            )


class AuxNetStrategy(SubnetStrategy):
    """Stages of a residual network that train at the same time, one per worker (AuxNet, arXiv 2112.05387).

    The network is cut by depth. By default stages work on different batches at the same time: each takes the true
    output of the stage before, and its true gradient some steps late. With ``method="penalty"``, the paper's, each
    stage but the first is fed by a small auxiliary network, which guesses the output of the stages before from the
    image, so no stage waits for another's forward pass; and each but the last is trained towards the output that the
    next one wants, so none waits for another's backward pass. In a step neighbours exchange two tensors of the
    boundary's shape, overlapped with computing. Every worker sees the same batches, augmented alike.

    The module's `training_step` runs on every worker, once a batch, and calls the network once: the network returns its
    true output there (the last worker sends it to the others), so losses, logs and metrics are true and equal
    everywhere; the gradient of the loss trains the last stage, and layers outside of the network. The loss must be a
    mean over the batch. For evaluation, for checkpoints and after ``fit`` the module is the whole network, on every
    worker, without auxiliary networks.

    The equations of guesses are derived from the paper's abstract; see docs/auxnet.md.
    """

    strategy_name = "auxnet"
    config: StageConfig

    @takes(AuxNetOptions)
    def __init__(self, options: AuxNetOptions) -> None:
        config = replace(config_of(options, StageConfig), local_steps=options.check_every_n_steps)
        super().__init__(config, replace(options, process_group_backend="gloo"), "same")
        self._input = options.input
        self._loaders = 0

    @override
    def check_before_launch(self, trainer: pl.Trainer) -> None:
        """Called by the launcher, before any process starts: raise for runs that cannot work."""
        super().check_before_launch(trainer)
        if trainer.precision in ("16-mixed", "16"):
            raise ValueError(
                f"precision={trainer.precision!r} scales the loss, which trains the last stage only, and stages would "
                "be scaled differently. Use 'bf16-mixed' or '32-true'."
            )
        if _clips_by_norm(trainer):
            rank_zero_warn(
                f"gradient_clip_val={trainer.gradient_clip_val} clips each stage by the norm of its own gradients: no "
                "worker knows the norm of all gradients."
            )

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Called by Lightning for each loader: in training all of the data, in the same order for all workers."""
        if making_training_loaders(self.session):
            return {"num_replicas": 1, "rank": 0, "seed": self.config.seed}
        return super().distributed_sampler_kwargs

    @override
    def process_dataloader(self, dataloader: object) -> object:
        """Called by Lightning for each loader: augmentation follows from (seed, epoch, sample)."""
        dataloader = super().process_dataloader(dataloader)
        trainer = self._trainer()
        if making_training_loaders(self.session) and self.world_size > 1:
            self._loaders += 1
            return seed_loader(
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
        self._loaders = 0  # the next loader that Lightning makes is the first of a new set
        worker = self._stage_worker
        if worker is None or self.engine is None:
            return
        trainer = self._trainer()
        # Both may change between epochs: a callback schedules the one, and loaders are made again.
        worker.accumulate = trainer.accumulate_grad_batches
        worker.epoch_batches = _batches_of_all_data(trainer)
        if batch_idx < CHECKED_STEPS:
            check_equal(self.engine.collective, named_tensors(batch), f"batch {batch_idx}")

    @override
    def backward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Called for each backward pass, automatic or manual."""
        with freed_graph_explained() if self.config.delayed else nullcontext():
            return super().backward(*args, **kwargs)

    @override
    def teardown(self) -> None:
        """Called at the end, after an error too: gives combined loaders back to the user as they were."""
        self._loaders = 0
        module = self.lightning_module
        if module is not None and module._trainer is not None:  # it is not attached where a launch was refused
            combined = self._trainer().fit_loop._combined_loader
            if combined is not None:
                combined.flattened = [unseed_loader(loader) for loader in combined.flattened]
        super().teardown()

    @property
    def _stage_worker(self) -> StageWorker | None:
        return self.engine.sync.stage_worker if self.engine is not None else None

    @override
    def _prepare(self, engine: Engine) -> None:
        trainer, module = self._trainer(), self.lightning_module
        assert module is not None
        layout: Any = engine.layout
        outside = [name for name, tensor in layout.outside.items() if tensor.requires_grad]
        if engine.collective.workers > 1 and outside and _clips_by_norm(trainer):
            raise ValueError(
                f"gradient_clip_val={trainer.gradient_clip_val} clips by the norm of a worker's own gradients, so "
                f"{outside[0]}, which lies outside of the stages and is trained identically on all workers, would "
                "diverge. Clip by value (gradient_clip_algorithm='value'), or make it a part of the network."
            )
        if engine.collective.workers > 1:
            self._show_input(engine, trainer, module)
            rank_zero_info(f"{type(self).__name__}: {engine.layout.describe()}")

    def _show_input(self, engine: Engine, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        try:
            engine.prepare(example_input(trainer, module, self._input))
        except StageSelectionError:
            # What is in a batch need not be what `training_step` gives the network.
            example: object = module.example_input_array
            if not isinstance(example, Tensor):
                raise
            engine.prepare(given_example(trainer, example))


def _clips_by_norm(trainer: pl.Trainer) -> bool:
    return bool(trainer.gradient_clip_val) and trainer.gradient_clip_algorithm in (None, "norm")


def _batches_of_all_data(trainer: pl.Trainer) -> int:
    """The length of an epoch without limit_train_batches; a huge number for data of unknown length."""
    combined = trainer.fit_loop._combined_loader
    lengths = [sized_len(loader) for loader in combined.flattened] if combined is not None else []
    known = [sys.maxsize if length is None else length for length in lengths]
    return max(known, default=sys.maxsize)


def _epoch(trainer: pl.Trainer) -> int:
    """The number of the epoch that Lightning gives to samplers."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    return int(progress.processed)
