"""Gives the full model its batch-norm statistics, by one of three policies.

Running statistics are gathered in thin, unscaled sub-networks and need not fit the scaled full network. So they are
re-estimated on inputs that the network saw in training (``recalibrate``), taken as they are (``running``), or replaced
by the statistics of each evaluated batch (``batch``, as in the paper's CIFAR code).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

Call: TypeAlias = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def norms_with_statistics(module: nn.Module) -> dict[str, _BatchNorm]:
    """The batch-norm layers that keep running statistics, by name."""
    found = {}
    for name, child in module.named_modules():
        if isinstance(child, _BatchNorm) and child.running_mean is not None and child.running_var is not None:
            found[name] = child
    return found


class InputRecorder:
    """Records the inputs of the last training batches, to re-estimate batch-norm statistics on them.

    It records the outermost module that contains a batch norm and is called: the network, or the user's whole module
    where ``training_step`` calls ``self(x)``.

    Args:
        module: the user's module.
        calls: number of calls to record; each keeps its batch in memory, of the host.

    Attributes:
        calls: the recorded calls, oldest first.
        still: names of the batch norms that were in evaluation mode in the last call: their statistics do not train.
    """

    def __init__(self, module: nn.Module, calls: int) -> None:
        self.calls: deque[Call] = deque(maxlen=calls)
        self.still: frozenset[str] = frozenset()
        self._module = module
        self._norms = norms_with_statistics(module)
        self._outermost: nn.Module | None = None  # whose forward runs now
        self._handles: list[RemovableHandle] = []
        for name in _containers(self._norms):
            watched = module.get_submodule(name)
            # First, so that it sees what the user's code gave; and last even after an error, so that none stays open.
            enter = watched.register_forward_pre_hook(_OnlyHere(self._enter), prepend=True, with_kwargs=True)
            leave = watched.register_forward_hook(_OnlyHere(self._leave), always_call=True)
            self._handles += [enter, leave]

    def state_dict(self) -> dict[str, Any] | None:
        """The recorded inputs; None if one of them cannot be written to a file that is safe to load."""
        names = {child: name for name, child in self._module.named_modules()}
        calls = [[names[module], list(args), kwargs] for module, args, kwargs in self.calls]
        on_cpu = _moved(calls, torch.device("cpu"))
        return {"calls": on_cpu, "still": sorted(self.still)} if _plain(on_cpu) else None

    def load_state_dict(self, own: dict[str, Any], device: torch.device) -> None:
        """Load what :meth:`state_dict` returned."""
        for name, args, kwargs in _moved(own["calls"], device):
            self.calls.append((self._module.get_submodule(name), _recorded(tuple(args)), _recorded(kwargs)))
        self.still = frozenset(own["still"])

    def remove(self) -> None:
        """Remove the hooks and free the inputs."""
        for handle in self._handles:
            handle.remove()
        self.calls.clear()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # First of all, as torch.compile cannot trace what follows, and blocks inside are compiled one by one.
        if self._outermost is not None:
            return
        # A forward inside a backward is activation checkpointing, which runs a part of the network a second time.
        if torch._C._current_graph_task_id() != -1:
            return
        self._outermost = module
        # Tracers call a forward with inputs that have no values.
        traced = torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None
        if module.training and torch.is_grad_enabled() and not traced:
            self.calls.append((module, _recorded(args), _recorded(kwargs)))
            self.still = frozenset(name for name, norm in self._norms.items() if not norm.training)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if module is self._outermost:
            self._outermost = None


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


def recalibrate(
    module: nn.Module,
    calls: Iterable[Call],
    forward_context: Callable[[], AbstractContextManager[Any]],
    still: Collection[str] = (),
) -> list[Tensor]:
    """Re-estimate the running statistics of ``module`` as the plain mean over recorded calls.

    Everything but batch norm runs in evaluation mode, without dropout and its random numbers. Layers that the calls do
    not reach, and those named in ``still``, keep their statistics.

    Returns:
        The running means and variances of all other layers.

    Raises:
        RuntimeError: if the full model cannot take an input that a part of it had in training.
    """
    norms = [norm for name, norm in norms_with_statistics(module).items() if name not in still]
    # All that is changed below is restored afterwards, in the buffers of other modules too: they may count their calls.
    modes = {child: child.training for child in module.modules()}
    momenta = {norm: norm.momentum for norm in norms}
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    module.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative mean instead of an exponential one
        norm.train()
    _replay(module, calls, forward_context)
    for child, mode in modes.items():
        child.training = mode
    estimated: list[Tensor] = []
    kept: set[int] = set()
    for norm in norms:
        norm.momentum = momenta[norm]
        statistics = [_statistic(norm, name) for name in ("running_mean", "running_var")]
        estimated += statistics
        # Without a call there is no estimate.
        if int(_statistic(norm, "num_batches_tracked")) > 0:
            kept.update(map(id, statistics))
    for buffer, old in before:
        if id(buffer) not in kept and not torch.equal(buffer, old):
            buffer.copy_(old)
    return estimated


def _replay(
    module: nn.Module, calls: Iterable[Call], forward_context: Callable[[], AbstractContextManager[Any]]
) -> None:
    """Run recorded calls again."""
    with torch.no_grad(), forward_context(), _not_compiled(module):
        for called, args, kwargs in calls:
            try:
                called(*_copied(args), **_copied(kwargs))
            except RuntimeError as error:
                names = {child: name for name, child in module.named_modules()}
                raise RuntimeError(_CANNOT_REPLAY.format(names[called])) from error


def _not_compiled(module: nn.Module) -> AbstractContextManager[Any]:
    """Inside, compiled modules of ``module`` run uncompiled."""
    # With a cumulative mean, batch norm reads a counter: torch.compile breaks the graph there, or refuses.
    children = list(module.modules())
    if any(child._compiled_call_impl is not None or "_orig_mod" in child._modules for child in children):
        stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return stance
    return nullcontext()


_CANNOT_REPLAY = (
    "batch norm cannot be re-estimated: {!r} of the full model fails on an input that it had in training. Where "
    "neurons are dealt out, what one part of a network gives to another has those of one worker only: call the "
    "network as a whole in training, e.g. self(x), or choose batch_norm='running' or 'batch'."
)


class BatchStatistics:
    """Lets batch norm normalise each batch by its own statistics, in evaluation too, without changing its buffers."""

    def __init__(self, norms: Iterable[_BatchNorm]) -> None:
        self._norms = list(norms)
        for norm in self._norms:
            norm.__dict__["forward"] = partial(_normalise_by_batch, norm)

    def remove(self) -> None:
        """Restore the layers' own forward."""
        for norm in self._norms:
            remove_batch_statistics(norm)
        self._norms = []


