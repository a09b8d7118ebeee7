"""Refuses to evaluate, trace, save or copy a network of which this worker has only a part."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import torch
from torch import fx, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from resist_lightning.errors import PartialModelError
from resist_lightning.state.absent import NEW_MODULE
from resist_lightning.state.compiled import is_exporting

_WAY_OUT = (
    "Do so inside `engine.full_model()`, on all workers, or in a validation hook; under Lightning the engine is "
    "`trainer.strategy.engine`."
)


class PartGuard:
    """Guards the modules that are incomplete on this worker.

    Args:
        worker: this worker.

    Attributes:
        stepping: whether the program is in a training step; None in a plain loop, where this is unknown.
    """

    def __init__(self, worker: int) -> None:
        self.stepping: bool | None = None
        self._worker = worker
        self._handles: list[RemovableHandle] = []
        self._warned: set[str] = set()
        self._way_out = _WAY_OUT
        self._open = False

    def watch(self, modules: Mapping[str, nn.Module]) -> None:
        """Guard these modules, by name, and no others."""
        self.release()
        for name, module in modules.items():
            self._handles.append(module.register_forward_pre_hook(_Watched(self, name)))
            self._handles.append(module.register_state_dict_pre_hook(partial(self._refuse_state_dict, name)))

    def release(self) -> None:
        """Guard nothing: the module is complete."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def end(self, reason: str) -> None:
        """End the training: a module that is incomplete now stays so."""
        self._way_out = f"This is permanent: {reason}. {NEW_MODULE}"

    @contextmanager
    def training_step(self) -> Iterator[None]:
        """Inside, this worker's part may be called."""
        self.stepping = True
        try:
            yield
        finally:
            self.stepping = False

    def refuse(self, name: str, what: str) -> NoReturn:
        """Raise the error that this worker has only a part of the network."""
        raise PartialModelError(
            f"worker {self._worker} has only a part of the network in this round, not all of {name}, and was asked to "
            f"{what} it. {self._way_out}"
        )

    @contextmanager
    def open(self) -> Iterator[None]:
        """Inside, ``state_dict()`` may be asked for names and shapes."""
        self._open = True
        try:
            yield
        finally:
            self._open = False

    def _refuse_state_dict(self, name: str, *_: object) -> None:
        if not self._open:
            self.refuse(name, "save")

    def check(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Refuse or warn, before a forward of a guarded module that does not look like training."""
        if is_exporting() or _is_traced(args):
            self.refuse(name, "trace or export")
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1:
            return  # a forward inside a backward is activation checkpointing
        recording = torch.is_grad_enabled()
        if self.stepping:
            # Frozen batch norms are in eval mode, and targets are computed without gradients: each alone is usual.
            if not module.training and not recording:
                self._warn("evaluates")
        # Outside of a training step either sign is suspicious; in a plain loop only both together are.
        elif not module.training and (self.stepping is False or not recording):
            self.refuse(name, "evaluate")
        # A hook of the program that looks at outputs, say; one that trains in it may ignore the warning.
        elif not module.training or self.stepping is False:
            self._warn("evaluates" if not module.training else "calls, outside a training step,")

    def _warn(self, what: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(
                f"worker {self._worker} {what} the part of the network that it has in this round, which is not the "
                f"full model, and differs between workers. If you mean the full model: {self._way_out}",
                stacklevel=6,
            )


class _Watched:
    """A forward pre-hook that refuses to be copied or pickled, and so refuses it for its module."""

    def __init__(self, guard: PartGuard, name: str) -> None:
        self._guard = guard
        self._name = name

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._guard.check(self._name, module, args)

    @override
    def __reduce_ex__(self, _: Any) -> NoReturn:
        self._guard.refuse(self._name, "copy or save")


def _is_traced(args: tuple[Any, ...]) -> bool:
    return torch._C._get_tracing_state() is not None or any(isinstance(arg, fx.Proxy) for arg in args)
