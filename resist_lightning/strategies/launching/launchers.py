"""Chooses the launcher; and the launcher of workers that re-run the script, or that torchrun or SLURM has started."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import lightning.pytorch as pl
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from typing_extensions import override

from resist_lightning.strategies.launching.checks import check_processes, refuse_launch
from resist_lightning.strategies.launching.children import Children
from resist_lightning.strategies.launching.guard import PARENT
from resist_lightning.strategies.launching.processes import ProcessLauncher
from resist_lightning.strategies.options import StartMethod

if TYPE_CHECKING:  # it imports this module
    from resist_lightning.strategies.base import SubnetStrategy


class ScriptLauncher(_SubprocessScriptLauncher):
    """Lightning's launcher by re-running the script, and of processes that exist already (torchrun, SLURM)."""

    _children: ClassVar[Children | None] = None
    """The workers that this process has started: a later Trainer of the script trains in the same ones."""

    _numbers: ClassVar[tuple[int, int] | None] = None
    """Devices and nodes of the script's first Trainer, where it has started processes."""

    def __init__(self, strategy: SubnetStrategy, environment: ClusterEnvironment, processes: int, nodes: int) -> None:
        super().__init__(environment, processes, nodes)
        self._strategy = strategy

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        """Called by the trainer. As Lightning's, but :class:`Children` replaces its observer of the children."""
        if trainer is not None:
            self._strategy.check_before_launch(trainer)
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        check_processes(self.cluster_environment, self.num_processes, self.num_nodes)
        self._check_numbers()
        guard = self._strategy.guard
        limits = 2 * guard.silence.total_seconds(), self._strategy.options.timeout.total_seconds()
        if not self.cluster_environment.creates_processes_externally:
            os.environ[PARENT] = str(os.getpid())
            self._call_children_scripts()
            del os.environ[PARENT]  # programs that this worker starts later are no workers
            first_rank = self.cluster_environment.node_rank() * self.num_processes + 1
            ScriptLauncher._children = Children(self.procs, *limits, lambda: guard.state, first_rank)
        children = ScriptLauncher._children
        if children is not None and children.of_this_process:
            children.follow(lambda: guard.state, *limits)
            guard.children, self.procs = children, children.processes
        _set_num_threads_if_needed(num_processes=self.num_processes)
        with guard.around(self._strategy.ends_together):
            return function(*args, **kwargs)

    def _check_numbers(self) -> None:
        """Refuse a later Trainer of a script for which there are too few processes, or in which this one has no place.

        Raises:
            ValueError: with both pairs of numbers, and the way out.
        """
        environment = self.cluster_environment
        if type(environment) is not LightningEnvironment:
            return
        own = self.num_processes, self.num_nodes
        first = not environment.creates_processes_externally
        in_worker = os.environ.get(PARENT) == str(os.getppid())
        if first or (in_worker and ScriptLauncher._numbers is None):
            ScriptLauncher._numbers = own
        started = ScriptLauncher._numbers
        if started in (None, own):
            return
        assert started is not None
        rank = environment.node_rank() * own[0] + environment.local_rank()
        # Fewer are right in worker 0 alone, behind `if trainer.is_global_zero`.
        if own[1] == 1 and own[0] <= started[0] and rank < own[0]:
            return
        raise ValueError(
            f"Trainer(devices={own[0]}, num_nodes={own[1]}) does not fit the processes of this script (this is rank "
            f"{rank}): its first Trainer has started them for devices={started[0]}, num_nodes={started[1]}. Give all "
            "Trainers of the script the same numbers; test in one process by `if trainer.is_global_zero:` and "
            "devices=1; or give all of them start_method='spawn', whose workers end with each run."
        )

    @override
    def kill(self, signum: Any) -> None:
        """Called by Lightning after a Ctrl-C. Children that have agreed to stop end by themselves."""
        if self._strategy.guard.state != "stopped":
            super().kill(signum)


def make_launcher(
    strategy: SubnetStrategy, start_method: StartMethod, *, sync_batchnorm: bool
) -> ScriptLauncher | ProcessLauncher:
    """The launcher for a start method; ``popen`` also stands for processes that exist already.

    Raises:
        ValueError: for a launch that cannot work.
    """
    environment = strategy.cluster_environment
    assert environment is not None
    if sync_batchnorm and not strategy.config.trains_alone:
        raise ValueError(
            "sync_batchnorm=True has nothing to synchronize: each batch norm is in one stage, which sees all batches. "
            "Leave it out."
        )
    if sync_batchnorm and strategy.options.devices_per_worker == 1:
        raise ValueError(
            "sync_batchnorm=True contradicts local training: it would communicate in every step. Leave it out, "
            "or let a worker have several processes (devices_per_worker=...), which then share their statistics; "
            "the full model has batch-norm statistics of all workers anyway."
        )
    refuse_launch(environment, strategy.accelerator, start_method)
    if start_method == "popen":
        return ScriptLauncher(strategy, environment, strategy.num_processes, strategy.num_nodes)
    return ProcessLauncher(strategy, start_method=start_method)
