"""Refuses runs that cannot work, before any process starts, and warns of slow ones."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.imports import _IS_INTERACTIVE
from lightning.pytorch.accelerators import MPSAccelerator
from lightning.pytorch.callbacks import LearningRateFinder, ModelPruning, StochasticWeightAveraging, Timer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden

from resist_lightning.comm import by_hand, slurm, torchrun
from resist_lightning.comm.members import check_count
from resist_lightning.engine.engine import Engine
from resist_lightning.engine.registry import make_layout
from resist_lightning.methods.config import CommonConfig, GrowingConfig
from resist_lightning.schedule.progress import Clock, one_round
from resist_lightning.schedule.round_length import QSR, rounds_in
from resist_lightning.state.memory_limit import memory_limit, needed_to_train, shortage
from resist_lightning.strategies.averages import check_averages
from resist_lightning.strategies.launching.length import estimated_steps
from resist_lightning.strategies.options import StartMethod, StrategyOptions
from resist_lightning.strategies.saving.checkpoint_callbacks import resolve_file_urls
from resist_lightning.strategies.saving.restarts import check_other_workers, check_shrinking


def check_run(trainer: pl.Trainer, config: CommonConfig, options: StrategyOptions, processes: int) -> None:
    """Check trainer, callbacks and module in the main process, which will be one of some ``processes``.

    Raises:
        ValueError: for a run that cannot work.
    """
    resolve_file_urls(trainer)
    if trainer.state.fn != TrainerFn.FITTING:
        return
    strategy: Any = trainer.strategy
    members = options.members(strategy.num_processes)
    check_count(members, processes)
    if options.devices_per_worker == 1 and (options.find_unused_parameters or options.across_hosts):
        rank_zero_warn(
            "find_unused_parameters and across_hosts have no effect: they apply only to workers of several processes, "
            "and here every process is a worker. Set devices_per_worker, or leave them out."
        )
    if members > 1 and config.overlaps_syncs:
        given = f"overlap={config.in_words()['overlap']} with devices_per_worker={options.devices_per_worker!r}"
        raise ValueError(
            f"{given}: a sync beside the training needs workers of one process each. Set devices_per_worker=1, or "
            "overlap=0."
        )
    if strategy._start_method != "popen":
        _refuse_lost_results(trainer, config)
    if processes > 1 and getattr(trainer, "_val_check_time_interval", None) is not None:  # of Lightning 2.6
        raise ValueError(
            "val_check_interval is a time, after which each worker would validate by its own clock, in another step. "
            "Give a number of batches, or a share of the epoch."
        )
    check_callbacks(trainer, config)
    if config.needs_total_steps and trainer.max_steps == -1 and trainer.max_epochs in (None, -1):
        raise ValueError(
            "max_epochs=-1 without max_steps: the training has no known end, which finish_rounds and growth need. Set "
            "max_steps or max_epochs, or leave those options out."
        )
    check_shrinking(options)
    module = strategy.lightning_module
    if module is None or is_overridden("configure_model", module):
        return  # the workers make the model, after the launch
    try:
        layout = make_layout(module, config, processes // members, members=members)
        check_other_workers(options, layout)
    except ValueError:
        # The hook runs in the workers, which check again after it. What it builds is not known here.
        if not is_overridden("setup", module):
            raise


def refuse_launch(environment: ClusterEnvironment, accelerator: object, start_method: StartMethod) -> None:
    """Refuse ways to start workers that are known to fail.

    Raises:
        ValueError: for MPS, for a start method that ignores the processes that exist already, for ``popen`` in a Hydra
            sweep, and for all but ``fork`` in a notebook.
    """
    if isinstance(accelerator, MPSAccelerator):
        raise ValueError("several workers cannot share an MPS device; use accelerator='cpu'.")
    if start_method != "popen" and environment.creates_processes_externally:
        raise ValueError(
            f"start_method={start_method!r} would start workers a second time: {type(environment).__name__} has "
            "started them already. Use start_method='popen' (the strategy's plain name, such as 'resist') there."
        )
    if _IS_INTERACTIVE and start_method != "fork" and not environment.creates_processes_externally:
        # Lightning's own error recommends 'ddp_notebook', which would train by DDP.
        raise ValueError(
            f"start_method={start_method!r} cannot start workers from a notebook or an interactive Python. Use the "
            "strategy's name with _notebook, such as 'resist_notebook', or start_method='fork'; or run a script."
        )
    if start_method == "popen" and _in_hydra_sweep() and not environment.creates_processes_externally:
        raise ValueError(
            "start_method='popen' re-runs the command line in every worker, and in a Hydra sweep (--multirun) each "
            "worker would run the whole sweep. Use start_method='spawn' (its name with _spawn, such as 'resist_spawn')."
        )


def check_processes(environment: ClusterEnvironment, devices: int, nodes: int) -> None:
    """Check that as many processes as the Trainer expects were started, and that they can find one another.

    Raises:
        ValueError: naming the numbers, or the variable that is missing, and the way out.
    """
    if isinstance(environment, SLURMEnvironment):
        slurm.check_tasks(os.environ, devices, nodes)
    elif isinstance(environment, TorchElasticEnvironment):
        torchrun.check_processes(os.environ, devices, nodes)
    elif type(environment) is LightningEnvironment:  # a class derived from it may have a port of its own
        by_hand.check_port(os.environ, devices, nodes)


def _refuse_lost_results(trainer: pl.Trainer, config: CommonConfig) -> None:
    """Refuse runs whose results would end with the workers that the main process starts."""
    strategy: Any = trainer.strategy
    if config.first_ends and strategy.num_nodes > 1:
        raise ValueError(
            f"full_model_on='first' with start_method={strategy._start_method!r} on {strategy.num_nodes} hosts: worker "
            "0 alone would give the model to its main process, and those of the other hosts would have none. Use "
            "full_model_on='all', or start_method='popen'."
        )
    callbacks: list[Any] = getattr(trainer, "callbacks", [])
    for callback in callbacks:
        if isinstance(callback, LearningRateFinder) and callback._early_exit:
            raise ValueError(
                "Tuner.lr_find would search in workers that this process starts, and its result would be lost with "
                "them. Choose a strategy that runs the script again (no _spawn, _fork or _notebook in its name), or "
                "give the Trainer the callback LearningRateFinder."
            )


def check_callbacks(trainer: pl.Trainer, config: CommonConfig) -> None:
    """Refuse callbacks that read all parameters while a worker holds a part, and warn of those that send messages.

    Raises:
        ValueError: for stochastic weight averaging, pruning, and for other averages that the method cannot serve.
    """
    callbacks: list[Any] = getattr(trainer, "callbacks", [])
    for callback in callbacks:
        if isinstance(callback, StochasticWeightAveraging):
            raise ValueError(
                f"{type(callback).__name__} adds an epoch without steps, and saves worker 0's average alone. Use "
                "WeightAveraging (of Lightning 2.6), whose should_update() can choose the ends of epochs, or average "
                "checkpoints after the training."
            )
        if isinstance(callback, ModelPruning):
            raise ValueError(
                f"{type(callback).__name__} chooses by a worker's own weights, which differ between syncs: each worker "
                "would prune different ones, and their mean would have fewer zeros. Prune the full model after the "
                "training."
            )
        if isinstance(callback, LearningRateFinder) and config.first_ends:
            raise ValueError(
                f"{type(callback).__name__} runs a trial training first, after which full_model_on='first' would leave "
                "the full model on worker 0 alone. Set full_model_on='all', or search in a separate run."
            )
        if isinstance(callback, Timer) or getattr(callback, "_train_time_interval", None) is not None:
            rank_zero_warn(
                f"{type(callback).__name__} sends a message after every batch, so the workers wait for each other in "
                "every step. Limit the training by steps or epochs instead."
            )
    check_averages(trainer, config)


def warn_of_short_training(
    trainer: pl.Trainer,
    clock: Clock,
    without_effect: Callable[[Clock, int], Sequence[str]],
    *,
    alone: bool = True,
) -> None:
    """Warn of a training that will end before its round does, or before settings of it have an effect.

    Args:
        trainer: of this worker, just before its first batch.
        clock: at the beginning of the training.
        without_effect: of a layout; gives warnings for the clock and the number of local steps.
        alone: whether workers train each by themselves within a round.
    """
    if getattr(trainer, "fast_dev_run", False):
        return
    left = estimated_steps(trainer) - trainer.global_step
    if not 0 < left < float("inf"):  # an endless training uses every setting at last
        return
    steps = int(left)
    if alone and steps < clock.local_steps - clock.step:
        rank_zero_warn(one_round(steps, clock))
        return
    texts = [*without_effect(clock, steps)]
    if clock.rule is not None:
        texts.append(clock.rule.unused(clock.total_steps + steps))
    for text in filter(None, texts):
        rank_zero_warn(text)


def warn_of_batches_without_step(trainer: pl.Trainer, engine: Engine, batches: int) -> bool:
    """Warn where the length of a training is an estimate by its batches, and batches pass in which nothing steps.

    Args:
        trainer: of this worker, between two batches.
        engine: of this worker.
        batches: the newest ones, in which no optimizer has stepped.

    Returns:
        Whether it has warned.
    """
    config, total = engine.config, engine.layout.total_steps
    accumulated, automatic = trainer.accumulate_grad_batches, trainer.lightning_module.automatic_optimization
    if total is None or not isinstance(config, GrowingConfig) or batches < accumulated:
        return False
    # By hand Lightning counts the steps that are taken, else the calls of the hook `optimizer_step`.
    if not automatic and estimated_steps(trainer) == trainer.max_steps:
        return False
    every, last = ("batch", "one") if accumulated == 1 else (f"{accumulated} batches", f"{accumulated}")
    way_out = "Use accumulate_grad_batches" if automatic else "Set max_steps to the number of steps of the optimizer"
    rank_zero_warn(
        f"{config.by_total_steps} is planned for {total} local steps, one for every {every}, but no optimizer has "
        f"stepped in the last {last}: the training will have fewer local steps, and its last rounds will not come. "
        f"{way_out}."
    )
    return True


def warn_of_early_end(trainer: pl.Trainer, engine: Engine) -> None:
    """Warn, at the end of a training, of what its start promised for more local steps than there were."""
    clock, config, total = engine.clock, engine.config, engine.layout.total_steps
    if config.trains_alone and clock.round == 0 and 0 < clock.step < clock.local_steps <= estimated_steps(trainer):
        rank_zero_warn(one_round(clock.step, clock))
    if total is None or not isinstance(config, GrowingConfig) or isinstance(config.local_steps, QSR):
        return
    if 0 <= trainer.max_steps < total:  # a search for the learning rate, which has a limit of its own
        return
    missing = rounds_in(config.local_steps, clock.steps_before, total) - 1
    if missing > 0:
        rank_zero_warn(
            f"{config.by_total_steps} was planned for {total} local steps, and the training has ended after "
            f"{clock.total_steps}: of {clock.round + 1 + missing} rounds the last {missing} did not come. Where "
            "not every batch has a step, use accumulate_grad_batches, or in manual optimization set max_steps; where a "
            "batch has steps of several optimizers, all of which max_steps counts, limit the training by max_epochs."
        )


def check_memory(engine: Engine, trainer: pl.Trainer) -> None:
    """Check that this worker's part can train within its memory limit. Sends nothing.

    Args:
        engine: has just started.
        trainer: of this worker.

    Raises:
        ValueError: if it needs more, even without activations.
    """
    limit = memory_limit(trainer.strategy.root_device)
    if limit is None:
        return
    if engine.layout.partial:
        remedy = "Take more workers, or let each hold less (`min_blocks` of resist, `min_share` of ist)"
    else:
        remedy = "With these settings a worker holds the whole network: `resist`, `ist` and `auxnet` divide it"
    gradients = trainer.lightning_module.automatic_optimization  # else they may be made and used one by one
    needed = needed_to_train(engine.module, engine.states, gradients=gradients)
    if text := shortage(needed, limit, f"{remedy}; an optimizer with less state and a higher limit help too."):
        raise ValueError(f"worker {engine.collective.worker}: {text}")


def _in_hydra_sweep() -> bool:
    """Asks the Hydra that the user's program has loaded, if any: this package does not import it."""
    module: Any = sys.modules.get("hydra.core.hydra_config")
    if module is None or not module.HydraConfig.initialized():
        return False
    return str(module.HydraConfig.get().mode).endswith("MULTIRUN")
