"""The methods, each as a worker's side of one and the same loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn import functional

from experiments.accuracy.training import make_optimizer, set_rate
from experiments.auxnet.stages import stages
from experiments.benchmarks.held_memory import held_bytes
from experiments.ist.examples import Prepared

SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}


class Method(ABC):
    """A worker's part of a training. Every worker calls the same in the same order."""

    optimizer: torch.optim.Optimizer

    @abstractmethod
    def step(self, x: Tensor, y: Tensor) -> None:
        """One step on a batch, the same on all workers."""

    @abstractmethod
    def full_model(self) -> AbstractContextManager[nn.Module]:
        """The whole network as it is now, to be evaluated by worker 0; training goes on behind it."""

    @abstractmethod
    def held_bytes(self) -> int:
        """Bytes of parameters, gradients and optimizer state that this worker holds."""

    def set_rate(self, lr: float) -> None:
        """The learning rate of the steps to come."""
        set_rate(self.optimizer, lr)

    def explained(self, data: Prepared) -> dict[str, Any]:
        """Test accuracies in per cent, of what the full model is not: with the ``running`` statistics of the training,
        and of the last stage, ``aux_fed``. None where there is no such thing."""
        return {"running": None, "aux_fed": None}

    def told(self) -> dict[str, Any]:
        """What only this method knows of this worker, when the training is over."""
        return {"aux_parameters": 0, "stored_bytes": 0, "sent_by_step": None}


class Serial(Method):
    """Back-propagation in one process.

    Args:
        network: is trained in place.
        lr: learning rate at the start.
    """

    def __init__(self, network: nn.Module, lr: float) -> None:
        self.network = network
        self.optimizer = make_optimizer(network, lr)

    def step(self, x: Tensor, y: Tensor) -> None:
        """As every user writes it."""
        self.network.train()
        self.optimizer.zero_grad()
        functional.cross_entropy(self.network(x), y).backward()
        self.optimizer.step()

    @contextmanager
    def full_model(self) -> Iterator[nn.Module]:
        """The network itself."""
        yield self.network

    def held_bytes(self) -> int:
        """Of everything."""
        return held_bytes(self.network, self.optimizer)


class Pipelined(Method):
    """torch's own pipeline: the batch in micro-batches, which follow each other through the stages.

    Args:
        make_network: makes the whole network, always the same; a worker keeps its stage only.
        cuts: behind which modules it is cut.
        lr: learning rate at the start.
        schedule: a key of `SCHEDULES`.
        micro_batches: of a step.
    """

    def __init__(
        self, make_network: Callable[[], nn.Module], cuts: tuple[str, ...], lr: float, schedule: str, micro_batches: int
    ) -> None:
        self.worker, self.workers = dist.get_rank(), dist.get_world_size()
        self.make_network = make_network
        self.network = make_network()
        parts = stages(self.network, cuts)
        self.stage = parts[self.worker]
        for part in parts:
            if part is not self.stage:
                part.to("meta")
        self.optimizer = make_optimizer(self.stage, lr)
        stage = PipelineStage(self.stage, self.worker, self.workers, torch.device("cpu"))
        self.schedule = SCHEDULES[schedule](stage, micro_batches, loss_fn=functional.cross_entropy)

    def step(self, x: Tensor, y: Tensor) -> None:
        """The first stage is given the images, the last one the labels."""
        self.stage.train()
        self.optimizer.zero_grad()
        images = (x,) if self.worker == 0 else ()
        target = y if self.worker == self.workers - 1 else None
        self.schedule.step(*images, target=target, return_outputs=False)
        self.optimizer.step()

    @contextmanager
    def full_model(self) -> Iterator[nn.Module]:
        """Worker 0's copy of all stages; of the other workers, their own stage."""
        named = [*self.network.named_parameters(), *self.network.named_buffers()]
        own = {name: tensor.detach() for name, tensor in named if not tensor.is_meta}
        told: list[Any] | None = [None] * self.workers if self.worker == 0 else None
        dist.gather_object(own, told)
        if told is None:
            yield self.network
            return
        whole = self.make_network()
        whole.load_state_dict({name: tensor for state in told for name, tensor in state.items()})
        yield whole

    def held_bytes(self) -> int:
        """Of the stage."""
        return held_bytes(self.stage, self.optimizer)
