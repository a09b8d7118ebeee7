"""Shows how ResIST would divide a network, without training: ``python -m resist_lightning.inspect package:factory``."""

from __future__ import annotations

import argparse
import ast
import base64
import html
import importlib
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from textwrap import fill
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from typing_extensions import override

from resist_lightning.errors import BlockSelectionError
from resist_lightning.methods.globs import summary
from resist_lightning.methods.resist import overview
from resist_lightning.methods.resist.config import Config
from resist_lightning.methods.resist.first_forward import FirstForward
from resist_lightning.methods.resist.layout import BlockLayout
from resist_lightning.methods.resist.overview_text import costs_in_words, list_of, table
from resist_lightning.methods.resist.picture import draw_partition
from resist_lightning.state.random_state import random_numbers_apart

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Inspection:
    """The division of a network among workers; prints as a table.

    Args:
        layout: the blocks and their holders.
        rows: one for each section and class of blocks.
        costs: memory, traffic and computation of a worker.
        alternatives: other choices of blocks.
        note: missing results and how to get them, and blocks that a training refuses; empty if there are none.
    """

    layout: BlockLayout
    rows: Sequence[overview.Row]
    costs: overview.Costs
    alternatives: Sequence[overview.Alternative]
    note: str = ""

    @override
    def __str__(self) -> str:
        """The table, of at most 100 columns."""
        layout = self.layout
        title = (
            f"{type(layout.module).__name__}: {self.costs.parameters / 1e6:.3g} M parameters, {layout.workers} workers"
        )
        parts = [title, table(self.rows), costs_in_words(self.costs), list_of(self.alternatives), self.note]
        return "\n\n".join(filter(None, parts))

    def _repr_html_(self) -> str:
        """For notebooks: the table and, with matplotlib, the picture."""
        table = f"<pre>{html.escape(str(self))}</pre>"
        try:
            figure = self.figure()
        except ModuleNotFoundError:
            return table
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=100)
        return f'{table}<img src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"/>'

    def figure(self, rounds: int = 3) -> Figure:
        """A picture of the holders of each block in the first rounds; needs matplotlib."""
        return draw_partition(self.layout, rounds)


def inspect_model(module: nn.Module, *, workers: int = 2, example: Any = None, **options: Any) -> Inspection:
    """Inspect the division of a network among workers, which leaves it as it is.

    Args:
        module: the network.
        workers: number of workers.
        example: an input: a tensor, a tuple of several, or a dict by name. One forward of it shows where residual
            branches end, and how much a worker computes.
        options: settings as of ``ResISTStrategy``, such as ``blocks`` and ``min_blocks``; see
            :class:`resist_lightning.Config`.

    Raises:
        BlockSelectionError: if no block qualifies, or one that was chosen turns out not to be residual.
        ValueError: if a setting is outside its limits, or the network does not take the example.
    """
    layout = BlockLayout(module, Config(**options), workers)
    flops = None if example is None else _forward(layout, example)
    rows, costs, others = overview.rows(layout, flops), overview.costs(layout, flops), overview.alternatives(layout)
    return Inspection(layout, rows, costs, others, _note(layout, example))


def _note(layout: BlockLayout, example: Any) -> str:
    if example is None:
        return "FLOPs, and whether unknown blocks fold, are only known with an example input."
    past = [block.name for block in layout.blocks if block.seen.called is False]
    if not past:
        return ""
    return fill(
        f"The forward did not call {summary(past)} as block(x): a training refuses blocks that are called as "
        "block.forward(x), past their hooks.",
        100,
    )


def _forward(layout: BlockLayout, example: Any) -> overview.Flops:
    """Run the network twice on an example: to look at the blocks, and to count operations."""
    module = layout.module
    parameter = next(module.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    example = tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, example)

    def call() -> Any:
        if isinstance(example, Mapping):
            return module(**example)
        return module(*example) if isinstance(example, tuple) else module(example)

    look = FirstForward(layout.blocks, module)
    try:
        with _evaluating(module):
            call()
            look.remove()  # its own calls of blocks must not be counted
            return overview.count_flops(module, overview.all_blocks(layout), call)
    except BlockSelectionError:
        raise
    except Exception as error:
        said = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{type(module).__name__} does not take an example of {_describe(example)}: its forward raised "
            f"{type(error).__name__}: {said}. Give an input of the shape and type that it takes, "
            "with the batch as its first dimension."
        ) from error
    finally:
        look.remove()


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Inside, a module is in evaluation mode, without gradients; all is as before afterwards."""
    children = list(module.modules())
    modes = [child.training for child in children]
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    # The fused encoder layer is one operation, of which nothing is counted.
    torch.backends.mha.set_fastpath_enabled(False)
    module.eval()
    for parameter in trained:
        # Under no_grad a view of it would require a gradient all the same, and torch's counter would look for it.
        parameter.requires_grad_(False)
    try:
        with random_numbers_apart(), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for child, mode in zip(children, modes, strict=True):
            child.training = mode
        for parameter in trained:
            parameter.requires_grad_(True)


def _describe(example: Any) -> str:
    return ", ".join(
        "x".join(map(str, each.shape)) if isinstance(each, Tensor) else "?" for each in tree_leaves(example)
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; see ``python -m resist_lightning.inspect --help``."""
    options = _parser().parse_intermixed_args(arguments)  # arguments of the network may come behind options
    settings = {"blocks": options.blocks, "min_blocks": options.min_blocks}
    given = {name: value for name, value in settings.items() if value is not None}
    try:
        module = _build(options.factory, options.arguments)
        found = _inspect(module, options.workers, options.input, given)
        print(found)  # noqa: T201 - the command's result
        if options.picture:
            found.figure().savefig(options.picture)
    except (ValueError, ModuleNotFoundError, OSError) as error:
        sys.exit(f"error: {error}")


