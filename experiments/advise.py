"""Advises on a method for a network, a link and a number of workers: memory, traffic and time of each, before training.

python experiments/advise.py link=1gbit workers=4
python experiments/advise.py model=torchvision model.name=resnet50 link=100mbit workers=8 optimizer_slots=2
python experiments/advise.py model=mlp input=4096 link=12.5e6 local_steps=20
python experiments/advise.py model._target_=my_package.MyNet model.width=64 input=3x224x224 step_seconds=0.08

The network is named as for train.py, and may be anyone's. Prints a table and a recommendation; writes advise.jsonl.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from experiments.app.build import build_network, check_section, files_of
from experiments.choosing import tables
from experiments.choosing.footprint import WHOLE, Part, Setting, divide, footprints, operations
from experiments.choosing.prediction import bytes_per_second, predict, recorded, scaled
from experiments.harness import cli
from experiments.harness.record import write_record
from experiments.harness.settings import ConfigError, option
from experiments.harness.tables import show_and_write
from experiments.trainers import median_seconds
from resist_lightning.comm.byte_formulas import WIRE_FORMATS
from resist_lightning.errors import first_line
from resist_lightning.inspect import random_input

NETWORK = {"full": ["model=preact"], "smoke": ["model=preact", "model.depth=14", "model.width_multiplier=0.0625"]}
OPTIMIZERS: dict[int, Callable[[Any], torch.optim.Optimizer]] = {
    0: partial(torch.optim.SGD, lr=1e-4),
    1: partial(torch.optim.SGD, lr=1e-4, momentum=0.9),
    2: partial(torch.optim.Adam, lr=1e-4),
}
"""Optimizers by the number of tensors that they keep for each parameter."""


@dataclass(kw_only=True)
class Options(cli.Command):
    out: str = option("runs/advise", "folder of the result file", smoke="runs/advise-smoke")
    model: Any = option(hint="model=preact, torchvision or mlp, or model._target_=PACKAGE.CLASS")
    input: str = option(
        "3x32x32", "shape of one example: 3x224x224, 4096, or 128:long for 128 whole numbers", smoke="3x8x8"
    )
    classes: int = option(10, "outputs of a network that asks for num_classes", least=1)
    link: str = option("1gbit", "100mbit, 1gbit, 10gbit, or bytes per second: 12.5e6")
    latency: float = option(
        0.0, "seconds per message besides its bytes; 0.0001 in a data centre, 0.02 over the internet", least=0
    )
    workers: int = option(4, "workers of the training", least=2)
    local_steps: int = option(50, "local steps per round; 50 in the paper", least=1)
    min_blocks: int | None = option(None, "null: 5, or half of the blocks where there are fewer than 10", least=0)
    wire: str = option("fp32", choices=tuple(WIRE_FORMATS))
    optimizer_slots: int = option(
        1, "tensors per parameter: 1 for SGD with momentum, 2 for Adam", choices=tuple(OPTIMIZERS)
    )
    batch: int = option(32, "examples per worker and local step", least=1, smoke=2)
    steps: int = option(5, "timed steps for each part of the network; their median counts", least=1, smoke=1)
    step_seconds: float | None = option(
        None, "seconds of a step of the whole network on your hardware; null: measured here", above=0
    )
    point: float = option(
        1.2,
        "how many times faster a method must be for each point of accuracy that it costs; 1: only speed counts",
        least=1,
    )

    def __post_init__(self) -> None:
        section = OmegaConf.create(self.model) if isinstance(self.model, dict) else self.model
        check_section(section, "model")
        try:
            bytes_per_second(self.link)
            self.example(1)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def example(self, batch: int) -> Tensor:
        """A random input of the network."""
        try:
            return random_input(f"{batch}x{self.input}")
        except ValueError as error:
            raise ValueError(
                f"input={self.input}: must be numbers joined by x, such as 3x224x224; 128:long for whole numbers"
            ) from error

    def network(self) -> nn.Module:
        """A new instance of the network."""
        shape = self.example(1).shape[1:]
        known = {"num_classes": self.classes, "in_channels": shape[0], "in_features": prod(shape)}
        made = build_network(OmegaConf.create(self.model), known)
        if not isinstance(made, nn.Module):
            raise ConfigError(
                f"model._target_={self.model['_target_']}: made a {type(made).__name__}, which is not a torch.nn.Module"
            )
        return made

    def setting(self) -> Setting:
        return Setting(self.workers, self.local_steps, self.min_blocks, self.wire, self.optimizer_slots)


def with_network(arguments: Sequence[str]) -> list[str]:
    """The command line with ``model=NAME`` replaced by its file's values in conf/model, as Hydra does for train.py."""
    size = next((word.partition("=")[2] for word in arguments if word.startswith("size=")), "full")
    if not any(word.startswith(("model=", "model._target_=")) for word in arguments):
        arguments = [*NETWORK.get(size, NETWORK["full"]), *arguments]
    files, words = files_of("model"), []
    for word in arguments:
        key, _, name = word.partition("=")
        if key != "model":
            continue
        if name not in files:
            raise ConfigError(
                f"model={name}: must be one of {', '.join(sorted(files))}, or a network of your own: model._target_=PACKAGE.CLASS"
            )
        words += [f"model.{key}={value}" for key, value in files[name].items()]
    return words + [word for word in arguments if not word.startswith("model=")]


