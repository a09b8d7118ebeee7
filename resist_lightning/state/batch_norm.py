"""Gives the full model its batch-norm statistics, by one of three policies.

Running statistics are gathered in thin, unscaled sub-networks and need not fit the scaled full network. So they are
re-estimated on inputs that the network saw in training (``recalibrate``), taken as they are (``running``), or replaced
by the statistics of each evaluated batch (``batch``, as in the paper's CIFAR code).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from resist_lightning.comm.tensors import same
from resist_lightning.state.compiled import uncompiled
from resist_lightning.state.host_copies import copied

Call: TypeAlias = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def norms_with_statistics(module: nn.Module) -> dict[str, _BatchNorm]:
    """The batch-norm layers that keep running statistics, by name."""
    found = {}
    for name, child in module.named_modules():
        if isinstance(child, _BatchNorm) and child.running_mean is not None and child.running_var is not None:
            found[name] = child
    return found


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
        if id(buffer) not in kept and not same(buffer, old):
            buffer.copy_(old)
    return estimated


def _replay(
    module: nn.Module, calls: Iterable[Call], forward_context: Callable[[], AbstractContextManager[Any]]
) -> None:
    """Run recorded calls again."""
    # With a cumulative mean, batch norm reads a counter: torch.compile breaks the graph there, or refuses.
    with torch.no_grad(), forward_context(), uncompiled(module):
        for called, args, kwargs in calls:
            try:
                called(*copied(args), **copied(kwargs))
            except RuntimeError as error:
                names = {child: name for name, child in module.named_modules()}
                raise RuntimeError(_CANNOT_REPLAY.format(names[called])) from error


_CANNOT_REPLAY = (
    "batch norm cannot be re-estimated: {!r} of the full model fails on an input that it had in training. Where "
    "neurons are dealt out, an input recorded inside the network has the neurons of one worker only: call the "
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
