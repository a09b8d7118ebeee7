"""Reference simulator of IST: S workers in one process, as plain as the paper, to test the engine against.

There is one full model; a round cuts a subnet out of it for every worker, and a sync writes the subnets back. With the
engine it shares the partition, the choice of layers and recalibration, and nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from resist_lightning.comm.tensors import named_tensors
from resist_lightning.comm.unit_vectors import normalise, unit_vectors
from resist_lightning.methods.config import NormPolicy
from resist_lightning.methods.ist.config import NeuronConfig, make_schedule, plan_end
from resist_lightning.methods.ist.network.discovery import find_neurons
from resist_lightning.methods.simulation import SimulatedWorker, clock_of, mean_or_maximum, recalibrate_together
from resist_lightning.schedule.partition import Partition
from resist_lightning.state.batch_norm import BatchStatistics, norms_with_statistics
from resist_lightning.state.input_recorder import InputRecorder
from resist_lightning.state.optimizer_state import ids_of_parameters

Slot: TypeAlias = tuple[int, str, str]
"""Number of an optimizer, name of a parameter, key in its optimizer state."""


class NeuronSimulator:
    """Simulates S workers that train by IST; used as :class:`~resist_lightning.Simulator`.

    Args:
        module: the network; it is copied, not changed.
        make_optimizers: builds the optimizer(s) of a copy.
        config: the settings, as for the engine.
        workers: number of simulated workers, at least 1.
        total_steps: local steps of the run, where the settings need them (``finish_rounds``).

    Raises:
        LayerSelectionError: if the layers cannot be cut as asked.
    """

    def __init__(
        self,
        module: nn.Module,
        make_optimizers: Callable[[nn.Module], Optimizer | Sequence[Optimizer]],
        config: NeuronConfig,
        workers: int,
        total_steps: int | None = None,
    ) -> None:
        self.config = config
        self._template = copy.deepcopy(module)
        self.full: dict[str, Tensor] = {}
        for name, tensor in named_tensors(module).items():
            self.full[name] = tensor.detach().clone()
        self.workers = []
        for _ in range(workers):
            self.workers.append(self._make_worker(copy.deepcopy(module), make_optimizers))
        self.neurons = find_neurons(module, config.layers, self._trained(module))
        self.config = config = config.for_optimizers(self.workers[0].optimizers)
        self.clock = clock_of(config, self.workers)
        self.schedule = make_schedule(config, tuple(layer.width for layer in self.neurons.layers), workers)
        if config.needs_total_steps:
            self.schedule = plan_end(self.schedule, config, self.clock, total_steps)
        self._trained_norms: set[str] = set()
        self._hooks: list[RemovableHandle] = []
        self._travelling: dict[Slot, Tensor] = {}
        self._begin_round([{} for _ in self.workers])

    def after_step(self) -> None:
        """Count a local step of all workers, and sync if the round is complete."""
        self.clock.tick()
        for _, _, norms in self.neurons.rescaled_if_frozen:
            module = self.workers[0].module
            self._trained_norms.update(name for name in norms if module.get_submodule(name).training)
        if self.clock.due:
            self.full = self._written_back()
            # Read before the partition changes with the round.
            states = self._states()
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
            recalibrate_together(self.workers[:1] if self.config.first_evaluates else self.workers, full)
        return full

    def partitions(self) -> tuple[Partition, ...]:
        """The partitions of the hidden layers in this round."""
        return self.schedule.partitions(self.clock.round)

    def _trained(self, module: nn.Module) -> set[int]:
        """Ids of the parameters that a worker's optimizers would have, if they were built on ``module``."""
        worker, named = self.workers[0], dict(module.named_parameters())
        trained = ids_of_parameters(worker.optimizers)
        return {id(named[name]) for name, parameter in worker.module.named_parameters() if id(parameter) in trained}

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
                full[name] = self._mean_of_holders(
                    name, tensor, dict(enumerate(tensors[name].detach() for tensors in copies))
                )
            else:
                tensor.copy_(mean_or_maximum([tensors[name] for tensors in copies]))
        if len(copies) > 1:
            # The mean of unit vectors is shorter than 1.
            vectors = set(unit_vectors(self.workers[0].module)) - set(self.neurons.cuts)
            normalise(tensor for name, tensor in full.items() if name in vectors)
        return full

    def _mean_of_holders(self, name: str, full: Tensor, slices: Mapping[int, Tensor]) -> Tensor:
        """The full tensor, with the mean of the workers' slices where some worker has one."""
        wide = torch.promote_types(full.dtype, torch.float32)
        first, offset = torch.zeros_like(full, dtype=wide), torch.zeros_like(full, dtype=wide)
        holders = torch.zeros_like(full, dtype=torch.float32)
        for worker, held in slices.items():
            index = self._index(name, worker)
            first[index] = torch.where(holders[index] == 0, held.to(wide), first[index])
            # As an offset from the first, the mean of equal values is that value.
            offset[index] += held.to(wide) - first[index]
            holders[index] += 1
        mean = first + offset / holders.clamp(min=1)
        return torch.where(holders > 0, mean.to(full.dtype), full)

    def _states(self) -> list[dict[Slot, Tensor]]:
        """Each worker's optimizer state for the next round, in tensors of the full shapes; none if it is reset."""
        if self.config.momentum == "reset":
            return [{} for _ in self.workers]
        by_worker = [self._slices_of_state(worker) for worker in self.workers]
        if self.config.momentum == "travel":
            self._travelling = {slot: whole for slot, whole in self._travelling.items() if self._trains(slot)}
            for slot in dict.fromkeys(slot for slices in by_worker for slot in slices):
                slices = {index: own[slot] for index, own in enumerate(by_worker) if slot in own}
                # Zeros where nobody has trained yet.
                whole = self._travelling.get(slot, torch.zeros_like(self.full[slot[1]]))
                self._travelling[slot] = self._mean_of_holders(slot[1], whole, slices)
            return [self._travelling for _ in self.workers]
        kept: list[dict[Slot, Tensor]] = []
        for index, own in enumerate(by_worker):
            wholes = {slot: torch.zeros_like(self.full[slot[1]]) for slot in own}
            for slot, value in own.items():
                wholes[slot][self._index(slot[1], index)] = value
            kept.append(wholes)
        return kept

    def _trains(self, slot: Slot) -> bool:
        return self.workers[0].module.get_parameter(slot[1]).requires_grad

    def _slices_of_state(self, worker: SimulatedWorker) -> dict[Slot, Tensor]:
        """A worker's optimizer state of divided parameters; that of frozen ones is dropped."""
        slices: dict[Slot, Tensor] = {}
        for name, parameter in worker.module.named_parameters():
            if name not in self.neurons.cuts:
                continue
            for number, optimizer in enumerate(worker.optimizers):
                if not parameter.requires_grad:
                    # A frozen parameter's state does not move along, and would meet other neurons.
                    optimizer.state.pop(parameter, None)
                for key, value in optimizer.state.get(parameter, {}).items():
                    if isinstance(value, Tensor) and value.dim():
                        slices[number, name, key] = value
        return slices

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
        for name, layer, norms in self.neurons.rescaled_if_frozen:
            held = self.partitions()[layer].held[index]
            hook = partial(self._scaled_if_frozen, worker, norms, self.neurons.layers[layer].width / len(held))
            module = worker.module.get_submodule(name)
            self._hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _scaled_if_frozen(self, worker: SimulatedWorker, norms: Sequence[str], factor: float, *call: Any) -> Any:
        """Scale the input before norms whose statistics are from before the training, and stay."""
        modes = {name: worker.module.get_submodule(name).training for name in norms}
        still = [name for name, training in modes.items() if not training and name not in self._trained_norms]
        return _scaled(factor, *call) if still else None


def _scaled(factor: float, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    positional = tuple(value * factor for value in args)
    named = {key: value * factor for key, value in kwargs.items()}
    return positional, named
