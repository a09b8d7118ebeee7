"""The layout of AuxNet: a network is cut by depth into stages, one for each worker."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from resist_lightning.comm.collective import Collective
from resist_lightning.comm.tensors import named_tensors
from resist_lightning.errors import StageSelectionError
from resist_lightning.methods.auxnet.config import StageConfig
from resist_lightning.methods.auxnet.network.aux_networks import make_aux_network
from resist_lightning.methods.auxnet.network.chain import Chain, check_stages, find_chain
from resist_lightning.methods.auxnet.network.measure import Measured, measure, measure_entries
from resist_lightning.methods.auxnet.partition import balance
from resist_lightning.methods.auxnet.step.messages import Shapes
from resist_lightning.methods.layout import Layout
from resist_lightning.methods.residual import scripted
from resist_lightning.methods.tracing import names_of_tensors
from resist_lightning.schedule.partition import Partition
from resist_lightning.schedule.progress import Clock


class StageLayout(Layout):
    """The stages of a model; worker k holds stage k in every round.

    The cuts are known after :meth:`prepare`, or at once where the settings name them. With one worker nothing is cut.

    Attributes:
        chain: the units that stages consist of; None with one worker.
        cuts: for each boundary, the number of units before it.
        measured: times and shapes of the units.
        outside: of the shared tensors those that are no part of the network; its others are left unused by its forward.

    Raises:
        StageSelectionError: if the network cannot be cut, or has too few cut points for the workers.
        ValueError: if the module synchronises batch norm.
    """

    def __init__(
        self, module: nn.Module, config: StageConfig, workers: int, trained: Collection[int] | None = None
    ) -> None:
        super().__init__(module, config, workers, trained)
        self.config: StageConfig = config
        self.chain: Chain | None = None
        self.cuts: tuple[int, ...] = ()
        self.measured: Measured | None = None
        # Cuts of the settings or of a resumed run, which must not be balanced anew.
        self._wanted: tuple[int, ...] | None = None
        inside: set[str] = set()
        if workers > 1:
            self.chain = find_chain(module, config.network)
            check_stages(self.chain, workers)
            inside = set(self.chain.names(0, len(self.chain.units)))
            _refuse_tied(module, self.chain.network)
            _refuse_scripted(self.chain.network)
            if config.cuts is not None:
                cuts = self.chain.positions(config.cuts)
                self._wanted = self.cuts = _check_number(cuts, config, workers)
        tensors = named_tensors(module)
        self.shared = {name: tensor for name, tensor in tensors.items() if name not in inside}
        network = named_tensors(self.chain.network).values() if self.chain is not None else ()
        of_network = set(map(id, network))
        self.outside = {name: tensor for name, tensor in self.shared.items() if id(tensor) not in of_network}

    @override
    def fits_only_some(self) -> str:
        if self.config.cuts is None:
            return ""
        return f"cuts={list(self.config.cuts)} fits one number only: leave cuts out, and the stages are balanced."

    @override
    def without_effect(self, clock: Clock, steps: int) -> list[str]:
        end, warmup_steps = clock.total_steps + steps, self.config.warmup_steps
        if end > warmup_steps:
            return []
        return [
            f"warmup_steps={warmup_steps} cover all {end} steps of this training: the stages wait for each other in "
            "every step, which is back-propagation and no faster. Set warmup_steps=0 or a small part of the steps, or "
            "train longer."
        ]

    @override
    def stepped_late(self) -> Collection[int]:
        if self.chain is None or not (self.config.delayed and self.config.delay):
            return ()
        named = named_tensors(self.module)
        names = self.chain.names(0, len(self.chain.units))
        return {id(named[name]) for name in names}

    @override
    def prepare(self, example: Tensor, collective: Collective) -> None:
        if self.chain is None:
            return
        # Also where the cuts are known: the shapes of the tensors that cross them are not.
        self.measured = measure(self.chain, example)
        if self._wanted is not None:
            self.cuts = self._wanted
            return
        entries = measure_entries(self.config, self.measured, example)
        # All workers must cut alike, so they balance by the mean of their measurements.
        rows = collective.gather_numbers([*self._unit_seconds(), *entries])
        columns = zip(*rows, strict=True)
        means = [sum(column) / len(rows) for column in columns]
        units = len(self.chain.units)
        unit_seconds, entry_seconds = means[:units], means[units:]
        self.cuts = balance(unit_seconds, self.workers, entry_seconds)
        for number, cut in enumerate(self.cuts):
            if entry_seconds[cut] == math.inf:
                # No auxiliary network could be made for any place: making this one raises the error with the reason.
                make_aux_network(
                    self.config,
                    self.measured.given,
                    self.measured.shapes[cut - 1],
                    nonnegative=self.nonnegative[number],
                    boundary=number + 1,
                )

    @property
    def boundary_shapes(self) -> Shapes:
        """The shapes of the tensors that cross the boundaries."""
        assert self.measured is not None
        measured = self.measured
        boundaries = tuple(measured.shapes[cut - 1] for cut in self.cuts)
        return Shapes(measured.given, boundaries, measured.shapes[-1], measured.dtype)

    @property
    def nonnegative(self) -> tuple[bool, ...]:
        """For each boundary, whether the tensor that crosses it is the output of a ReLU."""
        assert self.measured is not None
        return tuple(self.measured.nonnegative[cut - 1] for cut in self.cuts)

    def units(self, worker: int) -> tuple[int, int]:
        """The index of the first unit of a worker's stage, and of the one after its last."""
        assert self.chain is not None
        ends = (0, *self.cuts, len(self.chain.units))
        return ends[worker], ends[worker + 1]

    def stage_tensors(self, worker: int) -> dict[str, Tensor]:
        """The parameters and buffers of a worker's stage, by name."""
        if self.chain is None:
            return {}
        named = named_tensors(self.module)
        names = self.chain.names(*self.units(worker))
        return {name: named[name] for name in names if name in named}

    @override
    def partition(self, round: int) -> Partition:
        # Stages never move.
        held = tuple((worker,) for worker in range(self.workers))
        return Partition(held, self.workers)

    @override
    def held_parameters(self, round: int) -> list[int]:
        shared = _count_parameters(self.shared)
        return [shared + _count_parameters(self.stage_tensors(worker)) for worker in range(self.workers)]

    @override
    def identity(self) -> dict[str, Any]:
        # A worker's own tensors are its stage, and its auxiliary network or store.
        own: dict[str, Any] = {"stages": self.parts(), "method": self.config.method, "aux_width": self.config.aux_width}
        if self.config.aux_network is not None:
            own["aux_network"] = self.config.in_words()["aux_network"]
        return own

    @override
    def state_dict(self) -> dict[str, Any]:
        # A resumed run must not measure anew: with other cuts, the workers' own tensors would not fit.
        return {"cuts": list(self.cuts), "workers": self.workers}

    @override
    def load_state_dict(self, state: Mapping[str, Any], round: int) -> None:
        # Cuts that the settings name come first.
        if self.chain is None or state.get("workers") != self.workers or self.config.cuts is not None:
            return
        cuts = tuple(map(int, state.get("cuts", ())))
        # The state may be of another network; its cuts are taken where they are possible here.
        ascending = list(cuts) == sorted(set(cuts))
        inside = cuts and cuts[0] > 0 and cuts[-1] < len(self.chain.units)
        if ascending and inside:
            self._wanted = self.cuts = cuts

    @override
    def parts(self) -> list[str]:
        if self.chain is None or not self.cuts:
            return []
        return [self._name_stage(worker) for worker in range(self.workers)]

    @override
    def describe_tensor(self, name: str) -> str:
        for worker in range(self.workers):
            if name in self.stage_tensors(worker):
                return f"stage {worker} ({name})"
        return f"shared tensor {name}"

    @override
    def describe(self) -> str:
        if self.chain is None:
            return "one worker trains the whole network; nothing is cut."
        network = self.chain.name or "the module itself"
        if not self.measured:
            return f"{network} will be cut into {self.workers} stages, at some of {len(self.chain.units) - 1} places."
        units = self._unit_seconds()
        total = sum(units)
        sizes = self.held_parameters(0)
        lines = [f"{network} is cut into {self.workers} stages:"]
        for worker, name in enumerate(self.parts()):
            first, end = self.units(worker)
            share = sum(units[first:end]) / total
            lines.append(f"  stage {worker}: {name}; {sizes[worker]:,} parameters, {share:.0%} of the time")
        shapes = [" x ".join(map(str, shape)) for shape in self.boundary_shapes.boundaries]
        lines.append(f"  tensors that cross the boundaries, per sample: {', '.join(shapes)}")
        return "\n".join(lines)

    @override
    def warn_about_settings(self) -> None:
        super().warn_about_settings()
        if self.workers > 2 and self.config.stored and self.config.lambda_step == 1:
            warnings.warn(
                "lambda_step=1 diverges with stored guesses and three stages or more, and this run has "
                f"{self.workers}; None takes 0.1.",
                stacklevel=3,
            )

    def _unit_seconds(self) -> list[float]:
        """Seconds of each unit, forward and backward, for the example batch."""
        assert self.measured is not None
        both = zip(self.measured.forward_seconds, self.measured.backward_seconds, strict=True)
        return [forward + backward for forward, backward in both]

    def _name_stage(self, worker: int) -> str:
        assert self.chain is not None
        first, last = self.units(worker)
        begin = "the input" if first == 0 else f"behind {self.chain.units[first - 1]}"
        end = self.chain.units[last - 1] if last < len(self.chain.units) else "the output"
        return f"from {begin} to {end}"


