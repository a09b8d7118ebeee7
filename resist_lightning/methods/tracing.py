"""Traces the forward of a user's module into a graph by torch.fx.

torch.fx changes torch.nn.Module itself while it traces: no other thread may compute or trace meanwhile.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType, MethodType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from resist_lightning.methods.traced_einops import einops_as_nodes, einops_functions

# With the separator at the end, so that torchvision does not match.
_NOT_THE_USERS = (os.path.join(os.path.dirname(torch.__file__), ""), __file__)
RECOMPUTED = "recomputed"
"""Key in the `meta` of a node that was traced inside of ``torch.utils.checkpoint``: the number of that call."""

_CHECKPOINT = ("checkpoint", "_checkpoint_impl")  # the functions of torch that call what is to be computed again
_OF_EVERY_MODULE = frozenset(dir(nn.Module())) - {"training"}
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in \S+(?:\n\s*(?!File ")(\S.*))?')


class CannotTrace(Exception):
    """torch.fx cannot trace a forward.

    Args:
        path: name, within the traced module, of the innermost module that was being called.
        where: that module, for a message: ``'net.1' (Branch)``.
        said: torch.fx's error, and its line: `` at net.py:12 (if x.sum() > 0:): TraceError: ...``.
    """

    def __init__(self, path: str, where: str, said: str) -> None:
        super().__init__(f"{where}{said}")
        self.path, self.where, self.said = path, where, said


class Tracer(fx.Tracer):
    """Traces into every module but those of torch.nn; parameters and buffers that a forward reads become nodes."""

    record_stack_traces = True
    proxy_buffer_attributes = True

    @override
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m)


class ChainTracer(Tracer):
    """Also records information that a graph lacks: modules of values, calls, and contexts such as no_grad.

    Args:
        leaf: tells whether a module is not traced into.

    Attributes:
        ends: for each value the name of the innermost module that returned it.
        calls: number of calls of each module, by name.
        unlike: values that are computed under no_grad, autocast or the like.
        read: modules, and names of the attributes that the forward reads from them; no modules, tensors or methods.
    """

    def __init__(self, leaf: Callable[[nn.Module], bool]) -> None:
        # Those that a module has imported by their names.
        super().__init__(autowrap_functions=tuple(einops_functions().values()))
        self.ends: dict[fx.Node, str] = {}
        self.calls: dict[str, int] = {}
        self.unlike: list[fx.Node] = []
        self._reads: dict[tuple[int, str], nn.Module] = {}
        self._leaf = leaf
        self._modes = _modes()
        self._checkpoints: dict[FrameType, int] = {}

    @property
    def read(self) -> list[tuple[nn.Module, str]]:
        """The modules, and names of attributes, that the forward reads from them."""
        return [(module, name) for (_, name), module in self._reads.items()]

    @override
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self._leaf(m)

    @override
    def trace(self, root: nn.Module | Callable[..., Any], concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        try:
            with _noting_reads(self._reads), einops_as_nodes():
                return super().trace(root, concrete_args)
        finally:
            self._checkpoints.clear()  # frames keep what was computed in them

    @override
    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        result = super().call_module(m, forward, args, kwargs)
        path = self.path_of_module(m)
        self.calls[path] = self.calls.get(path, 0) + 1
        if isinstance(result, fx.Proxy):
            self.ends.setdefault(result.node, path)  # inner modules return before outer ones
        return result

    @override
    def create_proxy(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        proxy: fx.Proxy = super().create_proxy(*args, **kwargs)
        if _modes() != self._modes:
            self.unlike.append(proxy.node)
        frame = _checkpointing()
        if frame is not None:
            proxy.node.meta[RECOMPUTED] = self._checkpoints.setdefault(frame, len(self._checkpoints))
        return proxy


@contextmanager
def _noting_reads(reads: dict[tuple[int, str], nn.Module]) -> Iterator[None]:
    """Inside, attributes that are read from any module are noted; not those that every module has."""

    def note(module: nn.Module, name: str) -> Any:
        value = object.__getattribute__(module, name)
        if name not in _OF_EVERY_MODULE and not isinstance(value, nn.Module | Tensor | MethodType):
            # By identity: the hash of a metric of torchmetrics reads its attributes.
            reads[id(module), name] = module
        return value

    # As torch.fx does with `__getattr__`, which is not asked for attributes that are plain numbers.
    nn.Module.__getattribute__ = note  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del nn.Module.__getattribute__


def _checkpointing() -> FrameType | None:
    """The call of ``torch.utils.checkpoint`` that is running, the innermost one."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code.co_name in _CHECKPOINT and code.co_filename == torch.utils.checkpoint.__file__:
            break
        frame = frame.f_back
    return frame


def _modes() -> tuple[bool, ...]:
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return (torch.is_grad_enabled(), *(torch.is_autocast_enabled(device) for device in devices))


