"""Finds the hidden neurons of a user's network from its code alone, without example inputs.

A hidden layer is a Linear or Conv whose neurons reach another one through operations that treat each neuron alone
(activations, dropout, norms over exactly its neurons, pooling, flattening). Tensors are assumed to have the batch as
their first dimension. See docs/decisions/0015-finding-neurons.md.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace

from torch import nn
from torch.nn.parameter import UninitializedParameter

from resist_lightning.errors import LayerSelectionError
from resist_lightning.methods.globs import matches
from resist_lightning.methods.ist.config import LayerChoice
from resist_lightning.methods.ist.network.flow import Flow, Layer
from resist_lightning.methods.ist.network.neurons import Cut, HiddenLayer, Neurons, Passed, Size
from resist_lightning.methods.ist.network.tracing import Traced, Weighted, trace
from resist_lightning.methods.tracing import names_of_tensors, trains

_SHOWN = 5


def find_neurons(module: nn.Module, choice: LayerChoice = None, trained: Collection[int] | None = None) -> Neurons:
    """Find the hidden layers of a module, and all tensors and sizes that are divided with their neurons.

    Args:
        module: the user's module, a LightningModule or any other; nothing in it is changed. One without a forward of
            its own is traced child by child, and inputs and outputs of a child are whole.
        choice: None for all hidden layers that can be divided, but those that neither train themselves nor are read by
            layers that do; a glob or a list of globs that match the last parts of their names (``"encoder.*"``), or a
            predicate of (name, module), which is asked for each hidden layer. The others stay whole, and are shared.
        trained: ids of the parameters that optimizers have; None if they are not known yet.

    Raises:
        LayerSelectionError: if the module cannot be traced, has no hidden layer that can be divided, a glob or
            predicate chooses none, or a layer that it chooses cannot be divided.
    """
    traces = trace(module, _chooser(choice), trained)
    # A user who names the layers has decided which of two equal networks is meant.
    if choice is None:
        _refuse_twins(traces)
    flows = [Flow(traced) for traced in traces]
    layers: list[Layer] = []
    for flow in flows:
        layers += [layer for layer in flow.layers.values() if layer.hidden]
    # A user who names the layers may train them later.
    if choice is None:
        layers = [layer for layer in layers if _is_trained(module, layer, trained)]
    if not layers:
        raise LayerSelectionError(
            "nothing to deal out: there is no Linear or Conv whose neurons reach another one in the same forward, "
            "or none of these trains (frozen, or in no optimizer). "
            f"Seen: {_seen(module)}. A LightningModule without a forward of its own is searched child by child; "
            "modules made by torch.compile are not searched."
        )
    accessed: dict[int, str] = {}
    for flow in flows:
        accessed.update(flow.accessed)
    _add_problems_of_tensors(module, layers, accessed)
    chosen = _choose(module, layers, choice)
    whole: list[Layer] = []
    if choice is None:
        whole = [layer for layer in chosen if layer.problems]
    if len(whole) < len(chosen):
        chosen = [layer for layer in chosen if layer not in whole]
    # Only now: layers that are not chosen may have problems, and stay whole.
    _refuse(chosen, layers)
    assumed = []
    for traced in traces:
        switches = _switches(traced.defaults)
        if switches:
            assumed.append((traced.prefix.rstrip("."), switches))
    return replace(_assemble(chosen), assumed=tuple(assumed), whole=tuple(layer.name for layer in whole))


def _is_trained(module: nn.Module, layer: Layer, trained: Collection[int] | None) -> bool:
    """Whether some weight of a layer trains, or of those that read it; a part of it would teach nobody else."""
    named = dict(module.named_parameters(remove_duplicate=False))
    parameters = [named[name] for name in (*layer.rows, *layer.columns) if name in named]
    return trains(parameters, trained)


def describe(neurons: Neurons) -> str:
    """The modules that share each hidden layer's neurons, one line a layer, and the names of layers that stay whole.

    ``net.0 (512 neurons): rows of net.0, net.1; columns of net.4``
    """
    count, whole = len(neurons.layers), neurons.whole
    lines = [_line(neurons, index) for index in range(min(count, _SHOWN))]
    if count > _SHOWN:
        lines.append(f"And {count - _SHOWN} more hidden layers.")
    if whole:
        more = f" and {len(whole) - _SHOWN} more" if len(whole) > _SHOWN else ""
        lines.append(f"Whole, as IST cannot divide them: {', '.join(whole[:_SHOWN])}{more} (layers='*' says why).")
    return "\n".join(lines)


def _line(neurons: Neurons, index: int) -> str:
    # A module's weight and bias are listed once: the dicts are ordered sets.
    rows: dict[str, None] = {}
    columns: dict[str, None] = {}
    for name, cut in neurons.cuts.items():
        owner = name.rpartition(".")[0]
        if cut.rows == index:
            rows[owner] = None
        if cut.columns == index:
            columns[f"{owner} ({cut.repeat} each)" if cut.repeat > 1 else owner] = None
    layer = neurons.layers[index]
    return f"{layer.name} ({layer.width} neurons): rows of {', '.join(rows)}; columns of {', '.join(columns)}"


def _refuse_twins(traces: Iterable[Traced]) -> None:
    """Refuse networks of equal shapes: each is dealt by itself, and weights copied over would meet other neurons."""
    seen: dict[object, str] = {}
    for traced in traces:
        shapes = []
        for name, parameter in traced.module.named_parameters():
            shape = None if isinstance(parameter, UninitializedParameter) else parameter.shape
            shapes.append((name, shape))
        first, second = seen.setdefault(tuple(shapes), traced.prefix), traced.prefix
        if first != second:
            raise LayerSelectionError(
                f"the networks {first[:-1]!r} and {second[:-1]!r} have tensors of the same names and shapes. If "
                "weights are copied from one to the other (a target network, a moving average), they cannot both be "
                f"dealt out: their neurons go to different workers. Freeze the one that does not train "
                f"(requires_grad_(False)), or name the layers to deal out: {[f'{first}*']}, or "
                f"{[f'{first}*', f'{second}*']} if nothing is copied."
            )


def _chooser(choice: LayerChoice) -> Callable[[str, nn.Module], bool]:
    """A predicate of a layer's name and module: whether it is chosen."""
    if choice is None:
        return lambda *_: True
    if callable(choice):
        return choice
    patterns = [choice] if isinstance(choice, str) else list(choice)
    return lambda name, _: any(matches(pattern, name) for pattern in patterns)


