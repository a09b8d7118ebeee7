"""Reference simulator of IST: S workers in one process, as plain as the paper, to test the engine against.

There is one full model; a round cuts a subnet out of it for every worker, and a sync writes the subnets back. With the
engine it shares the partition, the choice of layers and recalibration, and nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from resist_lightning.comm.tensors import named_tensors
from resist_lightning.comm.unit_vectors import normalise, unit_vectors
from resist_lightning.methods.config import NormPolicy
from resist_lightning.methods.ist.config import NeuronConfig
from resist_lightning.methods.ist.network.discovery import find_neurons
from resist_lightning.methods.ist.partition import draw_neurons
from resist_lightning.methods.simulation import SimulatedWorker, clock_of, mean_or_maximum, recalibrate_together
from resist_lightning.schedule.partition import Partition
from resist_lightning.state.batch_norm import BatchStatistics, norms_with_statistics
from resist_lightning.state.input_recorder import InputRecorder

Slot: TypeAlias = tuple[int, str, str]
"""Number of an optimizer, name of a parameter, key of the state that the optimizer has of it."""


class NeuronSimulator:
    """Simulates S workers that train by IST; used as :class:`~resist_lightning.Simulator`.

    Args:
        module: the network; it is copied, not changed.
        make_optimizers: builds the optimizer(s) of a copy.
        config: the settings, as for the engine.
        workers: number of simulated workers, at least 1.

    Raises:
        LayerSelectionError: if the layers cannot be cut as asked.
    """

    def __init__(
        self,
        module: nn.Module,
        make_optimizers: Callable[[nn.Module], Optimizer | Sequence[Optimizer]],
        config: NeuronConfig,
        workers: int,
    ) -> None:
        self.config = config
        self.neurons = find_neurons(module, config.layers)
        self._template = copy.deepcopy(module)
        self.full: dict[str, Tensor] = {}
        for name, tensor in named_tensors(module).items():
            self.full[name] = tensor.detach().clone()
        self.workers = []
        for _ in range(workers):
            self.workers.append(self._make_worker(copy.deepcopy(module), make_optimizers))
        self.clock = clock_of(config, self.workers)
        self._hooks: list[RemovableHandle] = []
        self._travelling: dict[Slot, Tensor] = {}
        self._begin_round([{} for _ in self.workers])

    def after_step(self) -> None:
        """Count a local step of all workers, and sync if the round is complete."""
        self.clock.tick()
        if self.clock.due:
            self.full = self._written_back()
            # Read before the partition changes with the round.
            states = [self._state_of(index) for index in range(len(self.workers))]
            self.clock.next_round()
            self._begin_round(states)

    def full_model(self, batch_norm: NormPolicy | None = None) -> nn.Module:
        """A copy of the full model, with batch-norm statistics by the policy.

        Args:
            batch_norm: another policy than that of the settings, to compare on one training.
        """
        batch_norm = batch_norm or self.config.batch_norm
        # As if the round ended here; the workers are not touched.
        full, state = copy.deepcopy(self._template), self._written_back()
        with torch.no_grad():
            for name, tensor in named_tensors(full).items():
                tensor.copy_(state[name])
        # Before the first step there are no inputs to estimate statistics on.
        recorded = all(worker.recorder.calls for worker in self.workers)
        if batch_norm == "batch":
            BatchStatistics(norms_with_statistics(full).values())
        elif batch_norm == "recalibrate" and len(self.workers) > 1 and recorded:
            recalibrate_together(self.workers, full)
        return full

    def partitions(self) -> tuple[Partition, ...]:
        """The partitions of the hidden layers in this round."""
        widths = [layer.width for layer in self.neurons.layers]
        return draw_neurons(widths, len(self.workers), self.config.seed, self.clock.round)

    def _make_worker(self, module: nn.Module, make_optimizers: Callable[[nn.Module], Any]) -> SimulatedWorker:
        made = make_optimizers(module)
        optimizers = [made] if isinstance(made, Optimizer) else list(made)
        return SimulatedWorker(module, optimizers, (), InputRecorder(module, self.config.recalibration_batches))

    def _begin_round(self, states: Sequence[dict[Slot, Tensor]]) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for index, worker in enumerate(self.workers):
            for name, tensor in worker.tensors().items():
                # Before the data: torch refuses a gradient of another shape.
                tensor.grad = None
                index_in_full = self._index(name, index)
                tensor.data = self.full[name][index_in_full].clone()
            for size in self.neurons.sizes:
                held = self.partitions()[size.layer].held[index]
                width = len(held) * size.repeat
                module = worker.module.get_submodule(size.module)
                setattr(module, size.attribute, (width,) if size.attribute == "normalized_shape" else width)
            self._give_state(worker, index, states[index])
            self._scale(worker, index)

    def _index(self, name: str, worker: int) -> Any:
        """The index of a worker's slice in the full tensor."""
        cut = self.neurons.cuts.get(name)
        if cut is None:
            return ...
        partitions = self.partitions()
        index: list[Any] = [slice(None), slice(None)]
        if cut.rows is not None:
            index[0] = torch.tensor(partitions[cut.rows].held[worker])
        if cut.columns is None:
            return index[0]
        held = torch.tensor(partitions[cut.columns].held[worker])
        first = held.unsqueeze(1) * cut.repeat
        index[1] = (first + torch.arange(cut.repeat)).flatten()
        # As a column, so that every row meets every column.
        if cut.rows is not None:
            index[0] = index[0].unsqueeze(1)
        return tuple(index)

    def _written_back(self) -> dict[str, Tensor]:
        """The full model, with the weights that the workers have trained."""
        full = {name: tensor.clone() for name, tensor in self.full.items()}
        copies = [worker.tensors() for worker in self.workers]
        for name, tensor in full.items():
            if name in self.neurons.cuts:
                for worker, tensors in enumerate(copies):
                    tensor[self._index(name, worker)] = tensors[name].detach()
            else:
                tensor.copy_(mean_or_maximum([tensors[name] for tensors in copies]))
        if len(copies) > 1:
            # The mean of unit vectors is shorter than 1.
            vectors = set(unit_vectors(self.workers[0].module)) - set(self.neurons.cuts)
            normalise(tensor for name, tensor in full.items() if name in vectors)
        return full

    def _state_of(self, index: int) -> dict[Slot, Tensor]:
        """Optimizer state of a worker's neurons, in tensors of the full shapes; nothing where it is reset."""
        if self.config.momentum == "reset":
            return {}
        # Under "travel" all workers write into the same tensors.
        state: dict[Slot, Tensor] = self._travelling if self.config.momentum == "travel" else {}
        worker = self.workers[index]
        for name, parameter in worker.module.named_parameters():
            if name not in self.neurons.cuts:
                continue
            if not parameter.requires_grad:
                # A frozen parameter's state does not move along, and would meet other neurons.
                for slot in [slot for slot in state if slot[1] == name]:
                    del state[slot]
                for optimizer in worker.optimizers:
                    optimizer.state.pop(parameter, None)
                continue
            for number, optimizer in enumerate(worker.optimizers):
                for key, value in optimizer.state.get(parameter, {}).items():
                    if isinstance(value, Tensor) and value.dim():
                        # Zeros where nobody has trained yet.
                        zeros = torch.zeros_like(self.full[name])
                        whole = state.setdefault((number, name, key), zeros)
                        whole[self._index(name, index)] = value
        return state

    def _give_state(self, worker: SimulatedWorker, index: int, state: dict[Slot, Tensor]) -> None:
        parameters = dict(worker.module.named_parameters())
        if self.config.momentum == "reset":
            worker.restart_optimizers()
        for (number, name, key), whole in state.items():
            slots = worker.optimizers[number].state[parameters[name]]
            slots[key] = whole[self._index(name, index)].clone()

    def _scale(self, worker: SimulatedWorker, index: int) -> None:
        """Scale the inputs of layers that sum over fewer neurons, where no norm follows."""
        for name, layer in self.neurons.rescaled:
            held = self.partitions()[layer].held[index]
            hook = partial(_scaled, self.neurons.layers[layer].width / len(held))
            module = worker.module.get_submodule(name)
            self._hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))


def _scaled(factor: float, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    positional = tuple(value * factor for value in args)
    named = {key: value * factor for key, value in kwargs.items()}
    return positional, named
