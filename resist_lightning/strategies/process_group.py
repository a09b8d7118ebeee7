"""The process group of a strategy: joining, leaving, and collectives that stop after an error."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from resist_lightning.comm.group import destroy_group, group_exists, join_group
from resist_lightning.comm.torch_collective import gather_tensor
from resist_lightning.engine.engine import Engine
from resist_lightning.schedule.progress import Activity
from resist_lightning.state.memory import present_to_cpu
from resist_lightning.strategies.data.loader_processes import LoaderShield
from resist_lightning.strategies.launching.guard import Guard
from resist_lightning.strategies.launching.signals import Signals, requests_by_signal
from resist_lightning.strategies.options import StrategyOptions
from resist_lightning.strategies.saving.checkpoint_io import AtomicIO


class GroupStrategy(DDPStrategy):
    """A ``DDPStrategy`` that never wraps the module in DDP, and never waits for other workers after an error.

    Lightning shards data and reduces metrics for subclasses of ``DDPStrategy`` only.
    """

    def __init__(self, options: StrategyOptions) -> None:
        super().__init__(
            parallel_devices=options.parallel_devices,
            process_group_backend=options.process_group_backend,
            timeout=options.timeout,
            start_method=options.start_method,
        )
        self.options = options
        self.engine: Engine | None = None
        self.guard = Guard(options.silence)
        self.signals: Signals | None = None
        self._shield: LoaderShield | None = None
        self._owns_group = False
        self._talked = False  # whether Lightning or a callback has used a collective since the last batch
        self._warned: set[str] = set()

    @property  # type: ignore[explicit-override] # which mypy does not see here
    def checkpoint_io(self) -> CheckpointIO:
        """The plugin of the Trainer that reads and writes the model's file, or else :class:`AtomicIO`."""
        if self._checkpoint_io is None:  # not given to Lightning's constructor, which would take it for the user's
            self._checkpoint_io = AtomicIO()
        elif isinstance(self._checkpoint_io, _WrappingCheckpointIO):
            self._checkpoint_io.checkpoint_io = AtomicIO()  # has an effect only where it wraps nothing yet
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io

    @override
    def _get_process_group_backend(self) -> str:
        devices = self.parallel_devices or []
        if self._process_group_backend is None and self.root_device.type == "cuda" and len(set(devices)) < len(devices):
            return "gloo"  # NCCL refuses several ranks on one GPU
        return str(super()._get_process_group_backend())

    @override
    def setup_environment(self) -> None:
        """Called in each worker when it starts; joins the group, unless the user's program has done so."""
        self._owns_group = not group_exists()
        super().setup_environment()
        trainer = self._trainer()
        if trainer.state.fn == TrainerFn.FITTING:  # a user's hook may start loader processes before the training
            self._shield = LoaderShield([*requests_by_signal(self.cluster_environment)])
            self._shield.install()
        if trainer.state.fn == TrainerFn.FITTING and self.world_size > 1:
            assert self._timeout is not None
            self.guard.begin(trainer, self._activity, self._timeout)

    @override
    def setup_distributed(self) -> None:
        """Called by ``setup_environment``. Lightning would let the next group of a process use the last one's names."""
        if not group_exists():
            self.set_world_ranks()
            environment = self.cluster_environment
            assert environment is not None
            assert self._timeout is not None
            join_group(
                self._get_process_group_backend(),
                address=environment.main_address,
                port=environment.main_port,
                worker=self.global_rank,
                workers=self.world_size,
                timeout=self._timeout,
                device=self.root_device if self.root_device.type == "cuda" else None,
            )
        super().setup_distributed()

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Called by Lightning around saving and loading. Collective; nothing after an error."""
        if self._may_talk():
            super().barrier(*args, **kwargs)

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Called by Lightning's callbacks. Collective; after an error, the worker's own object."""
        return super().broadcast(obj, src) if self._may_talk() else obj

    @override
    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        """Called for metrics and joint decisions. Collective; after an error, the worker's own value."""
        return super().reduce(tensor, group, reduce_op) if self._may_talk() else tensor

    @override
    def all_gather(self, tensor: torch.Tensor, group: Any | None = None, sync_grads: bool = False) -> torch.Tensor:
        """Called by users. Collective. Lightning's own way is deprecated by torch, and warns each time."""
        if not group_exists():
            return super().all_gather(tensor, group=group, sync_grads=sync_grads)
        if not self._may_talk():
            return tensor.detach()[None]
        if self.engine is not None and self.engine.running and not self.engine.observing:
            self._warn_once(_GATHERED_WITH_GRADIENTS if sync_grads else _GATHERED)
        return (
            super().all_gather(tensor, group=group, sync_grads=True)
            if sync_grads
            else gather_tensor(tensor.detach(), group)
        )

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Called for every batch of every loop, so a lost worker ends validations and tests too."""
        self.guard.check()
        return super().batch_to_device(batch, device, dataloader_idx)

    @override
    def teardown(self) -> None:
        """Called at the end, after an error too: leave the group, and move to the CPU what this worker has."""
        if self._shield is not None:
            self._shield.remove()
            self._shield = None
        # After an error nobody waits: the others may be gone.
        leaving = self._owns_group and group_exists() and not self.interrupted
        if leaving:
            with self.guard.around():
                self.barrier()
        self.guard.end()
        if leaving:
            destroy_group()  # without this, gloo aborted 5 of 30 processes at exit
        # Lightning would move the whole module, and fail on absent blocks; so it sees none.
        module, self._lightning_module = self._lightning_module, None
        try:
            super().teardown()
        finally:
            self._lightning_module = module
        if module is not None and any(parameter.is_meta for parameter in module.parameters()):
            present_to_cpu(module)
        elif module is not None:
            module.cpu()

    @property
    def interrupted(self) -> bool:
        """Whether an error or the user has ended the run, so that nothing may be sent any more."""
        trainer = self.lightning_module._trainer if self.lightning_module is not None else None
        return trainer is not None and trainer.interrupted and not self.ends_together()

    def ends_together(self) -> bool:
        """Whether all workers act upon a signal now: they may talk, and save, although the run is interrupted."""
        return self.signals is not None and self.signals.acting

    def _activity(self) -> Activity | None:
        return self.engine.activity if self.engine is not None else None

    def _trainer(self) -> pl.Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    def _may_talk(self) -> bool:
        """False after an error. In training, first shake hands, so that nothing pairs with another worker's sync."""
        if self.interrupted:
            return False
        self._talked = True
        if self.engine is not None and self.engine.running:
            self.engine.meet()
        return True

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            rank_zero_warn(text)


_GATHERED = (
    "self.all_gather in training sends messages each time, so the workers wait for each other in every step. Gather in "
    "validation, or what is needed once a round."
)
_GATHERED_WITH_GRADIENTS = (
    "self.all_gather(sync_grads=True) sends messages in every step, forward and backward. The gradient of a worker has "
    "the losses of all workers in it, each through the part of the network that the other worker holds, and is not "
    "averaged with the others' before the step, as it would be under DDP."
)
