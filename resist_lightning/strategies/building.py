"""Builds the module on each worker: whole on worker 0, on the others without memory until they know their parts."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch.utils._pytree import tree_map

from resist_lightning.comm.collective import Collective
from resist_lightning.comm.members import default_collective
from resist_lightning.comm.tensors import named_tensors
from resist_lightning.engine.engine import Engine
from resist_lightning.state.memory import CPU, move_present
from resist_lightning.state.random_state import random_state, set_random_state
from resist_lightning.state.unmade import allocate, initialise, is_unmade, without_memory
from resist_lightning.strategies.patches import Patches

LARGE_BYTES = 100_000_000  # of parameters: below, a whole module on each worker at the start is not worth a word


@contextmanager
def building(strategy: Any, usual: AbstractContextManager[None], *, empty: bool) -> Iterator[None]:
    """Inside, modules are built as this worker needs them; see ``Strategy.tensor_init_context``.

    Args:
        strategy: of this worker.
        usual: Lightning's context, with device and precision.
        empty: whether no values are made, as with ``Trainer.init_module(empty_init=True)``.
    """
    form: AbstractContextManager[Any] = nullcontext()
    if empty:
        form = torch.device("meta")
    # Not AuxNet's workers, which measure the network before they divide it.
    elif strategy.config.trains_alone and _is_fitting(strategy.lightning_module):
        form = _only_first_makes_values(default_collective())
    with usual, form:
        yield


@contextmanager
def _only_first_makes_values(collective: Collective) -> Iterator[None]:
    """Inside, all workers but the first build modules without memory.

    Random generators that began as those of rank 0 also end as those: later draws are as if every worker had built the
    whole module. Collective: every worker must enter and leave this, in the same order.
    """
    begun = {name: _mark(state) for name, state in random_state().items()}
    try:
        with without_memory() if collective.worker > 0 else nullcontext():
            yield
    except RuntimeError as error:
        if collective.worker == 0 or "meta" not in str(error):
            raise
        raise RuntimeError(
            f"`configure_model` reads values of parameters, but on worker {collective.worker} they have none: worker 0 "
            "sends them when the training starts. Leave this to worker 0, skipping parameters whose `is_meta` is True; "
            "or build the whole network on every worker, in __init__."
        ) from error
    ended = random_state()
    buffer = io.BytesIO()
    torch.save([begun, ended], buffer)
    told = collective.gather_bytes(b"-" if collective.rank else buffer.getvalue())[0]
    if collective.worker > 0:
        begun_first, ended_first = torch.load(io.BytesIO(told), weights_only=True)
        # Python's is seldom seeded, and then differs in every process.
        alike = [name for name, state in begun.items() if begun_first.get(name) == state]
        set_random_state({**ended, **{name: ended_first[name] for name in alike if name in ended_first}})


def _mark(state: Any) -> str:
    """A hash of a generator's state."""
    numbers = tree_map(lambda value: value.tolist() if isinstance(value, torch.Tensor) else value, state)
    return hashlib.sha256(repr(numbers).encode()).hexdigest()


def move_built(trainer: pl.Trainer, device: torch.device) -> None:
    """Move the module to this worker's device; tensors that worker 0 will send stay without memory."""
    _make_values(trainer, device)
    move_present(trainer.lightning_module, device)


@contextmanager
def loading(trainer: pl.Trainer, device: torch.device) -> Iterator[None]:
    """Inside, a full model can be loaded: into the whole module, or into the parts of it that have memory."""
    _make_values(trainer, device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*to a meta parameter in the current model, which is a no-op")
        yield


@contextmanager
def without_module(strategy: Any) -> Iterator[None]:
    """Inside, the strategy has no module: Lightning would move all of it to the CPU. Present tensors are moved then."""
    module, strategy._lightning_module = strategy._lightning_module, None
    try:
        yield
    finally:
        strategy._lightning_module = module
    if module is not None:
        move_present(module, CPU)


def undo_layer_sync(strategy: Any) -> None:
    """Make synchronised batch norm local again after a ``fit``: Lightning would, if the strategy had a module then."""
    module = strategy.lightning_module
    # A module is not attached where a launch was refused.
    if strategy._layer_sync is None or module is None or module._trainer is None or not _is_fitting(module):
        return
    strategy._layer_sync.revert(module)
    state = strategy.resumer.state_of(module)
    if state and not module.trainer.interrupted:
        strategy.resumer.set_state(state, module)  # the layers are new ones, without the hooks of a full model


def check_built(engine: Engine, trainer: pl.Trainer, patches: Patches) -> None:
    """Skip uses of the full model before the training, where a worker has none; tell the user, once.

    Collective: every worker must call this, in the same order.
    """
    own = is_unmade(engine.module)
    unmade = [bool(number) for (number,) in engine.collective.gather_numbers([float(own)])]
    if own:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            if isinstance(callback, ModelSummary):  # it would call the module on an example, and worker 0 shows it
                patches.replace(callback, "_max_depth", 0)
    if any(unmade) and trainer.num_sanity_val_steps and not engine.config.first_evaluates:
        patches.replace(trainer, "num_sanity_val_steps", 0)
        rank_zero_info("No sanity check: before the training only worker 0 has the full model.")
    # Not AuxNet's workers, which build all of it to measure it.
    if not any(unmade) and engine.layout.partial and engine.config.trains_alone:
        size = sum(parameter.nbytes for parameter in engine.module.parameters())
        if size >= LARGE_BYTES:
            rank_zero_info(
                f"Every worker has built the whole module ({size / 1e6:,.0f} MB of parameters), and frees the parts of "
                "others when the training starts. If it is built in `configure_model`, only worker 0 holds all of it."
            )


def _make_values(trainer: pl.Trainer, device: torch.device) -> None:
    """Make the values of a module without memory on worker 0. In an evaluation the others get memory for them."""
    module = trainer.lightning_module
    if default_collective().worker == 0:
        initialise(module, device)
    elif not _is_fitting(module):
        # A fit that had nothing to do may have left none. An evaluation begins with worker 0's values.
        allocate(named_tensors(module), device)


def _is_fitting(module: pl.LightningModule | None) -> bool:
    return module is not None and module.trainer.state.fn == TrainerFn.FITTING
