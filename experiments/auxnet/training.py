"""Trains one case in real processes: every method on the same images in the same order, in one and the same loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from statistics import mean, median
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.multiprocessing import ProcessRaisedException
from torch.nn import functional

from experiments.auxnet.cases import ALL, LATE, SERIAL_STAGES, Case, Scale, settings_of, stored
from experiments.auxnet.closed_form import held_bytes, sent_bytes
from experiments.auxnet.methods import Layered, Method, Pipelined, Serial, boundary_elements, parameters_of
from experiments.data import Digits, Fake, ImageFolder
from experiments.data.module import ImageData
from experiments.harness.settings import ConfigError
from experiments.harness.workers import forked
from experiments.networks import SmallImageResNet
from experiments.trainers import Prepared, Recipe, Stream, accuracy, make_optimizer, set_rate
from experiments.trainers import stops as stops_of
from resist_lightning import NotFinite, StageConfig, StageSimulator

CLASSES = 10
# Results that every worker reports of itself, and those that worker 0 reports of all.
EACH = ("aux_parameters", "stored_bytes", "sent_by_step", "kernel_sent_by_step")
OF_ALL = ("running", "aux_fed", "mismatch", "predicted", "timeline")
ROUND = 50  # steps between two handshakes of AuxNet's workers, at most


@lru_cache(maxsize=2)
def prepared(task: str, size: str, folder: str | None, cache_dir: str) -> Prepared:
    """Read a task's images."""
    try:
        module = _module(task, size, folder, cache_dir)
        module.prepare_data()
        return Prepared.of(module)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error


def scale_of(task: str, size: str) -> Scale:
    """The size of a task in a study of this size."""
    return ALL[task].scales[size]


def input_shape(task: str) -> tuple[int, int, int]:
    """Channels, height and width of an image."""
    pixels = ALL[task].pixels
    return (1 if ALL[task].images == "digits" else 3), pixels, pixels


