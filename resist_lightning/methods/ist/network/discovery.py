"""Finds the hidden neurons of a user's network, as it is written, without example inputs.

A hidden layer is a Linear or Conv whose neurons reach another one through operations that treat each neuron alone
(activations, dropout, norms over exactly its neurons, pooling, flattening). Tensors are assumed to have the batch as
their first dimension. See docs/decisions/0015-finding-neurons.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from torch import nn
from torch.nn.parameter import UninitializedParameter

from resist_lightning.errors import LayerSelectionError
from resist_lightning.methods.globs import matches
from resist_lightning.methods.ist.config import LayerChoice
from resist_lightning.methods.ist.network.flow import Flow, Layer
from resist_lightning.methods.ist.network.neurons import Cut, HiddenLayer, Neurons, Size
from resist_lightning.methods.ist.network.tracing import Traced, Weighted, trace
from resist_lightning.methods.tracing import names_of_tensors

_SHOWN = 5


def find_neurons(module: nn.Module, choice: LayerChoice = None) -> Neurons:
    """Find the hidden layers of a module, and all that is divided with their neurons.

    Args:
        module: the user's module, a LightningModule or any other; nothing in it is changed. One without a forward of
            its own is looked at child by child, and what goes into and comes out of a child is whole.
        choice: None for all hidden layers, a glob or a list of globs that match the last parts of their names
            (``"encoder.*"``), or a predicate of (name, module), which is asked for each hidden layer. Layers that
            are not chosen stay whole, and are shared.

    Returns:
        What is divided among workers.

    Raises:
        LayerSelectionError: if the module cannot be traced, has no hidden layer, a glob or predicate chooses none, or
            a chosen layer cannot be divided.
    """
    traces = trace(module, _chooser(choice))
    if choice is None:
        _refuse_twins(traces)
    flows = [Flow(traced) for traced in traces]
    layers = [layer for flow in flows for layer in flow.layers.values() if layer.hidden]
    if not layers:
        raise LayerSelectionError(
            "nothing to deal out: there is no Linear or Conv whose neurons reach another one in the same forward. "
            f"Seen: {_seen(module)}. A LightningModule without a forward of its own is looked at child "
            "by child; what torch.compile has made is not looked into."
        )
    accessed = {tensor: line for flow in flows for tensor, line in flow.accessed.items()}
    _add_problems_of_tensors(module, layers, accessed)
    chosen = _choose(module, layers, choice)
    _refuse(chosen, layers)
    switches = ((traced.prefix.rstrip("."), _switches(traced.defaults)) for traced in traces)
    assumed = ((name, values) for name, values in switches if values)
    return replace(_assemble(chosen), assumed=tuple(assumed))


def describe(neurons: Neurons) -> str:
    """What is coupled, one line for each hidden layer.

    ``net.0 (512 neurons): rows of net.0, net.1; columns of net.4``
    """
    return "\n".join(_line(neurons, index) for index in range(len(neurons.layers)))


def _line(neurons: Neurons, index: int) -> str:
    rows = {name.rpartition(".")[0]: None for name, cut in neurons.cuts.items() if cut.rows == index}
    columns = {
        name.rpartition(".")[0] + (f" ({cut.repeat} each)" if cut.repeat > 1 else ""): None
        for name, cut in neurons.cuts.items()
        if cut.columns == index
    }
    layer = neurons.layers[index]
    return f"{layer.name} ({layer.width} neurons): rows of {', '.join(rows)}; columns of {', '.join(columns)}"


def _refuse_twins(traces: Iterable[Traced]) -> None:
    """Each layer is dealt by itself: weights that are copied from one network to another would meet other neurons."""
    seen: dict[object, str] = {}
    for traced in traces:
        shapes = tuple(
            (name, None if isinstance(parameter, UninitializedParameter) else parameter.shape)
            for name, parameter in traced.module.named_parameters()
        )
        first, second = seen.setdefault(shapes, traced.prefix), traced.prefix
        if first != second:
            raise LayerSelectionError(
                f"the networks {first[:-1]!r} and {second[:-1]!r} have the same tensors. If weights are copied from "
                "one to the other (a target network, a moving average), they cannot both be dealt out: their neurons "
                f"go to different workers. Say which are by `layers`: {[f'{first}*']}, or "
                f"{[f'{first}*', f'{second}*']} if nothing is copied."
            )


def _chooser(choice: LayerChoice) -> Callable[[str, nn.Module], bool]:
    """Whether a layer is chosen, by its name and module."""
    if choice is None:
        return lambda *_: True
    if callable(choice) and not isinstance(choice, str):
        return choice
    patterns = [choice] if isinstance(choice, str) else list(choice)
    return lambda name, _: any(matches(pattern, name) for pattern in patterns)


def _choose(module: nn.Module, layers: Sequence[Layer], choice: LayerChoice) -> list[Layer]:
    chooses = _chooser(choice)
    chosen = [layer for layer in layers if chooses(layer.name, module.get_submodule(layer.name))]
    if callable(choice) and not isinstance(choice, str):
        if not chosen:
            raise LayerSelectionError(f"the predicate given as `layers` chose nothing. {_candidates(layers)}")
        return chosen
    patterns = [choice] if isinstance(choice, str) else list(choice or ())
    for pattern in patterns:
        if not any(matches(pattern, layer.name) for layer in layers):
            raise LayerSelectionError(f"layers={pattern!r} matches no hidden layer. {_candidates(layers)}")
    if not chosen:
        raise LayerSelectionError(f"layers=[] leaves nothing to deal out. {_candidates(layers)}")
    return chosen


def _candidates(layers: Iterable[Layer]) -> str:
    names = [layer.name for layer in layers if not layer.problems]
    return f"Hidden layers that can be dealt out: {', '.join(names) or 'none'}."


def _add_problems_of_tensors(module: nn.Module, layers: Iterable[Layer], accessed: dict[int, str]) -> None:
    """A tensor that something else uses too cannot be cut."""
    names = names_of_tensors(module)
    by_name = {name: tensor for tensor, aliases in names.items() for name in aliases}
    for layer in layers:
        for name in [*layer.rows, *layer.columns]:
            tensor = by_name.get(name)
            if tensor is None:
                continue
            if len(names[tensor]) > 1:
                layer.problems.append(
                    f"divide a tensor that has several names: {', '.join(names[tensor])} (tied weights)"
                )
            if tensor in accessed:
                layer.problems.append(f"divide {name!r}, which a forward reads itself{accessed[tensor]}")


def _refuse(chosen: Sequence[Layer], layers: Sequence[Layer]) -> None:
    bad = [layer for layer in chosen if layer.problems]
    if not bad:
        return
    lines = [
        f"hidden layer {layer.name!r} cannot be dealt out: its neurons {layer.problems[0]}." for layer in bad[:_SHOWN]
    ]
    if len(bad) > _SHOWN:
        lines.append(f"And {len(bad) - _SHOWN} more hidden layers cannot.")
    good = [layer.name for layer in layers if not layer.problems]
    way_out = (
        f"Leave it whole by naming the others: layers={good}." if good else "No other hidden layer can be dealt out."
    )
    raise LayerSelectionError("\n".join([*lines, way_out]))


def _assemble(layers: Sequence[Layer]) -> Neurons:
    rows = {name: index for index, layer in enumerate(layers) for name in layer.rows}
    columns = {name: (index, repeat) for index, layer in enumerate(layers) for name, repeat in layer.columns.items()}
    cuts = {}
    for name in {**rows, **columns}:
        column, repeat = columns.get(name, (None, 1))
        cuts[name] = Cut(rows.get(name), column, repeat)
    return Neurons(
        layers=tuple(HiddenLayer(layer.name, layer.width) for layer in layers),
        cuts=cuts,
        sizes=tuple(
            Size(name, what, i, repeat) for i, layer in enumerate(layers) for name, what, repeat in layer.sizes
        ),
        rescaled=tuple((name, index) for index, layer in enumerate(layers) for name in layer.rescaled),
    )


def _switches(defaults: dict[str, object]) -> dict[str, object]:
    """Those that a forward may branch on; a float is seldom one."""
    return {name: value for name, value in defaults.items() if not isinstance(value, float)}


def _seen(module: nn.Module) -> str:
    seen = [f"{name or 'the module itself'} ({type(child).__name__})" for name, child in module.named_modules()
            if isinstance(child, Weighted)]  # fmt: skip
    return ", ".join(seen) or "no Linear or Conv at all"
