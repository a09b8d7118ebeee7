"""The same small training by real processes and by the reference simulator."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from resist_lightning import Config, Engine, Simulator
from resist_lightning.comm.collective import Collective
from resist_lightning.models import PreActResNet
from tests.helpers.nets import Normed
from tests.helpers.threads import run_threads

CLASSES = 4

_ONE_AT_A_TIME = threading.Lock()  # workers may be threads, which share a random generator


@dataclass(frozen=True)
class Run:
    """A small training run; picklable, so that workers build it by themselves."""

    config: Config
    steps: int
    sections: tuple[int, ...] = (1, 1, 5, 1)
    optimizer: str = "sgd"
    frozen: tuple[str, ...] = ()
    observe_at: tuple[int, ...] = field(default=())
    decay: float = 1.0  # factor of the learning rate after each step
    net: Callable[[], nn.Module] | None = None  # another network than the usual one


SmallRun = partial(Run, net=Normed)
"""A run of a network that trains in a third of the time."""


def make_model(run: Run) -> nn.Module:
    """A pre-activation network of about 10,000 parameters, or the run's own, the same in every process."""
    with _ONE_AT_A_TIME, torch.random.fork_rng():
        torch.manual_seed(7)
        model = run.net() if run.net else PreActResNet(run.sections, CLASSES, width_multiplier=1 / 16)
    for name, parameter in model.named_parameters():
        if any(part in name for part in run.frozen):
            parameter.requires_grad_(False)
    return model


def make_optimizer(run: Run, model: nn.Module) -> Optimizer:
    if run.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)


def batch_of(worker: int, step: int) -> tuple[Tensor, Tensor]:
    """The batch that a worker sees at a step."""
    generator = torch.Generator().manual_seed(1000 * worker + step)
    x = torch.randn(8, 3, 8, 8, generator=generator)
    return x, torch.randint(0, CLASSES, (8,), generator=generator)


def train_step(model: nn.Module, optimizer: Optimizer, batch: tuple[Tensor, Tensor]) -> None:
    model.train()
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


def start_engine(
    collective: Collective, run: Run, initial: dict[str, Tensor] | None = None
) -> tuple[Engine, Optimizer]:
    """A started engine and its optimizer, for a plain loop."""
    model = make_model(run)
    if initial is not None:
        model.load_state_dict(initial)
    optimizer = make_optimizer(run, model)
    engine = Engine(model, [optimizer], run.config, collective=collective)
    engine.start()
    return engine, optimizer


def train_steps(engine: Engine, optimizer: Optimizer, steps: range) -> None:
    """Take local steps of a worker in a plain loop."""
    for step in steps:
        train_step(engine.module, optimizer, batch_of(engine.collective.worker, step))
        engine.after_step()


def decay(run: Any, optimizer: Optimizer) -> None:
    """Lower the learning rate by the run's factor."""
    for group in optimizer.param_groups:
        group["lr"] *= run.decay


def train_engine(
    worker: int,
    run: Run,
    each_step: Callable[[Engine, int], None] | None = None,
    collective: Collective | None = None,
) -> tuple[Engine, dict[str, Tensor]]:
    """Train this process's worker to the end; returns the engine and the full model's state."""
    model = make_model(run)
    optimizer = make_optimizer(run, model)
    engine = Engine(model, [optimizer], run.config, collective=collective, total_steps=run.steps)
    engine.start()
    for step in range(run.steps):
        train_step(model, optimizer, batch_of(worker, step))
        decay(run, optimizer)
        engine.after_step()
        if step in run.observe_at:
            with engine.full_model():
                model.eval()(batch_of(0, 0)[0])
        if each_step is not None:
            each_step(engine, step)
    engine.finish()
    return engine, clone_state(model)


def ends_of_resumed(
    collective: Collective, run: Run, stops: tuple[int, ...], initial: dict[str, Tensor]
) -> dict[int, dict[str, Tensor]]:
    """The final models of a run that is stopped after each of ``stops`` and resumed by a new engine; also after 0."""
    found: dict[int, dict[str, Tensor]] = {}
    for stop in (0, *stops):
        # Threads share a generator, so the weights come from the test.
        engine, optimizer = start_engine(collective, run, initial)
        train_steps(engine, optimizer, range(stop))
        with engine.full_model("checkpoint"):
            full, place, own = clone_state(engine.module), engine.checkpoint_state(), engine.resumption.state_dict()
            own = copy.deepcopy(own)
        engine.abandon()
        found[stop] = end_of_resumed(collective, run, stop, full, place, own)
    return found


