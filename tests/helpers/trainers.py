"""Lightning Trainers as workers of one group, in forked processes: they cost a second, where a launcher takes ten.

``run_trainers`` sets torchrun's variables in every worker: ``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT``. So a
``Trainer`` in it finds processes that exist already, and its strategy makes the process group and destroys it.
The launchers themselves are tested by ``tests/integration/test_launchers.py``.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn
from torch.optim import Optimizer

from resist_lightning import (
    Config,
    Engine,
    ISTStrategy,
    LocalSGDStrategy,
    NeuronConfig,
    NeuronSimulator,
    ResISTStrategy,
    Simulator,
)
from resist_lightning.strategies.base import SubnetStrategy
from tests.helpers.plain import Classifier, batch_of, stream
from tests.helpers.processes import run_workers, run_workers_to_the_end
from tests.helpers.training import clone_state
from tests.helpers.worker import Outcome

DEVICES = "RESIST_LIGHTNING_TEST_DEVICES"  # not WORLD_SIZE, which Lightning deletes after a Trainer's run

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
}
"""Options that turn off a Trainer's defaults, which are tested where they matter."""


def run_trainers(target: Callable[..., Any], workers: int, *args: Any, timeout: float = 100.0) -> list[Any]:
    """Call ``target(worker, *args)`` in ``workers`` processes that are set up for a Trainer; see ``run_workers``."""
    return run_workers(_with_environment, workers, target, args, timeout=timeout)


def run_cases(target: Callable[..., Any], cases: dict[Any, Any], folder: Path) -> dict[Any, list[Any]]:
    """Call ``target(worker, case, folder of the case)`` for each case; returns the workers' values by the case's name.

    Cases with the same number of workers (``case.workers``) share processes: the first training of a process takes
    0.24 s of CPU, a later one 0.19 s.
    """
    results: dict[Any, list[Any]] = {}
    for workers in sorted({case.workers for case in cases.values()}):
        together = {name: case for name, case in cases.items() if case.workers == workers}
        # Below pytest's own timeout, so that a hang (once with loader processes, unexplained) shows its stacks.
        found = run_trainers(_each_case, workers, target, together, str(folder), timeout=100)
        results |= {name: [of_worker[name] for of_worker in found] for name in together}
    return results


Training = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function and its arguments after the first, which is the number of the process."""


def run_in_turn(trainings: dict[str, Training], processes: int) -> dict[str, list[Any]]:
    """Call each training in the same processes, one after the other; returns the values of all processes by name."""
    results = run_trainers(_in_turn, processes, trainings, timeout=100)
    return {name: [of_process[name] for of_process in results] for name in trainings}


def run_trainers_and_by_hand(
    target: Callable[..., Any], by_hand: Callable[..., Any], workers: int, *args: Any
) -> tuple[list[Any], list[Any]]:
    """Like ``run_trainers``; also returns the values of ``by_hand(worker, *args)``, called before, in a group."""
    results = run_workers(_by_hand_first, workers, target, by_hand, args)
    return [result for result, _ in results], [expected for _, expected in results]


def run_trainers_to_the_end(
    target: Callable[..., Any], workers: int, *args: Any, timeout: float = 60.0
) -> list[Outcome]:
    """Like ``run_trainers``, but no failure ends the others; see ``run_workers_to_the_end``."""
    return run_workers_to_the_end(_with_environment, workers, target, args, timeout=timeout)


def make_trainer(strategy: Any, **options: Any) -> L.Trainer:
    """A Trainer of this process's worker, with ``QUIET`` unless ``options`` say otherwise."""
    return L.Trainer(**{"strategy": strategy, "devices": int(os.environ.get(DEVICES, "1")), **QUIET, **options})


def make_strategy(face: str = "resist", **options: Any) -> SubnetStrategy:
    """A strategy with rounds of three steps and, for ``resist``, ``min_blocks=1``, unless ``options`` say otherwise."""
    if face == "local_sgd":
        return LocalSGDStrategy(**{"local_steps": 3, **options})
    if face == "ist":
        return ISTStrategy(**{"local_steps": 3, **options})
    return ResISTStrategy(**{"local_steps": 3, "min_blocks": 1, **options})


def kind_for(face: str = "resist", **_: Any) -> str:
    """The network of ``Classifier`` that a strategy can divide."""
    return "chain" if face == "ist" else "preact"


def fit(worker: int, module: L.LightningModule, epoch: int, strategy: Any = None, **options: Any) -> L.Trainer:
    """Train ``module`` on this worker's stream, by default for one epoch; returns the Trainer."""
    validation = options.pop("val_dataloaders", None)
    trainer = make_trainer(strategy or make_strategy(), **{"max_epochs": 1, **options})
    trainer.fit(module, stream(worker, epoch), validation)
    return trainer


