"""Chooses a method's layout and sync by the type of the config, and attaches the hooks of full models.

This is the only module of the engine that knows single methods: a new one is a folder in ``methods`` and a line here.
The names of strategies for ``Trainer(strategy=...)`` are registered in ``strategies/registry``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from resist_lightning.checks.fingerprint import shorten
from resist_lightning.comm.collective import Collective
from resist_lightning.comm.tensors import named_tensors
from resist_lightning.errors import PartialModelError
from resist_lightning.methods.auxnet.config import StageConfig
from resist_lightning.methods.auxnet.layout import StageLayout
from resist_lightning.methods.auxnet.sync import StageSync
from resist_lightning.methods.config import CommonConfig
from resist_lightning.methods.ist.config import NeuronConfig
from resist_lightning.methods.ist.layout import NeuronLayout
from resist_lightning.methods.ist.sync import NeuronSync
from resist_lightning.methods.layout import Layout
from resist_lightning.methods.residual import block_at
from resist_lightning.methods.resist.config import Config
from resist_lightning.methods.resist.layout import BlockLayout
from resist_lightning.methods.resist.overlapped_sync import make_block_sync
from resist_lightning.methods.resist.scaling import ScaleHooks, remove_scale_hooks
from resist_lightning.methods.sync import Sync
from resist_lightning.schedule.round_length import in_words
from resist_lightning.state.absent import is_absent
from resist_lightning.state.batch_norm import BatchStatistics, norms_with_statistics, remove_batch_statistics
from resist_lightning.state.names import as_named_in
from resist_lightning.state.optimizer_state import OptimizerStates, ids_of_parameters

_METHODS: dict[type[CommonConfig], tuple[type[Layout], Callable[..., Sync[Any, Any]]]] = {
    Config: (BlockLayout, make_block_sync),
    NeuronConfig: (NeuronLayout, NeuronSync),
    StageConfig: (StageLayout, StageSync),
}


def check_arguments(optimizers: object, config: object) -> None:
    """Refuse arguments of another kind than :class:`~resist_lightning.Engine` takes.

    Raises:
        TypeError: with the right form.
    """
    form = "Engine(model, [optimizer], Config(local_steps=50))"
    if isinstance(optimizers, Optimizer):
        raise TypeError(f"optimizers is one {type(optimizers).__name__} and must be a list of them: {form}.")
    if not isinstance(config, CommonConfig):
        raise TypeError(f"config is {config!r} and must be a Config, NeuronConfig or StageConfig: {form}.")


def make_layout(
    module: nn.Module, config: CommonConfig, workers: int, optimizers: Sequence[Optimizer] = (), *, members: int = 1
) -> Layout:
    """Divide a module; ``optimizers`` is empty if not known yet, ``members`` is the number of members per worker.

    Raises:
        ValueError: if the settings do not fit the module; see the layouts.
        PartialModelError: if parts of the module are absent, as another training has left it.
    """
    refuse_lazy(module)
    _refuse_incomplete(module)
    if members == 1:
        _refuse_sync_batch_norm(module)
    layout, _ = _method_of(config)
    with _without_hooks(module):  # the module may be a full model of an earlier fit
        return layout(module, config, workers, ids_of_parameters(optimizers) or None)


def make_sync(layout: Layout, states: OptimizerStates, collective: Collective, device: torch.device) -> Sync[Any, Any]:
    """A worker's side of the syncs; warns of settings, once for all workers."""
    if collective.rank == 0:
        layout.warn_about_settings()
        states.warn_about_settings(layout.config.momentum, in_words(layout.config.local_steps))
    _, sync = _method_of(layout.config)
    return sync(layout, states, collective, device)


def _method_of(config: CommonConfig) -> tuple[type[Layout], Callable[..., Sync[Any, Any]]]:
    # Users may derive a config from ours.
    return next(_METHODS[base] for base in type(config).__mro__ if base in _METHODS)


def refuse_lazy(module: nn.Module) -> None:
    """Refuse a module with tensors that get their shapes from its first input.

    Raises:
        ValueError: with their names.
    """
    lazy = [name for name, tensor in named_tensors(module).items() if is_lazy(tensor)]
    if lazy:
        raise ValueError(
            f"{shorten(lazy)}: no shape yet. Tensors of lazy modules, such as nn.LazyLinear, get their shapes from the "
            "first input, and workers must know them before they share the model. Call the module once on an input, in "
            "torch.no_grad(), before the training starts; or use modules of given sizes, such as nn.Linear."
        )


def attach_hooks(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Attach the hooks by which a module with the weights of a full model evaluates as that did.

    Args:
        module: the user's; hooks of an earlier full model are removed.
        state: from :meth:`Observation.full_state`; empty for weights that are not of a full model.
    """
    detach_hooks(module)
    names: list[str] = as_named_in(module, state.get("hooked", []))
    modules = dict(module.named_modules())
    missing = [name for name in names if name not in modules]
    if missing:
        warnings.warn(
            f"the full model scales {missing[0]!r}, which this module does not have: its outputs differ from those of "
            "the full model that was evaluated. Load the weights into the module that was trained.",
            stacklevel=3,
        )
    if names:
        blocks = [block_at(name, modules[name]) for name in names if name in modules]
        ScaleHooks(blocks, state["scale"])
    if state.get("batch_statistics", False):
        BatchStatistics(norms_with_statistics(module).values())


def detach_hooks(module: nn.Module) -> None:
    """Undo :func:`attach_hooks`, of this module or of one that it is a copy of."""
    remove_scale_hooks(module)
    remove_batch_statistics(module)


@contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    """Inside, a module is without the hooks of a full model, so that layouts see its own forward."""
    # Hooks are put back as they were: making a layout must not change a model that the user may still evaluate.
    hooks: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
    forwards: list[tuple[nn.Module, Any]] = []
    for child in module.modules():
        for table in (child._forward_hooks, child._forward_hooks_with_kwargs):
            hooks.append((table, dict(table)))
        if "forward" in vars(child):
            forwards.append((child, vars(child)["forward"]))
    detach_hooks(module)
    try:
        yield
    finally:
        for table, before in hooks:
            table.clear()
            table.update(before)
        for child, forward in forwards:
            vars(child)["forward"] = forward


def _refuse_incomplete(module: nn.Module) -> None:
    """Refuse a module of which this worker has only a part, so that nothing can be sent or trained in its place."""
    tensors: dict[str, Any] = {**named_tensors(module)}
    for name, tensor in tensors.items():
        if is_absent(tensor):
            raise PartialModelError(
                f"{name} has no value, so no training can begin with this module: {tensor.absence.reason}. Finish the "
                "training that it is in, or load a checkpoint into a new module."
            )


def _refuse_sync_batch_norm(module: nn.Module) -> None:
    names = [name for name, child in module.named_modules() if isinstance(child, nn.SyncBatchNorm)]
    if names:
        raise ValueError(
            f"{names[0]} is a SyncBatchNorm: it would communicate in every step, in a sub-network that differs between "
            "workers. Use BatchNorm; the full model has statistics of all workers."
        )
