"""The methods as steps of one common loop, a worker's side of each; and a network cut into stages."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn import functional

from experiments.auxnet.cases import Case, settings_of
from experiments.harness.memory import held_bytes
from experiments.trainers import Prepared, accuracy, make_optimizer, set_rate, sgd_step
from resist_lightning import Engine, StageConfig
from resist_lightning.methods.auxnet.network.chain import find_chain
from resist_lightning.methods.auxnet.step.guesses import NetworkGuesses, StoredGuesses

SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}


def stages(network: nn.Module, cuts: Sequence[str]) -> list[nn.Module]:
    """The network's own modules, as one module for each stage; it is cut behind the modules of these names."""
    chain = find_chain(network)
    bounds = [0, *chain.positions(cuts), len(chain.units)]
    return [chain.stage(first, last) for first, last in pairwise(bounds)]


def parameters_of(network: nn.Module, cuts: Sequence[str]) -> list[int]:
    """Number of parameters of each stage."""
    return [sum(parameter.numel() for parameter in stage.parameters()) for stage in stages(network, cuts)]


def boundary_elements(network: nn.Module, cuts: Sequence[str], input_shape: Sequence[int]) -> list[int]:
    """Number of elements of one sample at each cut; the network must be on the meta device."""
    found: list[int] = []  # the cuts are in the order in which they are computed
    for name in cuts:
        network.get_submodule(name).register_forward_hook(lambda _, __, made: found.append(made[0].numel()))
    network(torch.empty(2, *input_shape, device="meta"))
    return found


class Method(ABC):
    """A worker's part of a training. Every worker makes the same calls in the same order."""

    optimizer: torch.optim.Optimizer

    @abstractmethod
    def step(self, x: Tensor, y: Tensor) -> None:
        """Take a step on a batch, the same on all workers."""

    @abstractmethod
    def full_model(self) -> AbstractContextManager[nn.Module]:
        """The whole network as it is now, to be evaluated by worker 0; training continues afterwards."""

    @abstractmethod
    def held_bytes(self) -> int:
        """Bytes of parameters, gradients and optimizer state that this worker holds."""

    def set_rate(self, lr: float) -> None:
        """Set the learning rate of the next steps."""
        set_rate(self.optimizer, lr)

    def explained(self, data: Prepared) -> dict[str, Any]:
        """Test accuracies in per cent of other models than the full one: with the ``running`` statistics of the
        training, and of the last stage, ``aux_fed``. None where there is no such model."""
        return {"running": None, "aux_fed": None}

    def told(self) -> dict[str, Any]:
        """This worker's results that only this method has, after the training."""
        return {"aux_parameters": 0, "stored_bytes": 0, "sent_by_step": None}


class Serial(Method):
    """Back-propagation in one process; the network is trained in place."""

    def __init__(self, network: nn.Module, lr: float) -> None:
        self.network = network
        self.optimizer = make_optimizer(network, lr)

    def step(self, x: Tensor, y: Tensor) -> None:
        sgd_step(self.network.train(), self.optimizer, x, y)

    @contextmanager
    def full_model(self) -> Iterator[nn.Module]:
        yield self.network

    def held_bytes(self) -> int:
        return held_bytes(self.network, self.optimizer)


class Pipelined(Method):
    """torch's own pipeline: the batch in micro-batches, which follow each other through the stages.

    Every worker makes the whole network, always the same, and keeps its stage only.
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
                part.to("meta")  # keeps shapes, frees memory: the memory that a worker holds is measured
        self.optimizer = make_optimizer(self.stage, lr)
        stage = PipelineStage(self.stage, self.worker, self.workers, torch.device("cpu"))
        self.schedule = SCHEDULES[schedule](stage, micro_batches, loss_fn=functional.cross_entropy)

    def step(self, x: Tensor, y: Tensor) -> None:
        """Take a step: the first stage is given the images, the last one the labels."""
        self.stage.train()
        self.optimizer.zero_grad()
        # Every worker has the whole batch, as the data are the same; torch wants it at the two ends only.
        images = (x,) if self.worker == 0 else ()
        target = y if self.worker == self.workers - 1 else None
        self.schedule.step(*images, target=target, return_outputs=False)
        self.optimizer.step()

    @contextmanager
    def full_model(self) -> Iterator[nn.Module]:
        """Worker 0's copy of all stages; on the other workers, their own stage."""
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
        return held_bytes(self.stage, self.optimizer)


