"""AuxNet as a method of the common loop: the package's engine, and what can be learned from it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from experiments.accuracy.training import accuracy, make_optimizer
from experiments.auxnet.cases import Case, settings_of
from experiments.auxnet.methods import Method
from experiments.benchmarks.held_memory import held_bytes
from experiments.ist.examples import Prepared
from resist_lightning import Engine, StageConfig
from resist_lightning.methods.auxnet.step.guesses import NetworkGuesses, StoredGuesses


class Layered(Method):
    """Stages that train at the same time.

    Args:
        network: the whole network; a worker keeps its stage only.
        cuts: behind which modules it is cut.
        case: the settings.
        round_steps: steps between two looks of the workers at each other.
        uncounted: first steps, whose rounds tell nothing.
        example: a batch of images.
    """

    def __init__(
        self,
        network: nn.Module,
        cuts: tuple[str, ...],
        case: Case,
        *,
        round_steps: int,
        uncounted: int,
        example: Tensor,
    ) -> None:
        self.network = network
        self.optimizer = make_optimizer(network, case.lr)
        config = StageConfig(cuts=cuts or None, local_steps=round_steps, seed=case.seed, **settings_of(case))
        self.engine = Engine(network, [self.optimizer], config)
        self.first_round = -(-uncounted // round_steps)
        self.engine.prepare(example)
        self.engine.start()

    def step(self, x: Tensor, y: Tensor) -> None:
        """As every user of the engine writes it."""
        self.network.train()
        self.optimizer.zero_grad()
        functional.cross_entropy(self.network(x), y).backward()
        self.optimizer.step()
        self.engine.after_step()

    @contextmanager
    def full_model(self) -> Iterator[nn.Module]:
        """The stages in sequence, batch norm re-estimated."""
        with self.engine.full_model() as model:
            yield model

    def held_bytes(self) -> int:
        """Of the stage and of the auxiliary network."""
        own, guesses = held_bytes(self.network, self.optimizer), self._guesses
        return own + (held_bytes(guesses.network, guesses.optimizer) if isinstance(guesses, NetworkGuesses) else 0)

    def explained(self, data: Prepared) -> dict[str, Any]:
        """Test accuracies of what the full model is not; see `Method.explained`."""
        found = {"running": self._with_running_statistics(data), "aux_fed": self._fed_by_guesses(data)}
        told: list[Any] = [None] * self.engine.collective.workers
        dist.all_gather_object(told, found)
        return {key: next((one[key] for one in told if one[key] is not None), None) for key in found}

    def told(self) -> dict[str, Any]:
        """Of the rounds behind the warm-up, and of a typical step. Collective: every worker must call this."""
        guesses, counted, summary = self._guesses, self.engine.collective.sent_bytes, self.engine.sync.summary()
        network = guesses.network if isinstance(guesses, NetworkGuesses) else nn.Identity()
        rounds = [metrics for number, metrics in summary.get("rounds", []) if number >= self.first_round]
        return {
            "aux_parameters": sum(parameter.numel() for parameter in network.parameters()),
            "stored_bytes": self.engine.sync.trainee.held_bytes if isinstance(guesses, StoredGuesses) else 0,
            "sent_by_step": (counted["boundary"] + counted["output"]) / self.engine.clock.total_steps,
            "mismatch": _mismatches(rounds[-1]) if rounds else [],
            "predicted": _median(rounds, "auxnet/speedup_predicted"),
            "measured_by_engine": _median(rounds, "auxnet/speedup_measured"),
            "timeline": summary.get("timeline", []),
        }

    @property
    def _guesses(self) -> Any:
        trainee = self.engine.sync.trainee
        return trainee.guesses if trainee is not None else None

    def _with_running_statistics(self, data: Prepared) -> float | None:
        """On worker 0."""
        own = {name: tensor.clone() for name, tensor in self.network.named_buffers() if not tensor.is_meta}
        worker = self.engine.collective.worker
        told: list[Any] | None = [None] * self.engine.collective.workers if worker == 0 else None
        dist.gather_object(own, told)
        with self.full_model() as model:
            if told is None:
                return None
            whole = copy.deepcopy(model)
            whole.load_state_dict({name: tensor for buffers in told for name, tensor in buffers.items()}, strict=False)
            return accuracy(whole, data.test)

    def _fed_by_guesses(self, data: Prepared) -> float | None:
        """On the last worker: the last stage behind its auxiliary network, with the statistics of its training."""
        layout, worker = self.engine.layout, self.engine.collective.worker
        if worker != layout.workers - 1 or not isinstance(self._guesses, NetworkGuesses):
            return None
        fed = _Fed(self._guesses.network, layout.chain.stage(*layout.units(worker)))
        found = accuracy(fed, data.test)
        fed.train()
        return found


def _mismatches(metrics: dict[str, float]) -> list[float]:
    return [value for name, value in sorted(metrics.items()) if name.startswith("auxnet/mismatch_")]


def _median(rounds: list[dict[str, float]], name: str) -> float | None:
    values = [metrics[name] for metrics in rounds if name in metrics]
    return median(values) if values else None


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
