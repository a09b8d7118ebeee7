"""The launcher for script and torchrun workers, and the checks that run before any process starts."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import MPSAccelerator
from lightning.pytorch.callbacks import StochasticWeightAveraging, Timer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from resist_lightning.schedule.progress import one_round
from resist_lightning.strategies.launching.children import Children
from resist_lightning.strategies.launching.guard import PARENT
from resist_lightning.strategies.options import StartMethod

if TYPE_CHECKING:  # it imports this module
    from resist_lightning.strategies.base import SubnetStrategy


class ScriptLauncher(_SubprocessScriptLauncher):
    """Lightning's launcher by re-running the script, and of processes that exist already (torchrun, SLURM)."""

    def __init__(self, strategy: SubnetStrategy, environment: ClusterEnvironment, processes: int, nodes: int) -> None:
        super().__init__(environment, processes, nodes)
        self._strategy = strategy

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        """Called by the trainer. As Lightning's, but :class:`Children` replaces its observer of the children."""
        if trainer is not None:
            self._strategy.check_before_launch(trainer)
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        guard = self._strategy.guard
        if not self.cluster_environment.creates_processes_externally:
            os.environ[PARENT] = str(os.getpid())
            self._call_children_scripts()
            del os.environ[PARENT]  # programs that this worker starts later are no workers
            guard.children = Children(self.procs, 2 * guard.silence.total_seconds(), lambda: guard.state)
        _set_num_threads_if_needed(num_processes=self.num_processes)
        with guard.around(self._strategy.ends_together):
            return function(*args, **kwargs)

    @override
    def kill(self, signum: Any) -> None:
        """Called by Lightning after a Ctrl-C. Children that have agreed to stop end by themselves."""
        if self._strategy.guard.state != "stopped":
            super().kill(signum)


def refuse_launch(environment: ClusterEnvironment, accelerator: object, start_method: StartMethod) -> None:
    """Refuse ways to start workers that are known to fail.

    Raises:
        ValueError: for MPS, for a start method that ignores the processes that exist already, and for ``popen`` in a
            Hydra sweep.
    """
    if isinstance(accelerator, MPSAccelerator):
        raise ValueError("several workers cannot share an MPS device; use accelerator='cpu'.")
    if start_method != "popen" and environment.creates_processes_externally:
        raise ValueError(
            f"start_method={start_method!r} would start workers a second time: {type(environment).__name__} has "
            "started them already. Use start_method='popen' (strategy='resist' or 'local_sgd') there."
        )
    if start_method == "popen" and _in_hydra_sweep() and not environment.creates_processes_externally:
        raise ValueError(
            "start_method='popen' re-runs the command line in every worker, and in a Hydra sweep (--multirun) each "
            "worker would run the whole sweep. Use start_method='spawn' (strategy='resist_spawn' or 'local_sgd_spawn')."
        )


def check_callbacks(trainer: pl.Trainer) -> None:
    """Refuse callbacks that read all parameters while a worker holds a part, and warn of those that send messages.

    Raises:
        ValueError: for stochastic weight averaging.
    """
    callbacks: list[Any] = getattr(trainer, "callbacks", [])
    for callback in callbacks:
        if isinstance(callback, StochasticWeightAveraging):
            raise ValueError(
                f"{type(callback).__name__} adds an epoch without steps, and saves worker 0's average alone. Use "
                "WeightAveraging (of Lightning 2.6), whose should_update() can choose the ends of epochs, or average "
                "checkpoints after the training."
            )
        if isinstance(callback, Timer) or getattr(callback, "_train_time_interval", None) is not None:
            rank_zero_warn(
                f"{type(callback).__name__} sends a message after every batch, so the workers wait for each other in "
                "every step. Limit the training by steps or epochs instead."
            )


def warn_of_messages(trainer: pl.Trainer) -> None:
    """Warn of metrics that the module reduces over the workers in every batch."""
    results: Any = getattr(trainer.fit_loop.epoch_loop, "_results", {})
    for result in results.values():
        meta = result.meta
        if meta.on_step and meta.sync.should:
            rank_zero_warn(
                f"self.log({meta.name!r}, sync_dist=True) sends a message after every batch, so the workers wait for "
                "each other in every step. Log it with on_step=False, on_epoch=True."
            )


def warn_of_one_round(trainer: pl.Trainer, local_steps: int) -> None:
    """Warn of a training that will end before its first round does."""
    if trainer.world_size == 1 or getattr(trainer, "fast_dev_run", False):
        return
    try:
        steps = trainer.estimated_stepping_batches - trainer.global_step
    except MisconfigurationException:  # Lightning cannot say it where the accumulation of gradients changes
        return
    if 0 < steps < local_steps:
        rank_zero_warn(one_round(int(steps), local_steps))


def _in_hydra_sweep() -> bool:
    """Asks the Hydra that the user's program has loaded, if any: this package does not import it."""
    module: Any = sys.modules.get("hydra.core.hydra_config")
    if module is None or not module.HydraConfig.initialized():
        return False
    return str(module.HydraConfig.get().mode).endswith("MULTIRUN")