def _count_parameters(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values() if isinstance(tensor, nn.Parameter))


def _refuse_scripted(network: nn.Module) -> None:
    names = scripted(network)
    if names:
        raise StageSelectionError(
            f"{names[0] or 'the network'!r} is TorchScript: its compiled forward would keep using memory that a worker "
            "frees. Build the network without torch.jit, and script it after the training."
        )


def _refuse_tied(module: nn.Module, network: nn.Module) -> None:
    inside = set(network.modules())
    # By module object, as a module may have several names.
    for names in names_of_tensors(module).values():
        owners = {module.get_submodule(name.rpartition(".")[0]) for name in names}
        if owners & inside and owners - inside:
            raise StageSelectionError(
                f"{' and '.join(names)} are one tensor, inside and outside of the network that is cut; only one worker "
                "would have it. Give the layer outside weights of its own, or make it a part of the network."
            )


def _check_number(positions: tuple[int, ...], config: StageConfig, workers: int) -> tuple[int, ...]:
    if len(positions) != workers - 1:
        raise StageSelectionError(
            f"cuts={config.cuts!r} cuts the network into {len(positions) + 1} stages, but there are {workers} workers. "
            f"Name {workers - 1} modules, use {len(positions) + 1} workers, or leave `cuts` out."
        )
    return positions
