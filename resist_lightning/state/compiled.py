"""Finds code that torch.compile has made, and bypasses it where a module's own code must run."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import FunctionType
from typing import Any

import torch
from torch import nn

_ORIGINAL = "_orig_mod"  # torch.compile keeps the module that it wraps here


class CompiledCall:
    """The code that ``module.compile()`` has made: it runs unless it is held back.

    Compiled code has the hooks and the forward of its compilation. Where they change, torch compiles again, and after
    eight times it compiles no module any more.

    Args:
        module: the module, compiled in place or not.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._code: Any = None
        self._reasons: set[str] = set()

    def hold_back(self, reason: str) -> None:
        """Let the module run uncompiled, until :meth:`release` is called for the same reason."""
        code = self._module._compiled_call_impl
        if code is not None:
            self._code = code
            self._module._compiled_call_impl = None
        self._reasons.add(reason)

    def release(self, reason: str) -> None:
        """Undo :meth:`hold_back`; the code runs again when there is no other reason."""
        self._reasons.discard(reason)
        if self._code is not None and not self._reasons:
            self._module._compiled_call_impl = self._code
            self._code = None


def compiled_around(module: nn.Module, name: str) -> str | None:
    """The outermost module around the submodule ``name`` that is compiled, by name; None if there is none."""
    parts = name.split(".")
    for end in range(len(parts)):
        outer = ".".join(parts[:end])
        if is_compiled(module.get_submodule(outer)):
            return outer
    return None


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile has compiled a module, in place or by a wrapper, or one of its methods (Lightning)."""
    if module._compiled_call_impl is not None or _ORIGINAL in module._modules:
        return True
    return any(_is_compiled_function(value) for value in [*vars(module).values(), type(module).forward])


def is_exporting() -> bool:
    """Whether torch.export traces. ``torch.compiler.is_exporting`` is true in all code that torch 2.10 compiles."""
    return torch.compiler._is_exporting_flag


def uncompiled(module: nn.Module) -> AbstractContextManager[Any]:
    """Inside, compiled code in a module, or around it, runs uncompiled."""
    # Only where it is needed: the stance is one for all threads.
    if any(map(is_compiled, module.modules())):
        stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return stance
    return nullcontext()


def _is_compiled_function(value: object) -> bool:
    if not isinstance(value, FunctionType) or getattr(value, "_torchdynamo_disable", False):
        return False
    return hasattr(value, "_torchdynamo_orig_callable")