class Layered(Method):
    """Stages that train at the same time: of the whole network a worker keeps its stage only.

    Its workers run a handshake every ``round_steps``; rounds of the uncounted first steps are ignored.
    """

    def __init__(
        self, network: nn.Module, cuts: tuple[str, ...], case: Case, *, round_steps: int, uncounted: int, example: Tensor
    ) -> None:  # fmt: skip
        self.network = network
        self.optimizer = make_optimizer(network, case.lr)
        config = StageConfig(cuts=cuts or None, local_steps=round_steps, seed=case.seed, **settings_of(case))
        self.engine = Engine(network, [self.optimizer], config)
        self.first_round = -(-uncounted // round_steps)  # rounded up: a round with an uncounted step does not count
        self.engine.prepare(example)
        self.engine.start()

    def step(self, x: Tensor, y: Tensor) -> None:
        """Take a step as every user of the engine does."""
        sgd_step(self.network.train(), self.optimizer, x, y)
        self.engine.after_step()

    @contextmanager
    def full_model(self) -> Iterator[nn.Module]:
        """The stages in sequence, batch norm re-estimated."""
        with self.engine.full_model() as model:
            yield model

    def held_bytes(self) -> int:
        """Bytes of the stage, of the auxiliary network, and of the copies for late gradients."""
        own, guesses = held_bytes(self.network, self.optimizer), self._guesses
        worker = self.engine.sync.stage_worker
        if worker is not None and worker.delayed is not None:
            own += worker.delayed.held_bytes
        return own + (held_bytes(guesses.network, guesses.optimizer) if isinstance(guesses, NetworkGuesses) else 0)

    def explained(self, data: Prepared) -> dict[str, Any]:
        """Test accuracies of other models than the full one; see `Method.explained`."""
        found = {"running": self._with_running_statistics(data), "aux_fed": self._fed_by_guesses(data)}
        told: list[Any] = [None] * self.engine.collective.workers
        dist.all_gather_object(told, found)
        # Each is known to one worker: the first with the whole network, or the last with the auxiliary one.
        return {key: next((one[key] for one in told if one[key] is not None), None) for key in found}

    def told(self) -> dict[str, Any]:
        """Metrics of the rounds after the warm-up, and of a typical step. Collective: every worker must call this."""
        guesses = self._guesses
        counted = self.engine.collective.sent_bytes
        summary = self.engine.sync.summary()
        network = guesses.network if isinstance(guesses, NetworkGuesses) else nn.Identity()
        rounds = [metrics for number, metrics in summary.get("rounds", []) if number >= self.first_round]
        last = rounds[-1] if rounds else {}
        speed_up = "auxnet/speedup_predicted"
        predicted = [metrics[speed_up] for metrics in rounds if speed_up in metrics]
        return {
            "aux_parameters": sum(parameter.numel() for parameter in network.parameters()),
            "stored_bytes": guesses.held_bytes if isinstance(guesses, StoredGuesses) else 0,
            "sent_by_step": (counted["boundary"] + counted["output"]) / self.engine.clock.total_steps,
            "mismatch": [value for name, value in sorted(last.items()) if name.startswith("auxnet/mismatch_")],
            "predicted": median(predicted) if predicted else None,
            "timeline": summary.get("timeline", []),
        }

    @property
    def _guesses(self) -> Any:
        worker = self.engine.sync.stage_worker
        return worker.guesses if worker is not None else None

    def _with_running_statistics(self, data: Prepared) -> float | None:
        """Test accuracy with the training's running statistics; on worker 0."""
        own = {name: tensor.clone() for name, tensor in self.network.named_buffers() if not tensor.is_meta}
        worker = self.engine.collective.worker
        told: list[Any] | None = [None] * self.engine.collective.workers if worker == 0 else None
        dist.gather_object(own, told)
        with self.full_model() as model:
            if told is None:  # all workers assemble the model, and worker 0 evaluates it
                return None
            whole = copy.deepcopy(model)  # the engine's own must keep its statistics
            whole.load_state_dict({name: tensor for buffers in told for name, tensor in buffers.items()}, strict=False)
            return accuracy(whole, data.test)

    def _fed_by_guesses(self, data: Prepared) -> float | None:
        """The last stage's test accuracy, fed by its auxiliary network, with its running statistics; on the last
        worker."""
        layout, worker = self.engine.layout, self.engine.collective.worker
        if worker != layout.workers - 1 or not isinstance(self._guesses, NetworkGuesses):
            return None
        fed = _Fed(self._guesses.network, layout.chain.stage(*layout.units(worker)))
        found = accuracy(fed, data.test)
        fed.train()
        return found


class _Fed(nn.Module):
    """A stage behind an auxiliary network."""

    def __init__(self, aux: nn.Module, stage: nn.Module) -> None:
        super().__init__()
        self.aux = aux
        self.stage = stage

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, H, W) to logits."""
        guess, _ = self.aux(x)
        logits: Tensor = self.stage(guess)
        return logits