def run(_: Sequence[str], options: Options) -> None:
    """Predict, show and write."""
    setting, example = options.setting(), options.example(options.batch)
    try:
        parts, refused = divide(options.network, example, setting)
        found = footprints(parts, setting)
        for part in parts.values():
            part.hold()
        compute = step_seconds(parts, example, options)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error
    rows = predict(found, compute, bytes_per_second(options.link), options.latency)
    settings = {
        **options.take("model", "input", "classes", "link", "latency", "workers", "local_steps", "min_blocks", "wire"),
        **options.take("optimizer_slots", "batch", "steps", "step_seconds", "point"),
        "threads": torch.get_num_threads(),
    }
    out = Path(options.out)
    frozen = sum(p.numel() for p in parts[WHOLE].module.parameters() if not p.requires_grad)
    content = {"settings": settings, "frozen": frozen, "refused": refused, "rows": list(map(recorded, rows))}
    write_record(out / "advise.jsonl", content)
    show_and_write(out, tables.RESULTS, tables.STUDIES, ["advise"], [])


def step_seconds(parts: dict[str, Part], example: Tensor, options: Options) -> dict[str, float]:
    """Seconds of a local step with each part: measured, or scaled from the user's ``step_seconds``."""
    try:
        if options.step_seconds is not None:
            one = example[:1]
            return scaled(options.step_seconds, {name: operations(part.module, one) for name, part in parts.items()})
        return measured({name: part.module for name, part in parts.items()}, example, options)
    except (RuntimeError, TypeError, IndexError) as error:
        said = first_line(str(error), 160)
        raise ConfigError(
            f"input={options.input}: the network does not take it ({said}); give the shape of one example, such as "
            "input=3x224x224, or input=128:long for whole numbers"
        ) from error


def measured(modules: Mapping[str, nn.Module], example: Tensor, options: Options) -> dict[str, float]:
    """Median seconds of forward, backward and optimizer step of each."""
    steps = [one_step(module.train(), example, options.optimizer_slots) for module in modules.values()]
    return dict(zip(modules, median_seconds(steps, options.steps), strict=True))


def one_step(module: nn.Module, example: Tensor, slots: int) -> Callable[[], None]:
    """A local step of a held part on an example."""
    optimizer = OPTIMIZERS[slots]([parameter for parameter in module.parameters() if not parameter.is_meta])

    def step() -> None:
        optimizer.zero_grad()
        outputs = [leaf for leaf in tree_leaves(module(example)) if isinstance(leaf, Tensor) and leaf.requires_grad]
        # Any scalar will do: the cost of a loss is small beside the network's.
        torch.stack([output.float().square().mean() for output in outputs]).sum().backward()
        optimizer.step()

    return step


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    with cli.readable_errors():
        given = with_network(given)
    return cli.run(run, Options, __doc__, arguments=given)


if __name__ == "__main__":
    sys.exit(main())
