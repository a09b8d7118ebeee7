"""Trains one case: one process, DDP, local SGD or ResIST, on the same images in the same order."""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Any

import torch

from experiments.accuracy.cases import PARTITIONING, Case, config_of, make_network
from experiments.data import CIFAR10, Digits, ImageFolder
from experiments.data.arrays import Images
from experiments.data.augment import BatchTransform
from experiments.data.module import ImageData
from experiments.harness.settings import ConfigError
from experiments.trainers import (
    LARGEST_WORKERS,
    Curve,
    DataParallel,
    Prepared,
    Recipe,
    Simulated,
    Trainer,
    steps_of,
    stops,
    train,
)  # fmt: skip
from resist_lightning import Simulator


@lru_cache(maxsize=1)
def prepared(options: Any) -> Prepared:
    """Read the images; a folder is decoded once into its cache."""
    try:
        module = _module(options)
        module.prepare_data()
        module.setup("fit")
        module.setup("test")
    except (ValueError, OSError, RuntimeError) as error:
        raise ConfigError(str(error)) from error
    parts = {name: _shrunk(part, options.shrink) for name, part in module.parts.items()}
    least, pixels = options.batch * LARGEST_WORKERS, parts["train"].pixels
    if len(pixels) < least:
        raise ConfigError(
            f"limit={options.limit} with batch={options.batch} leaves {len(pixels)} training images; "
            f"one step of {LARGEST_WORKERS} workers needs {least}: raise limit or lower batch"
        )
    cropped: dict[str, Any] = {"crop_padding": options.crop_padding, "flip": options.data != "digits"}
    augmented = BatchTransform(module.mean, module.std, **cropped)
    return Prepared.made(parts, augmented, BatchTransform(module.mean, module.std), options.eval_batch)


def _module(options: Any) -> ImageData:
    loading: dict[str, Any] = {
        "batch_size": options.batch, "holdout": options.holdout, "limit": options.limit, "limit_test": options.limit_test,
    }  # fmt: skip
    if options.data == "digits":
        return Digits(**loading)
    assert options.folder is not None
    if options.data == "cifar10":
        return CIFAR10(options.folder, **loading)
    return ImageFolder(options.folder, cache_dir=options.cache_dir, **loading)


def _shrunk(images: Images, factor: int) -> Images:
    """Mean over squares of ``factor`` x ``factor`` pixels."""
    if factor == 1:
        return images
    parts = [
        torch.nn.functional.avg_pool2d(part.float(), factor).round().to(torch.uint8)
        for part in images.pixels.split(4096)  # floats of all images at once would be four times the memory
    ]
    return Images(torch.cat(parts), images.labels.clone())


def make_trainer(case: Case, options: Any) -> Trainer:
    """The trainer of ``case``."""
    network = make_network(case, options, prepared(options).examples.pixels.shape[1])
    recipe = recipe_of(case, options)
    if case.method in ("single", "ddp"):
        return DataParallel(network, recipe.optimizer(network, case.lr), case.workers, recipe)
    steps = steps_of(options.samples, options.batch, case.workers)
    simulator = Simulator(
        network, lambda copied: recipe.optimizer(copied, case.lr), config_of(case, options), case.workers, steps
    )
    return Simulated(simulator, recipe)


def recipe_of(case: Case, options: Any) -> Recipe:
    """The recipe, the same for all methods."""
    return Recipe(options.schedule, options.smoothing, options.nesterov, case.optimizer)


def measure(case: Case, options: Any) -> dict[str, Any]:
    """Train and evaluate ``case``: a row of a record, accuracies in per cent."""
    started, data = time.perf_counter(), prepared(options)
    steps = steps_of(options.samples, options.batch, case.workers)
    curve = Curve(data, stops(steps, options.evaluations))
    stream = data.stream(options.batch, case.seed)
    rates = recipe_of(case, options).rates(case.lr, steps)
    trainer = train(make_trainer(case, options), stream, case.workers, rates, curve)
    best = max(curve.points, key=lambda point: (point["holdout"], point["step"]))  # of equal ones the later
    return {
        **curve.row(),
        "selected": best["test"],
        "local_steps_done": steps,
        "samples": steps * case.workers * options.batch,
        "policies": trainer.policies(data.test)
        if isinstance(trainer, Simulated) and case.method in PARTITIONING
        else {},
        "seconds": round(time.perf_counter() - started, 1),
    }