def train_by_hand(
    worker: int,
    module: Classifier,
    config: Config | NeuronConfig,
    steps: int,
    each_step: Callable[[Engine, int], None] | None = None,
) -> Engine:
    """The same training in a plain PyTorch loop, with the engine and without Lightning; in a group."""
    optimizer = module.configure_optimizers()
    engine = Engine(module, [optimizer], config)
    engine.start()
    module.train()
    for step in range(steps):
        optimizer.zero_grad()
        module.training_step(batch_of(worker, step), step).backward()
        optimizer.step()
        engine.after_step()
        if each_step is not None:
            each_step(engine, step)
    engine.finish()
    return engine


def loop_by_hand(
    module: nn.Module,
    optimizers: list[Optimizer],
    steps: Iterable[Any],
    train_step: Callable[[Any], None],
    forward_context: Callable[[], Any] = nullcontext,
) -> dict[str, Tensor]:
    """A plain loop with the engine, in rounds of three of ``steps``; returns the full model. In a group."""
    engine = Engine(module, optimizers, Config(local_steps=3, min_blocks=1), forward_context=forward_context)
    engine.start()
    module.train()
    for step in steps:
        train_step(step)
        engine.after_step()
    engine.finish()
    return clone_state(module)


def train_in_one_process(
    module: Classifier, config: Config | NeuronConfig, workers: int, steps: int, first_step: int = 0
) -> Simulator | NeuronSimulator:
    """The same training by a reference simulator; it may begin at the border of any round."""
    simulator: Any
    if isinstance(config, NeuronConfig):
        simulator = NeuronSimulator(module, lambda copy: copy.configure_optimizers(), config, workers)
        simulator.clock.round = first_step // config.local_steps
        simulator._begin_round([{}] * workers)
    else:
        simulator = Simulator(module, lambda copy: copy.configure_optimizers(), config, workers)
        simulator.clock.round = first_step // config.local_steps
        simulator._begin_round(simulator.workers[0].copies())
    for step in range(first_step, first_step + steps):
        for number, worker in enumerate(simulator.workers):
            assert isinstance(worker.module, Classifier)
            worker.module.train()
            worker.optimizers[0].zero_grad()
            worker.module.training_step(batch_of(number, step), step).backward()
            worker.optimizers[0].step()
        simulator.after_step()
    return simulator


def traces(module: nn.Module) -> list[str]:
    """Traces of a strategy on a module: hooks, replaced forwards, absent tensors and gradients."""
    found = []
    for name, child in module.named_modules():
        hooks = [*child._forward_hooks.values(), *child._forward_pre_hooks.values(), *child._backward_hooks.values()]
        found += [f"{name}: {hook}" for hook in hooks]
        found += [f"{name}: {key} replaced" for key in ("forward", "__call__") if key in vars(child)]
    found += [
        f"{name}: absent" for name, value in [*module.named_parameters(), *module.named_buffers()] if value.is_meta
    ]
    found += [
        f"{name}: gradient" for name, value in module.named_parameters() if value.grad is not None and value.is_meta
    ]
    return found


def _each_case(worker: int, target: Callable[..., Any], cases: dict[Any, Any], folder: str) -> dict[Any, Any]:
    results = {}
    for number, (name, case) in enumerate(cases.items()):
        own = Path(folder, f"{case.workers}-{number}")
        own.mkdir(exist_ok=True)  # shared with the other workers
        results[name] = target(worker, case, str(own))
    return results


def _in_turn(process: int, trainings: dict[str, Training]) -> dict[str, Any]:
    return {name: train(process, *args) for name, (train, args) in trainings.items()}


def _by_hand_first(
    worker: int, target: Callable[..., Any], by_hand: Callable[..., Any], args: tuple[Any, ...]
) -> tuple[Any, Any]:
    expected = by_hand(worker, *args)
    return _with_environment(worker, target, args), expected


def _with_environment(worker: int, target: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Leave the group of ``run_workers`` and set the variables with which Lightning makes its own."""
    workers = dist.get_world_size()
    port = agree_on_a_port(worker)
    dist.destroy_process_group()
    variables = {
        "OMP_NUM_THREADS": "1",  # or Lightning would choose, and threads change the last bit
        "LOCAL_RANK": str(worker),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(workers),
        DEVICES: str(workers),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    os.environ.update(variables)
    rank_zero_only.rank = worker  # as if Lightning had been imported with these variables
    return target(worker, *args)


def agree_on_a_port(worker: int) -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = torch.tensor([free.getsockname()[1]])
    dist.broadcast(port, src=0)
    dist.barrier()
    return int(port.item())