def remove_batch_statistics(module: nn.Module) -> None:
    """Restore the own forward of all layers that :class:`BatchStatistics` has changed, also in a copy of them."""
    for child in module.modules():
        forward = vars(child).get("forward")
        if isinstance(forward, partial) and forward.func is _normalise_by_batch:
            del child.__dict__["forward"]


def _normalise_by_batch(norm: _BatchNorm, x: Tensor) -> Tensor:
    return nn.functional.batch_norm(x, None, None, norm.weight, norm.bias, training=True, eps=norm.eps)


def _statistic(norm: _BatchNorm, name: str) -> Tensor:
    statistic = getattr(norm, name)
    assert isinstance(statistic, Tensor)
    return statistic


def _copied(values: Any) -> Any:
    """Copies of all tensors: a forward may change its input in place, and a loader may reuse its memory."""

    def copied(value: Any) -> Any:
        if isinstance(value, _OnHost):
            return value.back()
        return value.detach().clone() if isinstance(value, Tensor) else value

    return tree_map(copied, values)


def _recorded(values: Any) -> Any:
    """As :func:`_copied`, with what lies on a GPU on the host."""
    copies = _copied(values)
    return tree_map(lambda value: _OnHost(value) if isinstance(value, Tensor) and value.is_cuda else value, copies)


def _moved(values: Any, device: torch.device) -> Any:
    def moved(value: Any) -> Any:
        if isinstance(value, _OnHost):
            value = value.back()
        return value.to(device) if isinstance(value, Tensor) else value

    return tree_map(moved, values)


class _OnHost:
    """A GPU's tensor in memory of the host, copied there while the GPU goes on computing."""

    def __init__(self, tensor: Tensor) -> None:
        self._device = tensor.device
        self._values = torch.empty_like(tensor, device="cpu", pin_memory=True)
        stream = _copying_stream(tensor.device)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            self._values.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)  # its memory is used until then
        self._arrived = stream.record_event()

    def back(self) -> Tensor:
        """The tensor, on its device."""
        self._arrived.synchronize()
        return self._values.to(self._device, non_blocking=True)


@cache
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _plain(values: Any) -> bool:
    """Whether torch.load accepts the values with ``weights_only=True``."""
    return all(isinstance(leaf, Tensor | int | float | str | bytes | None) for leaf in tree_leaves(values))


def _containers(names: Iterable[str]) -> set[str]:
    """Names of all modules that contain one of these, and of the whole."""
    found = {""}
    for name in names:
        parts = name.split(".")
        found.update(".".join(parts[:end]) for end in range(1, len(parts)))
    return found
