"""Supports ``WeightAveraging`` callbacks: each worker averages its part, and all see the mean of the averages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from resist_lightning.engine.engine import Engine
from resist_lightning.methods.config import CommonConfig
from resist_lightning.methods.ist.config import NeuronConfig
from resist_lightning.state.companion import Companion
from resist_lightning.state.memory import move_present
from resist_lightning.strategies.patches import Patches
from resist_lightning.strategies.saving.checkpoint_files import CHECKPOINT_KEY


def check_averages(trainer: pl.Trainer, config: CommonConfig) -> None:
    """Refuse averaging callbacks that cannot work with the settings.

    Raises:
        ValueError: for several callbacks that average, and for one where neurons are dealt out, workers left out or
            syncs overlapped.
    """
    names = [type(callback).__name__ for callback in _averaging_callbacks(trainer)]
    if not names:
        return
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)} would each show its own average in validations: keep one of them.")
    if isinstance(config, NeuronConfig):
        raise ValueError(
            f"{names[0]} averages the weights of every step, and under IST a worker has other neurons in every round. "
            "Remove it, or average checkpoints after the training."
        )
    if config.overlaps_syncs:
        raise ValueError(
            f"{names[0]} keeps an average of every step, which an overlapped sync would have to move with the weights. "
            "Use overlap=0, or average checkpoints after the training."
        )
    if config.first_ends:
        raise ValueError(
            f"{names[0]} replaces the full model by its average at the end, on every worker, but full_model_on='first' "
            "has a full model on worker 0 alone. Use full_model_on='all'."
        )
    if config.non_finite == "drop":
        raise ValueError(
            f"{names[0]} would keep the NaN or infinity of a worker that non_finite='drop' leaves out. Use "
            "non_finite='raise', or average checkpoints after the training."
        )


def _averaging_callbacks(trainer: pl.Trainer) -> list[Any]:
    """Lightning's ``WeightAveraging``, and classes derived from it; it came with Lightning 2.6."""
    kind = getattr(pl.callbacks, "WeightAveraging", None)
    if kind is None:
        return []
    callbacks: list[Any] = getattr(trainer, "callbacks", [])
    return [callback for callback in callbacks if isinstance(callback, kind)]


class Averages:
    """Adapts the averaging callback of a trainer, if it has one.

    The average is a copy of the module, of which a worker holds the same parts as of the module. It is updated from
    those, and replaces the module's weights before a full model is assembled for an evaluation or a checkpoint, and at
    the end. So scales and batch-norm statistics of that full model are made for the average.
    """

    def __init__(self, trainer: pl.Trainer, engine: Callable[[], Engine | None], patches: Patches) -> None:
        self._engine = engine  # of this worker, while it trains
        self._patches = patches
        callbacks = _averaging_callbacks(trainer)  # one at most: `check_averages` refuses several
        self._callback: Any = callbacks[0] if callbacks else None
        self._begins_as_module = True  # the module is worker 0's, and the average must be too
        self._resumed = False
        if self._callback is None:
            return
        replacements = {
            "_swap_models": self._swap_models,
            "_copy_average_to_current": self._copy_average_to_current,
            "on_save_checkpoint": self._on_save_checkpoint,
            "on_load_checkpoint": self._on_load_checkpoint,
        }
        for name, replacement in replacements.items():
            usual = getattr(self._callback, name)
            patches.replace(self._callback, name, partial(replacement, usual))

    def follow(self, engine: Engine) -> None:
        """Move parts of the average along with those of the module of a new engine.

        Raises:
            ValueError: if the average is on another device, and parts of it would have to move.
        """
        if self._callback is None:
            return
        average = self._callback._average_model
        if getattr(self._callback, "_device", None) is None:
            # Lightning has copied the module before the strategy moved it to its device.
            move_present(average, engine.sync.exchange.device)
        tensors = [*engine.module.parameters(), *average.module.parameters()]
        devices = {tensor.device for tensor in tensors}
        if len(devices) > 1 and engine.layout.partial:
            name = type(self._callback).__name__
            raise ValueError(f"{name}(device=...) keeps the average apart from the module it moves with: leave it out.")
        engine.layout.companion = Companion(engine.module, average.module)
        self._patches.replace(average, "update_parameters", partial(self._update_parameters, average))

    def begin(self) -> None:
        """Initialise the average; the engine must have started."""
        companion = self._companion()
        if companion is None or companion.loaded or not self._begins_as_module:
            return  # there is none, or a checkpoint has given it
        # Lightning made it of this worker's own initial weights, and the module has worker 0's now.
        companion.copy_module()
        if self._resumed:
            rank_zero_warn(
                "the checkpoint holds the averages, and each worker's own file the weights that are averaged. Without "
                "these files the training resumes from the averages."
            )

    def show(self) -> None:
        """Replace the weights that this worker holds by their average."""
        companion = self._companion()
        if companion is not None and not companion.shown:
            companion.show()

    def hide(self) -> None:
        """Undo :meth:`show`, exactly."""
        companion = self._companion()
        if companion is not None and companion.shown:
            companion.hide()

    def _companion(self) -> Companion | None:
        """The average beside the module, while the training runs."""
        engine = self._engine()
        return engine.layout.companion if engine is not None else None

    def _update_parameters(self, average: AveragedModel, model: nn.Module) -> None:
        companion = self._companion()
        if companion is None:
            AveragedModel.update_parameters(average, model)
            return
        pairs = companion.present()
        held = _Part({name: own for name, (own, _) in pairs.items()})
        whole = average.module
        # torch pairs the tensors of the two modules by position, so both must lack the same.
        average.module = _Part({name: copy for name, (_, copy) in pairs.items()})
        try:
            AveragedModel.update_parameters(average, held)
        finally:
            average.module = whole

    def _swap_models(self, usual: Callable[..., None], module: nn.Module) -> None:
        """Called when a validation begins and ends; in training, :meth:`show` and :meth:`hide` do this instead."""
        if self._companion() is None:
            usual(module)

    def _copy_average_to_current(self, usual: Callable[..., None], module: nn.Module) -> None:
        """Called when the training ends, before the full model is assembled."""
        if self._companion() is None:
            usual(module)
        self.show()

    def _on_save_checkpoint(self, usual: Callable[..., None], *args: Any) -> None:
        if self._companion() is None:
            usual(*args)
            return
        # In training, `state_dict` is the average's already, and the weights are in the workers' own files.
        checkpoint = args[-1]
        checkpoint["averaging_state"] = {name: buffer.clone() for name, buffer in self._counters().items()}

    def _on_load_checkpoint(self, usual: Callable[..., None], *args: Any) -> None:
        checkpoint: Mapping[str, Any] = args[-1]
        ours = CHECKPOINT_KEY in checkpoint and "averaging_state" in checkpoint
        # Lightning writes this key where it saves the weights beside their average.
        has_weights = "current_model_state" in checkpoint
        if self._callback._average_model is None or not ours:
            self._begins_as_module = not has_weights
            usual(*args)
            return
        # A checkpoint saved after such a training has this key too, and the average in it again.
        self._resumed = not has_weights
        with torch.no_grad():
            for name, buffer in self._counters().items():
                buffer.copy_(checkpoint["averaging_state"][name])

    def _counters(self) -> dict[str, Tensor]:
        """The buffers that count how often the average was updated."""
        return dict(self._callback._average_model.named_buffers(recurse=False))


class _Part(nn.Module):
    """Some tensors of a module, as a module: ``AveragedModel`` reads and writes no other form."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self._parameters[name] = tensor
            else:
                self._buffers[name] = tensor
