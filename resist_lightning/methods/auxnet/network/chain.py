"""Divides a user's network into a chain of units, and builds stages from runs of them.

A stage is a module of its own, whose submodules, parameters and buffers are the network's. The network itself is not
changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, fx, nn
from typing_extensions import override

from resist_lightning.errors import StageSelectionError
from resist_lightning.methods.auxnet.network.attributes import TracedAttributes
from resist_lightning.methods.auxnet.network.find import check_network, describe, find_network
from resist_lightning.methods.auxnet.network.forward import network_blocks, trace_network, unchanged, unreached
from resist_lightning.methods.auxnet.network.graph import Cuts, Unit, build
from resist_lightning.methods.auxnet.network.recompute import keep_recomputing
from resist_lightning.methods.globs import summary
from resist_lightning.methods.tracing import names_of_tensors


class Stage(nn.Module):
    """A run of units of a network, as a module: one tensor in, one tensor out. Only for training.

    It reads submodules, parameters and buffers from the network itself, so that it is up to date after they were
    moved or replaced. It never changes its input, not even where a block works in place. Hooks of blocks run; those
    of the containers around them do not. Activation checkpointing is kept.

    Attributes:
        parts: the units.
        attributes: the numbers and switches of the network that are constants of the stage.
    """

    def __init__(self, network: nn.Module, parts: fx.GraphModule, attributes: TracedAttributes) -> None:
        super().__init__()
        self.parts = parts
        self.attributes = attributes
        # Tuples, so that these are not registered as submodules.
        self._network = (network,)
        self._computing = (keep_recomputing(network, parts),)

    @property
    def network(self) -> nn.Module:
        """The network that the stage is a part of."""
        return self._network[0]

    @override
    def forward(self, x: Tensor) -> Tensor:
        """The output of the last unit for ``x``, an input of the first."""
        # With the network as `self`, the generated code finds the network's present tensors.
        output: Tensor = type(self._computing[0]).forward(self.network, x)
        return output


@dataclass(frozen=True, eq=False)
class Chain:
    """A network as a chain of units.

    Args:
        name: qualified name of the network in the user's module; empty for the module itself.
        network: the network.
        units: names in the user's module of the modules that the units end with, in order of computation; the last
            unit reaches to the end of the network. A cut can be behind each unit but the last.
        attributes: the numbers and switches of the network that are constants of its stages.
    """

    name: str
    network: nn.Module = field(repr=False)
    units: tuple[str, ...]
    attributes: TracedAttributes = field(repr=False)
    _pieces: tuple[Unit, ...] = field(repr=False)
    _names: tuple[tuple[str, ...], ...] = field(repr=False)

    def stage(self, first: int, last: int) -> Stage:
        """The units ``first`` to ``last`` - 1 as one module; its submodules and parameters are the network's own."""
        self._check_range(first, last)
        parts = build(self.network, self._pieces[first:last], copies_input=first > 0)
        return Stage(self.network, parts, self.attributes)

    def names(self, first: int, last: int) -> list[str]:
        """Names in the user's module of the parameters and buffers of the units ``first`` to ``last`` - 1.

        Each tensor that the network's forward uses belongs to one unit. The others belong to none: where the network is
        the user's module itself, its loss may use them.
        """
        self._check_range(first, last)
        return [name for names in self._names[first:last] for name in names]

    def positions(self, cuts: Sequence[str]) -> tuple[int, ...]:
        """Numbers of units before each cut.

        Args:
            cuts: names of modules, in the user's module or in the network, behind whose last unit a cut is:
                ``["layer2"]``.

        Raises:
            StageSelectionError: if a name ends no unit, or the cuts are not in the order of computation.
        """
        found = tuple(self._position(cut) for cut in cuts)
        for index in range(1, len(found)):
            if found[index] <= found[index - 1]:
                raise StageSelectionError(
                    f"cuts={list(cuts)}: {cuts[index]!r} does not come behind {cuts[index - 1]!r}; name the cuts in "
                    f"the order of computation. {cut_points(self)}"
                )
        return found

    def _position(self, cut: str) -> int:
        for name in (cut, f"{self.name}.{cut}"):
            # A container is cut behind its last unit.
            last = 0
            for number, end in enumerate(self.units, 1):
                if f"{end}.".startswith(f"{name}."):
                    last = number
            if last == len(self.units):
                raise StageSelectionError(f"cuts: behind {cut!r} the network ends. {cut_points(self)}")
            if last:
                return last
        raise StageSelectionError(f"cuts: the network cannot be cut behind {cut!r}. {cut_points(self)}")

    def _check_range(self, first: int, last: int) -> None:
        if not 0 <= first < last <= len(self.units):
            raise ValueError(f"units {first} to {last} are not a run of the network's {len(self.units)} units.")


def find_chain(module: nn.Module, network: str | None = None) -> Chain:
    """Find the network of a user's module, and its cut points.

    Nothing in the module, nor any random generator, is changed. No other thread may compute meanwhile (torch.fx).

    Args:
        module: the user's module, a LightningModule or any other.
        network: name of the network in it; None takes the deepest submodule that contains all residual blocks (or,
            without any, all parameters) and all that is trained before them.

    Raises:
        StageSelectionError: if the network is not found, cannot be traced, has several inputs, does not return one
            tensor, or cannot be cut anywhere.
    """
    with unchanged(module):
        if network is not None:
            check_network(module, network)
        name = find_network(module) if network is None else network
        root = module.get_submodule(name)
        tracer, entry, exit = trace_network(module, root, name)
        missed = unreached(root, entry.graph)
        # The user may mean another network than the one with all blocks, but must name it.
        if network is None and missed:
            raise StageSelectionError(
                f"the forward of {describe(name)} does not call the residual blocks {missed}. If they belong to "
                "another network, name the one to cut into stages by network=."
            )
        cuts = Cuts(root, tracer, entry, exit, network_blocks(root))
        pieces = cuts.units()
        attributes = TracedAttributes(root, name, tracer.read)
    if len(pieces) < 2:
        raise StageSelectionError(f"{describe(name)} cannot be cut into stages: {cuts.why_none()}.")
    prefix = f"{name}." if name else ""
    units = tuple(f"{prefix}{piece.end}" for piece in pieces)
    return Chain(name, root, units, attributes, tuple(pieces), _names_by_unit(module, root, pieces))


def check_stages(chain: Chain, workers: int) -> None:
    """Raise a StageSelectionError if there are more workers than units."""
    if workers > len(chain.units):
        raise StageSelectionError(
            f"{workers} workers need {workers - 1} cut point(s), and {describe(chain.name)} has "
            f"{len(chain.units) - 1}. {cut_points(chain)} Use at most {len(chain.units)} workers, or a deeper network."
        )


def cut_points(chain: Chain) -> str:
    """A sentence that lists the cut points of a network."""
    return f"It can be cut behind {summary(chain.units[:-1])}."


def _names_by_unit(module: nn.Module, network: nn.Module, pieces: Sequence[Unit]) -> tuple[tuple[str, ...], ...]:
    """The tensors of each unit, once, by their first names in the user's module."""
    names = names_of_tensors(module)
    unit_of: dict[int, int] = {}
    for number, piece in enumerate(pieces):
        unit_of.update(dict.fromkeys(piece.tensors, number))
    found: list[list[str]] = [[] for _ in pieces]
    for tensor in names_of_tensors(network):
        if tensor in unit_of:
            found[unit_of[tensor]].append(names[tensor][0])
    return tuple(map(tuple, found))