def _choose(module: nn.Module, layers: Sequence[Layer], choice: LayerChoice) -> list[Layer]:
    chooses = _chooser(choice)
    chosen = []
    for layer in layers:
        if chooses(layer.name, module.get_submodule(layer.name)):
            chosen.append(layer)
    if callable(choice):
        if not chosen:
            raise LayerSelectionError(f"the predicate given as `layers` chose nothing. {_candidates(layers)}")
        return chosen
    patterns = [choice] if isinstance(choice, str) else list(choice or ())
    for pattern in patterns:
        if not any(matches(pattern, layer.name) for layer in layers):
            attention = _attention(module, pattern)
            raise LayerSelectionError(f"layers={pattern!r} matches no hidden layer.{attention} {_candidates(layers)}")
    if not chosen:
        raise LayerSelectionError(f"layers=[] leaves nothing to deal out. {_candidates(layers)}")
    return chosen


def _attention(module: nn.Module, pattern: str) -> str:
    """A sentence on the attention of torch.nn that a pattern matches, as a whole or in part; empty if there is none."""
    for name, child in module.named_modules():
        if not isinstance(child, nn.MultiheadAttention):
            continue
        inside = [name, *(f"{name}.{part}" for part, _ in child.named_modules())]
        if any(matches(pattern, part) for part in inside):
            return f" {name!r} (MultiheadAttention) stays whole: heads of attention are not dealt out."
    return ""


def _candidates(layers: Iterable[Layer]) -> str:
    names = [layer.name for layer in layers if not layer.problems]
    return f"Hidden layers that can be dealt out: {', '.join(names) or 'none'}."


def _add_problems_of_tensors(module: nn.Module, layers: Iterable[Layer], accessed: dict[int, str]) -> None:
    """Note a problem for layers that divide a tensor that is also used elsewhere."""
    names = names_of_tensors(module)
    by_name: dict[str, int] = {}
    for tensor, aliases in names.items():
        by_name.update(dict.fromkeys(aliases, tensor))
    for layer in layers:
        for name in [*layer.rows, *layer.columns]:
            if name not in by_name:
                continue
            tensor = by_name[name]
            aliases = names[tensor]
            if len(aliases) > 1:
                layer.problems.append(f"divide a tensor that has several names: {', '.join(aliases)} (tied weights)")
            if tensor in accessed:
                layer.problems.append(f"divide {name!r}, which a forward reads directly{accessed[tensor]}")


def _refuse(chosen: Sequence[Layer], layers: Sequence[Layer]) -> None:
    bad = [layer for layer in chosen if layer.problems]
    if not bad:
        return
    # One reason a layer: the first, which is the nearest in the forward.
    lines = []
    for layer in bad[:_SHOWN]:
        lines.append(f"hidden layer {layer.name!r} cannot be dealt out: its neurons {layer.problems[0]}.")
    if len(bad) > _SHOWN:
        lines.append(f"And {len(bad) - _SHOWN} more hidden layers cannot.")
    good = [layer.name for layer in layers if not layer.problems]
    if good:
        lines.append(f"Leave it whole by naming the others: layers={good}.")
    else:
        lines.append("No other hidden layer can be dealt out.")
    raise LayerSelectionError("\n".join(lines))


def _assemble(layers: Sequence[Layer]) -> Neurons:
    rows: dict[str, int] = {}
    columns: dict[str, tuple[int, int]] = {}
    sizes: list[Size] = []
    rescaled: list[tuple[str, int]] = []
    if_frozen: list[tuple[str, int, tuple[str, ...]]] = []
    passed: list[Passed] = []
    for index, layer in enumerate(layers):
        rows.update(dict.fromkeys(layer.rows, index))
        for name, repeat in layer.columns.items():
            columns[name] = index, repeat
        for name, attribute, repeat in layer.sizes:
            sizes.append(Size(name, attribute, index, repeat))
        rescaled += [(name, index) for name in layer.rescaled]
        passed += [Passed(name, before, dimension, index) for name, before, dimension in layer.passed]
        if_frozen += [(name, index, norms) for name, norms in layer.rescaled_if_frozen.items()]
    # A weight between two hidden layers is in both.
    cuts = {}
    for name in {**rows, **columns}:
        column, repeat = columns.get(name, (None, 1))
        cuts[name] = Cut(rows.get(name), column, repeat)
    hidden = tuple(HiddenLayer(layer.name, layer.width) for layer in layers)
    return Neurons(hidden, cuts, tuple(sizes), tuple(rescaled), tuple(if_frozen), passed=tuple(passed))


def _switches(defaults: dict[str, object]) -> dict[str, object]:
    """The optional arguments that a forward may branch on; a float is seldom one."""
    return {name: value for name, value in defaults.items() if not isinstance(value, float)}


def _seen(module: nn.Module) -> str:
    seen = []
    for name, child in module.named_modules():
        if isinstance(child, Weighted):
            seen.append(f"{name or 'the module itself'} ({type(child).__name__})")
    return ", ".join(seen) or "no Linear or Conv at all"