def make_network(task: str, size: str, seed: int) -> nn.Module:
    """The task's network before training: of a seed, the same for all methods and workers."""
    scale = scale_of(task, size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        channels = input_shape(task)[0]
        network = SmallImageResNet(scale.blocks, scale.width, num_classes=CLASSES, in_channels=channels)
    layout = torch.channels_last if ALL[task].channels_last else torch.contiguous_format
    return network.to(memory_format=layout)


def _module(task: str, size: str, folder: str | None, cache_dir: str) -> ImageData:
    chosen, scale = ALL[task], scale_of(task, size)
    loading: dict[str, Any] = {
        "batch_size": scale.batch,
        "holdout": chosen.holdout,
        "limit": scale.limit,
        "limit_test": scale.limit_test,
    }
    if chosen.images == "digits":
        return Digits(**loading)
    if chosen.images == "random":
        return Fake(train_size=scale.batch * 16, test_size=CLASSES, image_size=chosen.pixels, **loading)
    assert folder is not None
    return ImageFolder(folder, cache_dir=cache_dir, image_size=chosen.pixels, **loading)


@dataclass(frozen=True)
class Job:
    """A case, with the data and the length of its training."""

    case: Case  # the training
    size: str  # of the study
    data: Prepared  # the images, read before the processes start
    steps: int  # of the training
    stops: frozenset[int]  # numbers of steps after which the whole network is evaluated
    # first steps whose time is not counted: of a warm-up, or in which guesses are stored for the first time
    uncounted: int


Launch: TypeAlias = Callable[[Job], list[dict[str, Any]]]  # runs `work` on a job's workers; returns their results


def alone_here(job: Job) -> list[dict[str, Any]]:
    """The workers as processes of this host, which find each other by a file."""
    return forked(work, job, job.case.workers)


@dataclass
class Clock:
    """Seconds of a worker's steps."""

    data: list[float] = field(default_factory=list)  # to make each batch
    whole: list[float] = field(default_factory=list)  # of each step, with that

    def told(self, uncounted: int, period: int = 1) -> dict[str, float]:
        """Seconds of the steps after the uncounted first ones; the training's seconds are of all.

        Where every step of a ``period`` is of another kind, seconds are the medians of each kind, and their mean.
        """
        start = min(uncounted, len(self.whole) - 1)
        kinds = [self.whole[start + kind :: period] for kind in range(period)]
        return {
            "step_seconds": mean(median(kind) for kind in kinds if kind),
            "mean_step_seconds": mean(self.whole[start:]),
            "data_seconds": median(self.data[start:]),
            "training_seconds": sum(self.whole),
        }


def measure(case: Case, options: Any, *, steps: int | None = None, launch: Launch = alone_here) -> dict[str, Any]:
    """Train ``case`` and evaluate it: a row of a record, accuracies in per cent; or a note of NaN or infinity.

    ``steps`` are given for a training that is only timed; None takes the epochs of the options or of the task.
    """
    started = time.perf_counter()
    data = prepared(case.task, options.size, options.folder, options.cache_dir)
    scale = scale_of(case.task, options.size)
    per_epoch = data.stream(scale.batch, case.seed).pass_length // scale.batch
    stops: frozenset[int] = frozenset()
    warmup = 0 if case.method == SERIAL_STAGES else case.warmup_steps or 0  # where all steps are of it, it is timed
    serial = max(warmup, per_epoch if stored(case.method) else 0)
    uncounted = max(1, serial)
    if steps is None:
        steps = per_epoch * (options.epochs or scale.epochs)
        stops = stops_of(steps, options.evaluations)
    else:
        uncounted = serial + steps // 3
    job = Job(case, options.size, data, steps, stops, uncounted)
    try:
        workers = launch(job)
    except ProcessRaisedException as error:
        if NotFinite.__name__ not in str(error):  # the worker's exception comes as text
            raise
        return {"diverged": True, "seconds": round(time.perf_counter() - started, 1)}
    curve = workers[0]["curve"]
    last = {"last": curve[-1]["test"], "last_holdout": curve[-1]["holdout"]} if curve else {}
    return {
        **last,
        "curve": curve,
        **{key: workers[0].get(key) for key in OF_ALL},
        **{key: max(worker["clock"][key] for worker in workers) for key in workers[0]["clock"]},
        "steps": steps,
        "steps_per_epoch": per_epoch,
        **{key: [worker.get(key) for worker in workers] for key in ("held_bytes", *EACH)},
        **by_formula(case, options.size, [worker["aux_parameters"] for worker in workers]),
        "seconds": round(time.perf_counter() - started, 1),
    }


def simulate(case: Case, options: Any) -> dict[str, Any]:
    """Train ``case`` by the reference simulator, and evaluate it: a row without seconds and counted bytes."""
    started = time.perf_counter()
    data = prepared(case.task, options.size, options.folder, options.cache_dir)
    scale = scale_of(case.task, options.size)
    stream = stream_of(Job(case, options.size, data, 0, frozenset(), 0))
    per_epoch = stream.pass_length // scale.batch
    steps = per_epoch * (options.epochs or scale.epochs)
    config = StageConfig(cuts=cuts_of(case, options.size), seed=case.seed, **settings_of(case))
    simulator = StageSimulator(
        make_network(case.task, options.size, case.seed).train(),
        lambda module: make_optimizer(module, case.lr),
        config,
        case.workers,
        stream.batch(0, 0, 1)[0],
    )
    curve = []
    for step, lr in enumerate(rates_of(case, steps)):
        x, y = stream.batch(step, 0, 1)
        set_rate(simulator.optimizers[0], lr)
        simulator.step(x, partial(functional.cross_entropy, target=y))
        if step + 1 in stops_of(steps, options.evaluations):
            curve.append({"step": step + 1, **data.accuracies(simulator.full_model())})
    return {
        "last": curve[-1]["test"],
        "last_holdout": curve[-1]["holdout"],
        "curve": curve,
        "running": accuracy(simulator.full_model("running"), data.test),
        "aux_fed": None,
        "mismatch": None,
        "steps": steps,
        "steps_per_epoch": per_epoch,
        **by_formula(case, options.size, [0] * case.workers),
        "seconds": round(time.perf_counter() - started, 1),
    }


def rates_of(case: Case, steps: int) -> list[float]:
    """The learning rate of each step, by the task's schedule."""
    return Recipe(ALL[case.task].schedule).rates(case.lr, steps)


def by_formula(case: Case, size: str, aux_parameters: Sequence[int]) -> dict[str, Any]:
    """Bytes that a worker sends and holds, by closed form."""
    cuts = cuts_of(case, size)
    with torch.device("meta"):
        network = make_network(case.task, size, case.seed)
    elements = boundary_elements(network, cuts, input_shape(case.task))
    batch = scale_of(case.task, size).batch
    return {
        "parameters": parameters_of(network, cuts),
        "sent_by_formula": sent_bytes(case.method, batch, elements, CLASSES),
        "held_by_formula": held_bytes(parameters_of(network, cuts), aux_parameters, delayed=case.method in LATE),
    }


def cuts_of(case: Case, size: str) -> tuple[str, ...]:
    """The modules behind which the case's network is cut."""
    return scale_of(case.task, size).cuts[case.workers] if case.workers > 1 else ()


def make_method(job: Job) -> Method:
    """A worker's training method. Collective: every worker must call this, in the same order."""
    case = job.case

    def network() -> nn.Module:
        return make_network(case.task, job.size, case.seed)

    if case.method == "serial":
        return Serial(network(), case.lr)
    if case.method == "pipeline":
        assert case.schedule is not None
        assert case.micro_batches is not None
        return Pipelined(network, cuts_of(case, job.size), case.lr, case.schedule, case.micro_batches)
    round_steps = max(1, min(ROUND, (job.steps - job.uncounted) // 2))
    example, _ = stream_of(job).batch(0, 0, 1)
    cuts = cuts_of(case, job.size)
    return Layered(network(), cuts, case, round_steps=round_steps, uncounted=job.uncounted, example=example)


def stream_of(job: Job) -> Stream[Any]:
    """The batches of a case, the same on all workers: in every epoch all images that fill whole steps, the same ones.

    So an epoch has seen every image that a later one has, which the methods with stored guesses need.
    """
    batch = scale_of(job.case.task, job.size).batch
    stream = job.data.stream(batch, job.case.seed, augment=job.case.augment)
    generator = torch.Generator().manual_seed(0)
    kept = torch.randperm(len(stream.examples.labels), generator=generator)[: stream.pass_length]
    return Stream(stream.examples.take(kept), stream.transform, batch, job.case.seed)


def work(worker: int, job: Job, done: Callable[[int], None] = lambda steps: None) -> dict[str, Any]:
    """A worker of a training; ``done`` is called before each step, and after the last, with the number of steps done.

    ::

        make batch | step | make batch | step | full model, evaluation | make batch ...
        └── data ──┘      └── data ──┘          (not in any time)
        └──── whole ──────┴──── whole ─────┘
    """
    method, clock = make_method(job), Clock()
    case, curve = job.case, []
    stream, held = stream_of(job), 0
    for step, lr in enumerate(rates_of(case, job.steps)):
        done(step)
        began = time.perf_counter()
        x, y = stream.batch(step, 0, 1)
        made = time.perf_counter()
        method.set_rate(lr)
        method.step(x, y)
        ended = time.perf_counter()
        clock.data.append(made - began)
        clock.whole.append(ended - began)
        if step < 2:  # momentum is there after the first step; to look in each would be part of its time
            held = max(held, method.held_bytes())
        if step + 1 in job.stops:
            with method.full_model() as model:
                if worker == 0:
                    curve.append({"step": step + 1, **job.data.accuracies(model)})
    done(job.steps)
    held = max(held, method.held_bytes())
    return {
        "curve": curve,
        "clock": clock.told(job.uncounted, case.serial_every or 1),
        "held_bytes": held,
        **(method.explained(job.data) if job.stops else {}),
        **method.told(),
    }
