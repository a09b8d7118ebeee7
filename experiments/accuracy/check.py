"""Real processes against the simulator: two gloo workers over TCP, the same images, the same weights at the end?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from experiments.accuracy.cases import Case, base, config_of
from experiments.accuracy.data import Prepared, Stream, prepare
from experiments.accuracy.networks import make_network
from experiments.accuracy.settings import Settings
from experiments.accuracy.training import accuracy, make_optimizer, make_trainer, rate, set_rate, steps_of, train
from resist_lightning import Engine

WORKERS = 2
METHODS = ("resist", "local_sgd", "ddp")


def cases(settings: Settings) -> list[Case]:
    """One case per method that communicates."""
    return [base(method, WORKERS, 0, settings) for method in METHODS]


def compare(cases: Sequence[Case], settings: Settings) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Train cases in real processes and in the simulator, on the same images, and compare the full models."""
    if not cases:
        return
    torch.set_num_threads(1)
    data = prepare(settings)
    for case, real in zip(cases, _real(cases, settings), strict=True):
        trainer = make_trainer(case, settings, data.channels)
        train(trainer, case, settings, data, settings.check_samples)
        yield case, _compared(case, settings, data, trainer.full_model(), real)


def _compared(
    case: Case, settings: Settings, data: Prepared, simulated: nn.Module, real: Mapping[str, Tensor]
) -> dict[str, Any]:
    start = make_network(case.network, settings, data.channels, case.seed)
    before = {name: value.clone() for name, value in start.state_dict().items()}
    start.load_state_dict(real)
    ours = {name: value for name, value in simulated.state_dict().items() if value.is_floating_point()}
    differences = {name: float((value - real[name]).abs().max()) for name, value in ours.items()}
    worst = max(differences, key=lambda name: differences[name])
    return {
        "local_steps": steps_of(settings.check_samples, settings.batch, case.workers),
        "tensors": len(differences),
        "equal_tensors": sum(value == 0 for value in differences.values()),
        "largest_difference": differences[worst],
        "largest_difference_in": worst,
        "largest_change_by_training": max(float((value - before[name]).abs().max()) for name, value in ours.items()),
        "test_simulated": accuracy(simulated, data.test),
        "test_real": accuracy(start, data.test),
    }


def _real(cases: Sequence[Case], settings: Settings) -> list[dict[str, Tensor]]:
    """The full models' tensors after training in real processes, one case after the other in the same processes."""
    with TemporaryDirectory() as folder:
        mp.spawn(_worker, args=(folder, cases, settings), nprocs=WORKERS)
        return [torch.load(Path(folder) / f"{number}.pt", weights_only=True) for number in range(len(cases))]


def _worker(worker: int, folder: str, cases: Sequence[Case], settings: Settings) -> None:
    torch.set_num_threads(1)
    handshake_place = f"file://{folder}/handshake"  # no port that another process could take
    dist.init_process_group("gloo", init_method=handshake_place, rank=worker, world_size=WORKERS)
    try:
        data = prepare(settings)
        for number, case in enumerate(cases):
            model = _trained(worker, case, settings, data)
            if worker == 0:
                torch.save(model.state_dict(), Path(folder) / f"{number}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _trained(worker: int, case: Case, settings: Settings, data: Prepared) -> nn.Module:
    """One real worker: a plain loop, as a user would write it."""
    model = make_network(case.network, settings, data.channels, case.seed)
    optimizer = make_optimizer(model, case.lr)
    stream = Stream(data.train, data.augmented, settings.batch, case.seed)
    steps = steps_of(settings.check_samples, settings.batch, WORKERS)
    trained = DistributedDataParallel(model) if case.method == "ddp" else model
    engine = None if case.method == "ddp" else Engine(model, [optimizer], config_of(case))
    if engine:
        engine.start()
    for step in range(steps):
        x, y = stream.batch(step, worker, WORKERS)
        trained.train()
        set_rate(optimizer, rate(case.lr, step, steps))
        optimizer.zero_grad()
        nn.functional.cross_entropy(trained(x), y).backward()
        optimizer.step()
        if engine:
            engine.after_step()
    if engine:
        engine.finish()
    return model