def follow(tracer: fx.Tracer, root: nn.Module, prefix: str) -> fx.Graph:
    """Trace the forward of a module, with optional arguments at their defaults.

    Args:
        tracer: decides which modules are traced into.
        root: the module.
        prefix: prefix of its names in the user's module, with a dot at the end.

    Raises:
        CannotTrace: if torch.fx cannot.
    """
    try:
        with _compiled_as_written(), warnings.catch_warnings():
            # A trace has no backward pass, in which hooks are called and activations are computed again.
            warnings.filterwarnings("ignore", "For backward hooks to be called")
            warnings.filterwarnings("ignore", "None of the inputs have requires_grad")
            return tracer.trace(root, concrete_args=defaults(root) or None)
    except Exception as error:
        # The innermost module that was being called.
        stack = list(tracer.module_stack.values())
        path, kind = stack[-1] if stack else ("", type(root))
        name = f"{prefix}{path}".rstrip(".")
        where = f"{name!r} ({kind.__name__})" if name else f"the module itself ({kind.__name__})"
        raise CannotTrace(path, where, f"{_raised_at(error)}: {type(error).__name__}: {error}") from error


def _compiled_as_written() -> AbstractContextManager[Any]:
    """A context in which torch.fx traces the forward of a compiled module, where torch.compile would raise."""
    dynamo = sys.modules.get("torch._dynamo")  # importing it takes a second, and it is there where anything is compiled
    return nullcontext() if dynamo is None else dynamo.config.patch(error_on_nested_fx_trace=False)


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is not traced into: it has the forward of a class in torch.nn, or is TorchScript."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    if "forward" in vars(module):  # replaces the class's
        return False
    forward_from = getattr(inspect.unwrap(type(module).forward), "__module__", "")
    return forward_from.startswith(("torch.nn.", "torch.ao.nn.")) and not isinstance(module, nn.Sequential)


def has_forward(module: nn.Module) -> bool:
    """Whether a module has a forward of its own."""
    # A LightningModule inherits one that only raises. Lightning must not be imported to find out.
    owner = next(base for base in type(module).__mro__ if "forward" in vars(base))
    lightning = owner.__module__.split(".")[0] in ("lightning", "pytorch_lightning")
    return owner is not nn.Module and not (lightning and owner.__name__ == "LightningModule")


def user_line(node: fx.Node) -> str:
    """The line of the user's code that makes a node, as `` (net.py:12: h = h.softmax(1))``; empty if unknown."""
    frames = _FRAME.findall(node.stack_trace or "")
    own = [frame for frame in frames if not frame[0].startswith(_NOT_THE_USERS)]
    if not own:
        return ""
    path, line, code = own[-1]
    return f" ({path}:{line}: {code})" if code else f" ({path}:{line})"


def defaults(root: nn.Module) -> dict[str, Any]:
    """The defaults of a forward's optional arguments; with them, ``if mask is not None`` can be traced."""
    plain = bool | int | float | str | None
    parameters = inspect.signature(type(root).forward).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if isinstance(parameter.default, plain)}


def left_behind(root: nn.Module, graph: fx.Graph) -> tuple[fx.Node, ...]:
    """Values that the forward has left in attributes of modules; ask before :func:`in_training` removes them."""
    left = tree_leaves([list(vars(child).values()) for child in root.modules()])
    return tuple(value.node for value in left if isinstance(value, fx.Proxy) and value.node.graph is graph)


@contextmanager
def in_training(module: nn.Module) -> Iterator[None]:
    """Inside, a module is in training mode; attributes that tracing or a forward sets on modules are undone."""
    modules = [child for child in module.modules() if not isinstance(child, torch.jit.ScriptModule)]
    before = [dict(vars(child)) for child in modules]
    if not module.training:
        for child in modules:
            child.training = True
    try:
        yield
    finally:
        for child, attributes in zip(modules, before, strict=True):
            vars(child).clear()
            vars(child).update(attributes)


def trains(parameters: Iterable[Tensor], trained: Collection[int] | None) -> bool:
    """Whether one of some parameters requires a gradient, and an optimizer has it.

    Args:
        parameters: the parameters.
        trained: ids of the parameters that optimizers have; None if they are not known yet.
    """
    return any(each.requires_grad and (trained is None or id(each) in trained) for each in parameters)


def names_of_tensors(module: nn.Module) -> dict[int, list[str]]:
    """All names of each parameter and buffer, by its id."""
    names: dict[int, list[str]] = {}
    everything: list[tuple[str, Tensor]] = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in everything:  # tied weights have several names
        names.setdefault(id(tensor), []).append(name)
    return names


def _raised_at(error: Exception) -> str:
    """The last line of the user's code in a traceback."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(_NOT_THE_USERS):
            return f" at {frame.filename}:{frame.lineno} ({frame.line})"
    return ""