def _inspect(module: nn.Module, workers: int, inputs: Sequence[str], given: Mapping[str, Any]) -> Inspection:
    """Inspect a network with the inputs that were given, or else with one that it may take."""
    found = inspect_model(module, workers=workers, **given)
    guess = None if inputs else _guessed_input(module)
    shapes = inputs or [shape for shape in (guess,) if shape is not None]
    if not shapes:
        return replace(found, note=f"{found.note} Give --input SHAPE.")
    try:
        measured = inspect_model(module, workers=workers, example=tuple(map(random_input, shapes)), **given)
    except BlockSelectionError:
        print(found, end="\n\n")  # noqa: T201 - its globs are needed to leave a block out
        raise
    except ValueError:
        if guess is None:
            raise
        return replace(found, note=f"{found.note} {guess} did not fit: give --input SHAPE.")
    if guess is None:
        return measured
    said = f"{measured.note}\nMeasured with an input of {guess}, a guess; give --input SHAPE for another."
    return replace(measured, note=said.lstrip())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m resist_lightning.inspect", description=__doc__)
    parser.add_argument("factory", help="package.module:name of a function or class that makes the network")
    parser.add_argument("arguments", nargs="*", metavar="key=value", help="arguments of the factory")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--blocks", action="append", metavar="GLOB", help="choose these blocks; may be repeated")
    parser.add_argument("--min-blocks", type=int, help="minimum number of blocks per worker")
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="SHAPE",
        help="shape of an example input, such as 2x3x224x224, or 2x16:long for whole numbers; once for each argument",
    )
    parser.add_argument("--picture", metavar="FILE", help="draw who holds which block in the first rounds")
    return parser


def _build(factory: str, arguments: Sequence[str]) -> nn.Module:
    """Make the network that a command line names."""
    path, _, name = factory.partition(":")
    if not all(map(str.isidentifier, path.split("."))) or path.endswith(".py") or not name:
        raise ValueError(
            f"{factory!r} must be package.module:name, such as torchvision.models:resnet50, or net:make for net.py in "
            "the current folder."
        )
    try:
        make: Any = importlib.import_module(path)
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}; is it installed, or in the current folder or on PYTHONPATH?") from error
    for part in name.split("."):
        if not hasattr(make, part):
            near = get_close_matches(part, dir(make))
            like = f" Did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"{path} has no {name!r}.{like}")
        make = getattr(make, part)
    given = dict(_key_and_value(text) for text in arguments)
    try:
        module = make if isinstance(make, nn.Module) else make(**given)
    except Exception as error:
        said = str(error).partition("\n")[0]
        raise ValueError(
            f"{factory} raised {type(error).__name__}: {said}. Arguments are given as key=value."
        ) from error
    if not isinstance(module, nn.Module):
        raise ValueError(f"{factory} made a {type(module).__name__}, not a torch.nn.Module.")
    return module


def _key_and_value(text: str) -> tuple[str, Any]:
    key, sign, value = text.partition("=")
    if not sign:
        raise ValueError(f"{text!r} must be key=value, an argument of the factory.")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def random_input(text: str) -> Tensor:
    """A random input from a text such as 2x3x224x224 or 2x16:long."""
    sizes, _, kind = text.partition(":")
    if kind not in ("", "float", "long") or not all(size.isdecimal() for size in sizes.split("x")):
        raise ValueError(f"--input {text!r} must be numbers joined by x, such as 2x3x224x224; 2x16:long for indices.")
    shape = [int(size) for size in sizes.split("x")]
    return torch.randint(10, shape) if kind == "long" else torch.randn(shape)


def _guessed_input(module: nn.Module) -> str | None:
    """An input that a network of images or tokens is likely to take."""
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            return f"2x{child.in_channels}x224x224"
        if isinstance(child, nn.Embedding):
            return "2x16:long"
        if isinstance(child, nn.Linear):
            return None
    return None


if __name__ == "__main__":
    main()
