"""The layout of IST (arXiv 1910.02120): the hidden neurons that each worker holds in each round."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from math import prod
from typing import Any

import torch
from torch import Size, Tensor, nn
from typing_extensions import override

from resist_lightning.comm.tensors import named_tensors
from resist_lightning.errors import CheckpointError, LayerSelectionError
from resist_lightning.methods.ist.bytes import merged_entries, sent_entries
from resist_lightning.methods.ist.config import NeuronConfig, make_schedule, plan_end
from resist_lightning.methods.ist.holders import whole_pieces
from resist_lightning.methods.ist.network.discovery import describe, find_neurons
from resist_lightning.methods.ist.network.neurons import Cut
from resist_lightning.methods.ist.pieces import Part
from resist_lightning.methods.ist.plan import NeuronPlan, Piece, full_pieces, have_several_holders
from resist_lightning.methods.layout import Layout
from resist_lightning.schedule.partition import Partition
from resist_lightning.schedule.progress import Clock
from resist_lightning.schedule.stages import never_divided
from resist_lightning.state.optimizer_state import OptimizerStates

SHOWN_NEURONS, SHOWN_ROUNDS = 64, 60
"""The most neurons and rounds whose holders a summary lists."""

FEW = 0.25
"""Below this share of the neurons, a subnet of our tasks learns far less than local SGD (decision 47)."""


class NeuronLayout(Layout):
    """The hidden neurons of a model, and the workers that train them in each round.

    Attributes:
        neurons: the hidden layers, and the division of tensors among their neurons.
        shapes: by name, the shapes of divided tensors in the full model.
        trained_norms: names of norms that have trained in subnets, so that their running statistics are those of a sum
            over fewer neurons.

    Raises:
        LayerSelectionError: if the layers cannot be cut as asked, or one has fewer neurons than there are workers.
        ValueError: if the module synchronises batch norm.
    """

    def __init__(
        self, module: nn.Module, config: NeuronConfig, workers: int, trained: Collection[int] | None = None
    ) -> None:
        super().__init__(module, config, workers, trained)
        self.config: NeuronConfig = config
        self.neurons = find_neurons(module, config.layers, trained)
        self.schedule = make_schedule(config, tuple(layer.width for layer in self.neurons.layers), workers)
        for layer, counts in zip(self.neurons.layers, self.schedule.counts(0), strict=True):
            if min(counts) == 0:
                raise LayerSelectionError(
                    f"layer {layer.name!r} has {layer.width} neurons for {workers} workers, and each worker needs one "
                    f"of every layer. Use at most {layer.width} workers, let several hold a neuron (min_share), or "
                    "leave the layer whole: choose others with `layers`."
                )
        self._refuse_single_neurons()
        self.trained_norms: set[str] = set()
        tensors = named_tensors(module)
        cuts = self.neurons.cuts
        self.shared = {name: tensor for name, tensor in tensors.items() if name not in cuts}
        # Kept, as the tensors themselves shrink to slices in training.
        self.shapes: Mapping[str, Size] = {name: tensors[name].shape for name in cuts}

    @override
    def partition(self, round: int) -> tuple[Partition, ...]:
        return self.schedule.partitions(round)

    @override
    def plan_end(self, clock: Clock, total_steps: int | None) -> None:
        if self.config.needs_total_steps:
            self.schedule = plan_end(self.schedule, self.config, clock, total_steps)
            self.total_steps = total_steps

    @override
    def without_effect(self, clock: Clock, steps: int) -> list[str]:
        text = never_divided(0, self.schedule.stages.finish_from, clock.rounds_by(steps), "neurons")
        return [text] if text else []

    @override
    def held(self, round: int) -> list[Any]:
        partitions, hashes = self.partition(round), []
        for worker in range(self.workers):
            held = [partition.held[worker] for partition in partitions]
            # Hashed, as a checkpoint would otherwise list every neuron of every worker.
            digest = hashlib.sha256(repr(held).encode())
            hashes.append(digest.hexdigest()[:16])
        return hashes

    @override
    def held_parameters(self, round: int) -> list[int]:
        counts = [0] * self.workers
        for name, parameter in self.module.named_parameters():
            for worker in range(self.workers):
                shape = self.held_shape(name, worker, round) if name in self.shapes else parameter.shape
                counts[worker] += prod(shape)
        return counts

    def held_shape(self, name: str, worker: int, round: int) -> tuple[int, ...]:
        """The shape of a worker's slice of a tensor in ``round``."""
        cut = self.neurons.cuts[name]
        shape = list(self.shapes[name])
        if cut.rows is not None:
            shape[0] = self.share(cut.rows, worker, round)
        if cut.columns is not None:
            shape[1] = self.share(cut.columns, worker, round) * cut.repeat
        return tuple(shape)

    def share(self, layer: int, worker: int, round: int) -> int:
        """Number of neurons of a hidden layer that a worker holds in ``round``; equal in all rounds without stages."""
        return self.schedule.counts(round)[layer][worker]

    @property
    def leaves_out_neurons(self) -> bool:
        """Whether some worker lacks a neuron, which will arrive; the first round has the fewest."""
        counts = self.schedule.counts(0)
        return any(min(held) < layer.width for layer, held in zip(self.neurons.layers, counts, strict=True))

    def inner(self) -> dict[str, Cut]:
        """The tensors with hidden neurons on both sides, by name; their slices together are only a part of them."""
        inner = {}
        for name, cut in self.neurons.cuts.items():
            if cut.rows is not None and cut.columns is not None:
                inner[name] = cut
        return inner

    def rest(self, name: str) -> int:
        """Number of a tensor's entries per neuron, or, where it has neurons on both sides, per pair of neurons."""
        cut = self.neurons.cuts[name]
        shape = self.shapes[name]
        if cut.columns is None:
            return prod(shape[1:])
        per_pair = prod(shape[2:]) * cut.repeat
        if cut.rows is not None:
            return per_pair
        return shape[0] * per_pair

    @override
    def identity(self) -> dict[str, Any]:
        # All inputs of a round's partition, which decide the neurons of a slice.
        return {
            "neurons": [[layer.name, layer.width] for layer in self.neurons.layers],
            "workers": self.workers,
            "seed": self.config.seed,
        }

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.schedule.state_dict()

    @override
    def seen(self) -> dict[str, Any]:
        return {"trained_norms": sorted(self.trained_norms)}

    @override
    def assume(self, seen: Mapping[str, Any]) -> None:
        self.trained_norms.update(seen.get("trained_norms", ()))

    @override
    def parts(self) -> list[str]:
        return [layer.name for layer in self.neurons.layers]

    @override
    def describe_tensor(self, name: str) -> str:
        return f"its neurons' part of {name}" if name in self.shapes else f"shared tensor {name}"

    @override
    def full_tensors(self, states: Iterable[dict[str, Any]]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for worker, state in enumerate(states):
            own = state["own"]
            held = self._partitions_of(state["place"])
            for name, tensor in own["tensors"].items():
                if name not in self.shapes:
                    tensors[name] = tensor
            for name, cut in self.neurons.cuts.items():
                shape = tuple(self.shapes[name])
                part = Part(cut, shape, worker, own["tensors"][name], own["store"].get(name))
                tensors.setdefault(name, torch.empty(shape, dtype=part.tensor.dtype))
                full = Part(cut, shape, worker, tensors[name])
                for piece in self.full_pieces(cut, NeuronPlan(held, held), worker):
                    full.put(piece, held, part.take(piece, held))
        return tensors

    def plan(self, round: int, left_out: tuple[int, ...] = ()) -> NeuronPlan:
        """The plan of the sync between ``round`` and the next."""
        return NeuronPlan(self.partition(round), self.partition(round + 1), left_out)

    def full_pieces(self, cut: Cut, plan: NeuronPlan, worker: int) -> list[Piece]:
        """The pieces of a tensor, after the means, that ``worker`` sends to make it whole elsewhere."""
        if have_several_holders(plan.before):
            return whole_pieces(cut, plan, worker)
        return full_pieces(cut, plan.before, worker)

    def hand_over_bytes(self, round: int, states: OptimizerStates) -> list[dict[str, int]]:
        """By closed form, the bytes that each worker sends at the end of ``round`` to hand over its slices.

        Returns:
            For each worker, the bytes of the kinds ``merge``, ``hand_over`` and ``state``.
        """
        plan = self.plan(round)
        tensors = named_tensors(self.module)
        sent = [{"merge": 0, "hand_over": 0, "state": 0} for _ in range(self.workers)]
        for name, cut in self.neurons.cuts.items():
            tensor = tensors[name]
            state_bytes = 0
            if self.config.momentum == "travel" and isinstance(tensor, nn.Parameter):
                state_bytes = sum(slot.dtype.itemsize for slot in states.slots([tensor]))
            for kind, counts in (("merge", merged_entries(cut, plan)), ("hand_over", sent_entries(cut, plan))):
                for worker, moved in enumerate(counts):
                    entries = moved * self.rest(name)
                    sent[worker][kind] += entries * tensor.element_size()
                    sent[worker]["state"] += entries * state_bytes
        return sent

    @override
    def describe(self) -> str:
        return (
            f"the neurons of {len(self.neurons.layers)} hidden layer(s) are dealt out to {self.workers} worker(s); "
            f"{self._holders_in_words()}rounds of {self.config.rounds_in_words}.\n{describe(self.neurons)}"
        )

    @override
    def holders_for_summary(self, rounds: int) -> dict[str, Any] | None:
        """The holders of evenly spaced neurons of the first hidden layer, in the first rounds."""
        layer = self.neurons.layers[0]
        # Rounded up, so that there are never more than SHOWN_NEURONS.
        step = -(-layer.width // SHOWN_NEURONS)
        shown = range(0, layer.width, step)
        holders = []
        for round in range(min(rounds, SHOWN_ROUNDS)):
            partition = self.partition(round)[0]
            # The first, where there are several.
            holders.append([partition.holders(neuron)[0] for neuron in shown])
        return {"layer": layer.name, "width": layer.width, "shown": list(shown), "holders": holders}

    def _holders_in_words(self) -> str:
        share = sum(map(len, self.partition(0)[0].held)) / self.neurons.layers[0].width / self.workers
        several = f"each has {share * self.workers:.3g} holders; " if share > 1 / self.workers else ""
        if share >= FEW:
            return several
        return f"{several}each worker has {share:.2g} of them: below a quarter, accuracy falls (min_share); "

    def _partitions_of(self, place: Mapping[str, Any]) -> tuple[Partition, ...]:
        """The partitions by which a snapshot's slices were cut."""
        identity = place["identity"]
        theirs, ours = identity.get("neurons"), self.identity()["neurons"]
        if theirs != ours:
            raise CheckpointError(
                f"the snapshot was written by a run that dealt out the neurons of {theirs}, and this one deals out "
                f"those of {ours}. Resume with the same model and the same `layers`."
            )
        # Not this run's schedule: the snapshot may be of another number of workers.
        schedule = self.schedule.of(identity["workers"], identity["seed"], place["table"])
        return schedule.partitions(place["round"])

    def _refuse_single_neurons(self) -> None:
        # A layer norm over a single neuron gives zero, whatever the neuron computes.
        for size in self.neurons.sizes:
            layer = self.neurons.layers[size.layer]
            over_neurons = size.attribute in ("normalized_shape", "num_channels")
            if over_neurons and self.workers > 1 and min(self.schedule.counts(0)[size.layer]) < 2:
                raise LayerSelectionError(
                    f"layer {layer.name!r} has {layer.width} neurons for {self.workers} workers, and {size.module} "
                    "normalises over those of one worker, which turns a single one into zero. Use at most "
                    f"{layer.width // 2} workers, or leave the layer whole: choose others with `layers`."
                )
