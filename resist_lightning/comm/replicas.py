"""Averages the gradients of a worker's members in every step, by torch's `DistributedDataParallel`.

DDP's reducer overlaps with the backward pass and is bound to the parameters it was made with. So it is made anew after
each sync, for the parameters that this worker holds, and released before anything frees or replaces them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from resist_lightning.comm.byte_formulas import all_reduce_bytes
from resist_lightning.comm.collective import Collective
from resist_lightning.comm.member_collective import MemberCollective
from resist_lightning.comm.packing import pack, unpack
from resist_lightning.comm.tensors import is_known_to_backends, same

Result = TypeVar("Result")

_ORDERED = 2  # members whose sum does not depend on the order


class Replicas:
    """The members of a worker as replicas of one sub-network. With one member it does nothing.

    Args:
        module: the user's.
        collective: the workers and their members.
        partial: whether parameters leave and arrive between rounds.

    Attributes:
        find_unused_parameters: whether some parameters may get no gradient in a step; as in DDP.
    """

    def __init__(self, module: nn.Module, collective: Collective, *, partial: bool = False) -> None:
        self.find_unused_parameters = False
        self._module = module
        self._partial = partial
        self._calling = False
        self._collective = collective if isinstance(collective, MemberCollective) else None
        self._ddp: DistributedDataParallel | None = None
        self._reduced: list[nn.Parameter] = []  # those of the reducer
        self._norms: dict[nn.SyncBatchNorm, Any] = {}  # with their original groups
        if self._collective is not None:
            for norm in module.modules():
                if isinstance(norm, nn.SyncBatchNorm):
                    self._norms[norm] = norm.process_group
                    norm.process_group = self._collective.inside  # never over the slow links

    def call(self, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """Call the module, or a function that calls it, so that the backward pass of the result averages gradients.

        A plain loop trains by ``loss_function(engine.replicas.call(model, x), y).backward()``.

        Collective: every member must call this, in the same order.
        """
        if self._collective is None:
            return function(*args, **kwargs)
        ddp = self.reducing()
        if ddp is None:
            return function(*args, **kwargs)
        if ddp.will_sync_module_buffers() and self._collective.member == 0:
            size = sum(buffer.nbytes for buffer in ddp.modules_buffers)
            self._collective.inside_bytes["buffers"] += size * (self._collective.members - 1)
        self._calling = True
        try:
            result: Result = ddp(function, *args, **kwargs)
        finally:
            self._calling = False
        return result

    def call_with_backward(self, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """Call a function that runs backward passes itself, each after :meth:`prepare_backward`.

        Collective: every member must call this, in the same order.
        """
        ddp = self.reducing()
        if ddp is None:
            return function(*args, **kwargs)

        def call_only(*args: Any, **kwargs: Any) -> Result:
            result = function(*args, **kwargs)
            ddp.require_backward_grad_sync = False  # else DDP would prepare for a backward pass after this call
            return result

        try:
            return self.call(call_only, *args, **kwargs)
        finally:
            ddp.require_backward_grad_sync = True
            ddp.require_forward_param_sync = True  # or the next forward would not share the first member's buffers

    def prepare_backward(self, loss: Tensor) -> None:
        """Called before each backward pass inside of :meth:`call_with_backward`."""
        ddp = self._ddp
        if ddp is None or not ddp.require_backward_grad_sync:
            return
        self._check_finished()
        ddp.require_forward_param_sync = True
        ddp.reducer._rebuild_buckets()
        ddp.reducer.prepare_for_backward([loss] if ddp.find_unused_parameters else [])

    @contextmanager
    def local_gradients(self) -> Iterator[None]:
        """Inside, gradients accumulate on each member and are not averaged, as before the last of several batches."""
        # Within a training step parameters may be frozen for a moment: the reducer of this step must stay.
        ddp = self._ddp if self._calling else self.reducing()
        if ddp is None:
            yield
            return
        with ddp.no_sync():
            yield

    def reducing(self) -> DistributedDataParallel | None:
        """The reducer of this step's gradients; None where there is nothing to average.

        Collective in its first call after :meth:`release`, and after parameters were frozen or unfrozen: every member
        must call this.

        Raises:
            RuntimeError: if the previous step has left gradients unaveraged.
        """
        collective = self._collective
        if collective is None:
            return None
        self._check_finished()
        trained = [tensor for tensor in self._module.parameters() if tensor.requires_grad and not tensor.is_meta]
        if self._ddp is not None and list(map(id, trained)) == list(map(id, self._reduced)):
            return self._ddp
        self.release()  # parameters unknown to it would train on each member alone
        if not trained:
            return None
        caller = _Caller(self._module, hidden=self._partial)
        # Absent ones, and those that DDP could not broadcast: their values are shared at each sync only.
        ignored = [name for name, tensor in _named(caller) if tensor.is_meta or not is_known_to_backends(tensor.dtype)]
        # Not by DDP's own function, which marks the tensors too: they may be present in another round.
        vars(caller)["_ddp_params_and_buffers_to_ignore"] = ignored
        # A sum of three depends on its place in a bucket, and DDP reorders buckets after a step unless it searches for
        # unused parameters: a resumed round would then sum in another order than the round before it. NCCL chooses the
        # order by itself.
        ordered = collective.members > _ORDERED and dist.get_backend(collective.inside) == "gloo"
        self._ddp = DistributedDataParallel(
            caller,
            process_group=collective.inside,
            init_sync=False,  # a sync has left all members equal
            gradient_as_bucket_view=True,  # no second copy of the gradients
            find_unused_parameters=self.find_unused_parameters or ordered,
        )
        self._reduced = trained
        # A lambda, as DDP compares annotations, and ours are strings.
        self._ddp.register_comm_hook(collective, lambda state, bucket: _average(state, bucket))  # noqa: PLW0108
        return self._ddp

    def release(self) -> None:
        """Give up the reducer, which refers to the parameters. Sends nothing."""
        self._ddp = None
        self._reduced = []

    def end(self) -> None:
        """Called when training has ended. A module that refers to a group could be neither copied nor saved."""
        self.release()
        for norm, group in self._norms.items():
            norm.process_group = group
        self._norms = {}

    def _check_finished(self) -> None:
        """Raise if the last backward pass has left gradients unaveraged: DDP sends only buckets that are complete."""
        if self._ddp is None:
            return
        try:
            self._ddp._check_reducer_finalized()
        except RuntimeError as error:
            names = {id(parameter): name for name, parameter in self._module.named_parameters()}
            missing = [names[id(parameter)] for parameter in self._reduced if parameter.grad is None]
            raise RuntimeError(_UNFINISHED.format(", ".join(missing[:5]) or "some")) from error

    def end_steps(self) -> None:
        """Called before a sync: release the reducer, and share the first member's buffers, as DDP does in a forward.

        Collective: every member must call this, in the same order.

        Raises:
            RuntimeError: if the last step has left gradients unaveraged.
        """
        self._check_finished()
        self.release()
        collective = self._collective
        if collective is None:
            return
        buffers = [buffer for buffer in self._module.buffers() if not buffer.is_meta]
        if not buffers:
            return
        flats = pack(buffers, buffers[0].device)
        for flat in flats.values():
            collective.broadcast_inside(flat, "buffers")
        for buffer, first in zip(buffers, unpack(flats, buffers), strict=True):
            # A write would count as a change since the sync, and the tensors would be averaged again.
            if not same(buffer, first):
                buffer.copy_(first)


class _Caller(nn.Module):
    """The module that DDP wraps: it has the user's parameters, and its forward calls any function.

    DDP must see the call that computes the loss; and hooks on the user's module must not take that for its forward.

    Args:
        module: the user's.
        hidden: whether DDP is hidden from torch.compile, which would cut graphs at DDP's buckets and keep references to
            parameters, so that they could not leave.
    """

    def __init__(self, module: nn.Module, *, hidden: bool) -> None:
        super().__init__()
        self.module = module
        self._hidden = hidden

    @override
    def forward(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._hidden:
            return function(*args, **kwargs)
        ddp, DistributedDataParallel._active_ddp_module = DistributedDataParallel._active_ddp_module, None
        try:
            return function(*args, **kwargs)
        finally:
            DistributedDataParallel._active_ddp_module = ddp


def _named(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _average(collective: MemberCollective, bucket: Any) -> torch.futures.Future[Tensor]:
    """A communication hook of DDP: the mean, as without a hook, and its bytes counted."""
    collective.inside_bytes["gradients"] += all_reduce_bytes(bucket.buffer().nbytes, collective.members)
    return default_hooks.allreduce_hook(collective.inside, bucket)


_UNFINISHED = (
    "in the last step not all parameters of this worker got a gradient ({} got none), so its members have not averaged "
    "all gradients. If a step may leave out a part of the network, as with two alternating optimizers, set "
    "find_unused_parameters=True in the strategy (in a plain loop: engine.replicas.find_unused_parameters = True). "
    "Freeze and unfreeze parameters between two steps, not within training_step."
)