def end_of_resumed(
    collective: Collective,
    run: Run,
    stop: int,
    full: dict[str, Tensor],
    place: dict[str, Any],
    own: dict[str, Any],
) -> dict[str, Tensor]:
    """The final model of a run that a new engine resumes exactly after ``stop`` steps."""
    model = make_model(run)
    model.load_state_dict(full)
    optimizer = make_optimizer(run, model)
    engine = Engine(model, [optimizer], run.config, collective=collective)
    assert engine.restore(place, own)
    assert engine.start()
    train_steps(engine, optimizer, range(stop, run.steps))
    engine.finish()
    return clone_state(model)


def slow_down(collective: Collective, seconds: float) -> None:
    """Make averages slower, as over a slow link; not those beside the training, which have their own collective."""
    reduce = collective.start_all_reduce

    def slow(flat: Tensor, kind: str) -> Callable[[], Tensor]:
        time.sleep(seconds)
        return reduce(flat, kind)

    collective.start_all_reduce = slow  # type: ignore[method-assign]


def train_simulator(run: Run, workers: int, table: dict[str, Any] | None = None) -> Simulator:
    """The same training by the reference simulator; with a table, by the shares that real workers have measured."""
    simulator = Simulator(make_model(run), lambda model: make_optimizer(run, model), run.config, workers, run.steps)
    if table is not None:
        simulator.schedule = simulator.schedule.with_state_dict(table)
    for step in range(run.steps):
        for number, worker in enumerate(simulator.workers):
            train_step(worker.module, worker.optimizers[0], batch_of(number, step))
            decay(run, worker.optimizers[0])
        simulator.after_step()
    return simulator


def assert_threads_train_what_the_simulator_trains(run: Run, workers: int, **other: Any) -> None:
    """Workers as threads end with the simulator's full model; with ``other`` options it would differ."""
    states, _ = run_threads(trained_in_thread, workers, run)
    expected = train_simulator(run, workers).full_model().state_dict()
    assert_equal_states(states[0], expected)
    for state in states[1:]:
        assert_equal_states(state, states[0], exactly=True)
    without = train_simulator(replace(run, config=replace(run.config, **other)), workers).full_model().state_dict()
    assert any(not torch.allclose(without[name].float(), expected[name].float(), rtol=1e-3) for name in expected)


def trained_in_thread(collective: Collective, run: Run) -> dict[str, Tensor]:
    """A worker's full model at the end of its training."""
    return train_engine(collective.worker, run, collective=collective)[1]


def present_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers that this worker holds, by name, detached."""
    named: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in named if not tensor.is_meta}


def present_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of :func:`present_tensors`."""
    return {name: tensor.clone() for name, tensor in present_tensors(model).items()}


def held_tensors(module: nn.Module) -> dict[str, Tensor]:
    """All tensors of a state dict; also of a partial network, whose state_dict() raises."""
    hidden = {
        f"{name}.{key}" if name else key
        for name, child in module.named_modules()
        for key in child._non_persistent_buffers_set
    }
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach() for name, tensor in named if name not in hidden}


def clone_state(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all tensors of a state dict; also of a partial network."""
    return {name: tensor.clone() for name, tensor in held_tensors(module).items()}


def assert_equal_states(actual: dict[str, Any], expected: dict[str, Any], *, exactly: bool = False) -> None:
    """Same names, same values; fails on an empty state."""
    assert expected
    assert actual.keys() == expected.keys()
    tolerance = {"rtol": 0.0, "atol": 0.0} if exactly else {"rtol": 1e-4, "atol": 1e-5}
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def engine_for(config=None, run=None, **options):
    """A single worker's engine, its model and optimizer."""
    run = run or Run(config or Config(local_steps=3), steps=0)
    model = make_model(run)
    optimizer = make_optimizer(run, model)
    return Engine(model, [optimizer], run.config, **options), model, optimizer


def trained_engine(run, steps, *, finish=True):
    """A single worker's engine after some steps, its model and optimizer."""
    engine, model, optimizer = engine_for(run=run)
    engine.start()
    for step in range(steps):
        train_step(model, optimizer, batch_of(0, step))
        engine.after_step()
    if finish:
        engine.finish()
    return engine, model, optimizer
