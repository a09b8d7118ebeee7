"""Records the inputs of training, to re-estimate batch-norm statistics on them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from resist_lightning.state.batch_norm import Call, norms_with_statistics
from resist_lightning.state.compiled import is_exporting
from resist_lightning.state.host_copies import moved, recorded

_REASON = "resist_lightning records the inputs of batch norm; compile the network in place, by net.compile()"


class InputRecorder:
    """Records the inputs of the last training batches, to re-estimate batch-norm statistics on them.

    It records the outermost module that contains a batch norm and is called: the network, or the user's whole module
    where ``training_step`` calls ``self(x)``.

    Args:
        module: the user's module.
        calls: number of calls to record; each keeps its batch in host memory.

    Attributes:
        calls: the recorded calls, oldest first.
        missed: whether some training call was not recorded, as it was without gradients.
        still: names of the batch norms that were in evaluation mode in the last call: their statistics do not train.
    """

    def __init__(self, module: nn.Module, calls: int) -> None:
        self.calls: deque[Call] = deque(maxlen=calls)
        self.still: frozenset[str] = frozenset()
        self.missed = False
        self._module = module
        self._norms = norms_with_statistics(module)
        # The identity of the module whose forward runs now: code that torch.compile has made must not refer to a module
        # around it.
        self._outermost: int | None = None
        self._handles: list[RemovableHandle] = []
        self._outside: list[_Outside] = []
        for name in _containers(self._norms):
            watched = module.get_submodule(name)
            # First, so that it sees the user's own arguments; and last even after an error, so that none stays open.
            enter = watched.register_forward_pre_hook(_OnlyHere(self._enter), prepend=True, with_kwargs=True)
            leave = watched.register_forward_hook(_OnlyHere(self._leave), always_call=True)
            self._handles += [enter, leave]
            if watched._compiled_call_impl is not None:
                self._outside.append(_Outside(self, watched))

    def state_dict(self) -> dict[str, Any] | None:
        """The recorded inputs; None if one of them cannot be written to a file that is safe to load."""
        names = {child: name for name, child in self._module.named_modules()}
        calls = [[names[module], list(args), kwargs] for module, args, kwargs in self.calls]
        on_cpu = moved(calls, torch.device("cpu"))
        return {"calls": on_cpu, "still": sorted(self.still)} if _plain(on_cpu) else None

    def load_state_dict(self, own: dict[str, Any], device: torch.device) -> None:
        """Load a :meth:`state_dict`."""
        for name, args, kwargs in moved(own["calls"], device):
            self.calls.append((self._module.get_submodule(name), recorded(tuple(args)), recorded(kwargs)))
        self.still = frozenset(own["still"])

    def remove(self) -> None:
        """Remove the hooks and free the inputs."""
        for handle in self._handles:
            handle.remove()
        for outside in self._outside:
            outside.remove()
        self.calls.clear()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # First of all, as torch.compile cannot trace the code below, and blocks inside are compiled one by one.
        if self._outermost is None:
            self.open(module, args, kwargs)

    @torch.compiler.disable(reason=_REASON)  # type: ignore[untyped-decorator]
    def open(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, compiled: bool = False) -> None:
        """Called before a forward that is not inside another one.

        Args:
            module: the module that is called.
            args: its arguments by position.
            kwargs: its arguments by name.
            compiled: whether the module's own hooks are in compiled code, so that :meth:`close` will be called.
        """
        # A forward inside a backward is activation checkpointing, which runs a part of the network a second time.
        if torch._C._current_graph_task_id() != -1:
            return
        self._outermost = id(self if compiled else module)
        # Tracers call a forward with inputs that have no values.
        traced = is_exporting() or torch._C._get_tracing_state() is not None
        if not module.training or traced:
            return
        self.missed |= not torch.is_grad_enabled()
        if torch.is_grad_enabled():
            self.calls.append((module, recorded(args), recorded(kwargs)))
            self.still = frozenset(name for name, norm in self._norms.items() if not norm.training)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if id(module) == self._outermost:
            self._outermost = None

    def close(self) -> None:
        """Called after the forward of a module whose hooks are in compiled code."""
        self._outermost = None

    @property
    def idle(self) -> bool:
        """Whether no forward is under way."""
        return self._outermost is None


class _Outside:
    """Calls the compiled code of a module, and records its inputs outside of it: recording would break the graph.

    Args:
        recorder: the recorder of its inputs.
        module: the module, compiled in place.
    """

    def __init__(self, recorder: InputRecorder, module: nn.Module) -> None:
        self._recorder = recorder
        self._module = module
        self._code: Any = module._compiled_call_impl
        module._compiled_call_impl = self

    def remove(self) -> None:
        """Restore the compiled code."""
        if self._module._compiled_call_impl is self:
            self._module._compiled_call_impl = self._code

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Called by torch in place of the compiled code."""
        if not self._recorder.idle:
            return self._code(*args, **kwargs)
        self._recorder.open(self._module, args, kwargs, compiled=True)
        try:
            return self._code(*args, **kwargs)
        finally:
            self._recorder.close()


class _OnlyHere:
    """A hook that works on this module only: copied or pickled with its module, it does nothing."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook = hook

    def __call__(self, *args: Any) -> Any:
        return self._hook(*args)

    @override
    def __reduce_ex__(self, _: Any) -> Any:
        return _Nothing, ()


class _Nothing:
    """A hook that does nothing."""

    def __call__(self, *args: Any) -> None:
        pass


def _plain(values: Any) -> bool:
    """Whether torch.load accepts the values with ``weights_only=True``: no class of a user's, as a NamedTuple is."""
    kind = type(values)
    if kind is dict:
        return all(_plain(key) and _plain(value) for key, value in values.items())
    if kind in (list, tuple):
        return all(map(_plain, values))
    return kind in (Tensor, int, float, bool, str, bytes, NoneType)


def _containers(names: Iterable[str]) -> set[str]:
    """Names of all modules that contain one of these, and of the root."""
    found = {""}
    for name in names:
        parts = name.split(".")
        found.update(".".join(parts[:end]) for end in range(1, len(parts)))
    return found
