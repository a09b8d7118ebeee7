"""Compares the weights of two gloo workers over TCP with those of the simulator, on the same images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from experiments.accuracy.cases import Case, base, config_of, make_network
from experiments.accuracy.training import make_trainer, prepared, recipe_of
from experiments.harness.workers import forked
from experiments.trainers import accuracy, differences, set_rate, sgd_step, steps_of, train
from resist_lightning import Engine

WORKERS = 2


def cases(options: Any) -> list[Case]:
    """One case per method that communicates."""
    return [base(method, WORKERS, 0, options) for method in ("resist", "local_sgd", "ddp")]


def compare(cases: Sequence[Case], options: Any) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Train cases in real processes and in the simulator, on the same images, and compare the full models."""
    torch.set_num_threads(1)
    for case in cases:
        data = prepared(options)
        recipe = recipe_of(options)
        rates = recipe.rates(case.lr, steps_of(options.check_samples, options.batch, WORKERS))
        start = make_network(case, options, data.examples.pixels.shape[1])
        before = {name: value.clone() for name, value in start.state_dict().items()}
        with TemporaryDirectory() as folder:
            place = Path(folder) / "model.pt"
            forked(_train, (place, case, start, data.stream(options.batch, case.seed), recipe, rates, options), WORKERS)
            real = torch.load(place, weights_only=True)
        stream = data.stream(options.batch, case.seed)
        # The same examples once more, as the stream of the workers' processes has not moved this one.
        simulated = train(make_trainer(case, options), stream, WORKERS, rates).full_model()
        start.load_state_dict(real)
        yield (
            case,
            {
                "local_steps": len(rates),
                **differences(simulated.state_dict(), real, before),
                "test_simulated": accuracy(simulated, data.test),
                "test_real": accuracy(start, data.test),
            },
        )


def _train(worker: int, task: tuple[Any, ...]) -> None:
    """One real worker: a plain loop, as a user would write it."""
    place, case, model, stream, recipe, rates, options = task
    optimizer = recipe.optimizer(model, case.lr)
    trained = DistributedDataParallel(model) if case.method == "ddp" else model
    engine = None if case.method == "ddp" else Engine(model, [optimizer], config_of(case, options))
    if engine:
        engine.start()
    for step, lr in enumerate(rates):
        x, y = stream.batch(step, worker, WORKERS)
        trained.train()
        set_rate(optimizer, lr)
        sgd_step(trained, optimizer, x, y, recipe)
        if engine:
            engine.after_step()
    if engine:
        engine.finish()
    if worker == 0:
        torch.save(model.state_dict(), place)
