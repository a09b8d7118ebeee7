"""Trainings that are compared on equal samples: the common order of the examples, and the methods in one process."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Generic

import lightning as L
import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn

from experiments.data.arrays import Examples
from experiments.data.module import ArrayData, Transform
from experiments.harness.settings import ConfigError
from resist_lightning import NeuronSimulator, Simulator
from resist_lightning.methods.config import NormPolicy

NORMS: tuple[NormPolicy, ...] = ("recalibrate", "running", "batch")
# Samples are counted in steps of this many workers, so that all methods see exactly the same number.
LARGEST_WORKERS = 8
EVALUATED = 256  # examples of an evaluation step; matters to statistics of each batch
Batches = list[tuple[Tensor, Tensor]]


@dataclass
class Stream(Generic[Examples]):
    """The examples of all workers, as one endless shuffled stream.

    Local step t of S workers takes the next S batches of the stream, one per worker, so that after equal samples all
    methods have seen the same ones. Crops and flips depend on seed, step and worker only: a real process draws what
    the simulator draws for it.
    """

    examples: Examples  # of the training
    transform: Transform[Examples]  # augmentation and normalisation of a batch
    batch_size: int  # examples per worker and step
    seed: int  # of order and augmentation; 0 is a seed

    def __post_init__(self) -> None:
        """Set the length of a pass: whole steps, for any number of workers that is compared."""
        step = self.batch_size * LARGEST_WORKERS
        self.pass_length = len(self.examples.labels) // step * step
        self._pass = -1
        self._order = torch.empty(0)

    def batch(self, step: int, worker: int, workers: int) -> tuple[Tensor, Tensor]:
        """Batch of ``worker`` in local step ``step``, from 0."""
        start = (step * workers + worker) * self.batch_size
        number, place = divmod(start, self.pass_length)
        if number != self._pass:
            # No two passes, of one seed or of neighbours, share an order.
            generator = torch.Generator().manual_seed(self.seed * 10_000 + number)
            self._pass = number
            self._order = torch.randperm(len(self.examples.labels), generator=generator)
        with torch.random.fork_rng(devices=[]):
            # One stream of random numbers for each seed, step and worker, whoever asks first.
            torch.manual_seed((self.seed * 1_000_003 + step) * LARGEST_WORKERS + worker)
            return self.transform(self.examples.take(self._order[place : place + self.batch_size]))


@dataclass(frozen=True)
class Prepared:
    """The examples of a study: those to train on with their transforms, and the others ready to evaluate."""

    examples: Any
    augmented: Transform[Any]
    plain: Transform[Any]
    holdout: Batches
    test: Batches

    @classmethod
    def of(cls, module: ArrayData[Any]) -> Prepared:
        """Read the examples of a data module."""
        module.setup("fit")
        module.setup("test")
        return cls.made(module.parts, module.training_transform, module.evaluation_transform, EVALUATED)

    @classmethod
    def made(cls, parts: dict[str, Any], augmented: Transform[Any], plain: Transform[Any], size: int) -> Prepared:
        """From examples; those of an evaluation are shuffled, always in the same way.

        A folder is sorted by class, and batch statistics of one class mislead.
        """

        def batches(examples: Any) -> Batches:
            order = torch.randperm(len(examples.labels), generator=torch.Generator().manual_seed(0))
            return [plain(examples.take(chosen)) for chosen in order.split(size)]

        return cls(parts["train"], augmented, plain, batches(parts["val"]), batches(parts["test"]))

    def stream(self, batch: int, seed: int, *, augment: bool = True) -> Stream[Any]:
        """The training examples in the order of a seed."""
        return Stream(self.examples, self.augmented if augment else self.plain, batch, seed)

    def accuracies(self, model: nn.Module) -> dict[str, float]:
        """Accuracies on the hold-out and on the test examples, in per cent."""
        training = model.training  # the model may go on being trained
        found = {"holdout": accuracy(model, self.holdout), "test": accuracy(model, self.test)}
        model.train(training)
        return found


@dataclass
class Curve:
    """Accuracies of the full model in the course of a training."""

    data: Prepared
    stops: frozenset[int]  # numbers of steps after which it is evaluated
    points: list[dict[str, float]] = field(default_factory=list)

    def __call__(self, trainer: Trainer, done: int) -> None:
        """Called with the number of steps done."""
        if done in self.stops:
            self.points.append({"step": done, **self.data.accuracies(trainer.full_model())})

    def row(self) -> dict[str, Any]:
        """Its columns in the row of a record."""
        last = self.points[-1]
        best = max(point["test"] for point in self.points)
        return {"last": last["test"], "last_holdout": last["holdout"], "best_on_test": best, "curve": self.points}


@dataclass(frozen=True)
class Recipe:
    """The recipe by which all methods of a comparison are trained; the defaults are the paper's.

    Args:
        method: optimizer: ``sgd``, or ``muon`` for weights of more than one dimension, with AdamW for the others.
        schedule: of the learning rate: ``steps`` (÷10 at 50 % and 75 %) or ``one_cycle`` (up for a fifth, then down to 0).
        smoothing: of labels, from 0.
        nesterov: momentum looks ahead.
    """

    schedule: str = "steps"
    smoothing: float = 0.0
    nesterov: bool = False
    method: str = "sgd"

    def optimizer(self, module: nn.Module, lr: float) -> torch.optim.Optimizer:
        """SGD with the paper's momentum and weight decay, or timm's Muon with its usual ones."""
        if self.method == "sgd":
            return torch.optim.SGD(module.parameters(), lr, momentum=0.9, weight_decay=5e-4, nesterov=self.nesterov)
        try:
            from timm.optim import Muon  # it orthogonalizes convolutions too; torch's takes matrices only
        except ImportError as error:
            raise ConfigError("the study of optimizers needs timm: pip install timm, or choose others") from error
        # Three iterations, not five: they cost as many steps, and time in proportion.
        return Muon(module.parameters(), lr, weight_decay=0.05, momentum=0.95, nesterov=True, ns_steps=3)

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        """The loss: the mean over the batch."""
        return nn.functional.cross_entropy(output, labels, label_smoothing=self.smoothing)

    def rates(self, lr: float, steps: int) -> list[float]:
        """The learning rate of each local step; ``lr`` is the highest."""
        schedule = {"steps": rate, "one_cycle": one_cycle}[self.schedule]
        return [schedule(lr, step, steps) for step in range(steps)]


PAPER = Recipe()


class DataParallel:
    """DDP with S workers, in one process: gradients are the mean of S shards, batch statistics each shard's own.

    As in torch's DDP, the running statistics are those of worker 0, broadcast before every step. The module is trained
    in place.
    """

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, workers: int, recipe: Recipe = PAPER
    ) -> None:
        self.module = module
        self.optimizer = optimizer
        self.workers = workers
        self.recipe = recipe

    def step(self, batches: Batches, lr: float) -> None:
        """Take a step of all workers."""
        set_rate(self.optimizer, lr)
        self.module.train()
        self.optimizer.zero_grad()
        for number in reversed(range(self.workers)):
            before = [buffer.clone() for buffer in self.module.buffers()]
            x, y = batches[number]
            (self.recipe.loss(self.module(x), y) / self.workers).backward()
            if number:  # worker 0 comes last, and its statistics stay
                for buffer, value in zip(self.module.buffers(), before, strict=True):
                    buffer.copy_(value)
        self.optimizer.step()

    def full_model(self, batch_norm: NormPolicy | None = None, scale: float | None = None) -> nn.Module:
        """A copy of the network; it has one kind of statistics and no scale."""
        return copy.deepcopy(self.module)


class Simulated:
    """Local SGD, ResIST or IST with S workers, on one of the package's simulators."""

    def __init__(self, simulator: Simulator | NeuronSimulator, recipe: Recipe = PAPER) -> None:
        self.simulator: Any = simulator
        self.recipe = recipe

    def step(self, batches: Batches, lr: float) -> None:
        """Take a local step of all workers."""
        for worker, (x, y) in zip(self.simulator.workers, batches, strict=True):
            (optimizer,) = worker.optimizers
            set_rate(optimizer, lr)
            sgd_step(worker.module.train(), optimizer, x, y, self.recipe)
        self.simulator.after_step()

    def full_model(self, batch_norm: NormPolicy | None = None, **more: Any) -> nn.Module:
        """The simulator's full model."""
        return self.simulator.full_model(batch_norm, **more)

    def policies(self, test: Batches) -> dict[str, float]:
        """Test accuracy of the same training by batch-norm policy and test-time scale."""
        scales = {"held share": self.simulator.scale, "1/S": 1 / len(self.simulator.workers), "none": 1.0}
        found: dict[str, float] = {}
        for norm in NORMS:
            known: dict[float, float] = {}  # some scales are often equal
            for label, scale in scales.items():
                if scale not in known:
                    known[scale] = accuracy(self.full_model(norm, scale=scale), test)
                found[f"{norm}, {label}"] = known[scale]
        return found


Trainer = DataParallel | Simulated


def make_optimizer(module: nn.Module, lr: float) -> torch.optim.Optimizer:
    """The paper's SGD: momentum 0.9, weight decay 5e-4."""
    return PAPER.optimizer(module, lr)


def sgd_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, recipe: Recipe = PAPER) -> None:
    """Take a step on a batch, by cross entropy: the loop body that a user would write."""
    optimizer.zero_grad()
    recipe.loss(model(x), y).backward()
    optimizer.step()


def median_seconds(steps: Sequence[Callable[[], object]], count: int) -> list[float]:
    """The median seconds of so many calls of each; one more before them warms up.

    They are called in turn, so that other load of the machine slows all of them down alike.
    """
    found: list[list[float]] = [[] for _ in steps]
    for _ in range(count + 1):
        for step, seconds in zip(steps, found, strict=True):
            started = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - started)
    return [median(seconds[1:]) for seconds in found]


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def steps_of(samples: int, batch: int, workers: int) -> int:
    """Local steps of each worker; equal samples for all numbers of workers."""
    return samples // (batch * LARGEST_WORKERS) * LARGEST_WORKERS // workers


def rate(lr: float, step: int, steps: int) -> float:
    """The learning rate: a tenth from half of the steps on, a hundredth from three quarters on, as in the paper."""
    if step < steps / 2:
        return lr
    return lr * (0.1 if step < steps * 3 / 4 else 0.01)


def one_cycle(lr: float, step: int, steps: int) -> float:
    """The learning rate: up linearly in the first fifth of the steps, then down to 0 on half a cosine."""
    rising = steps / 5
    if step < rising:
        return lr * (step + 1) / (rising + 1)
    return lr * (1 + math.cos(math.pi * (step - rising) / (steps - rising))) / 2


def stops(steps: int, evaluations: int) -> frozenset[int]:
    """Numbers of steps after which a training is evaluated, at equal distances; the last one is among them."""
    return frozenset(max(1, steps * number // evaluations) for number in range(1, evaluations + 1))


def train(
    trainer: Trainer,
    stream: Stream[Any],
    workers: int,
    rates: Iterable[float],
    after_step: Callable[[Trainer, int], Trainer | None] = lambda trainer, done: None,
) -> Trainer:
    """Train with these learning rates, one for each local step; a trainer that ``after_step`` returns takes over."""
    for step, lr in enumerate(rates):
        trainer.step([stream.batch(step, worker, workers) for worker in range(workers)], lr)
        trainer = after_step(trainer, step + 1) or trainer
    return trainer


@torch.no_grad()
def accuracy(model: nn.Module, batches: Batches) -> float:
    """Share of right answers, in per cent."""
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    return 100 * right / sum(len(y) for _, y in batches)


def differences(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], before: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The differences of two trained models, which were one model ``before``, as a row of a record.

    Integers, such as a norm's count of batches, are left out.
    """
    found = {name: _distance(value, theirs[name]) for name, value in ours.items() if value.is_floating_point()}
    worst = max(found, key=lambda name: found[name])
    return {
        "tensors": len(found),
        "equal_tensors": sum(value == 0 for value in found.values()),
        "largest_difference": found[worst],
        "largest_difference_in": worst,
        "largest_change_by_training": max(_distance(ours[name], before[name]) for name in found),
    }


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one.cpu() - other.cpu()).abs().max())


def quiet_trainer(strategy: Strategy | str, devices: int | str = 1, **options: Any) -> L.Trainer:
    """A trainer that logs, shows and saves nothing; on the CPU by default."""
    quiet = {"accelerator": "cpu", "enable_checkpointing": False, **options}
    return L.Trainer(
        strategy=strategy, devices=devices, logger=False, enable_progress_bar=False, enable_model_summary=False, **quiet
    )


class Module(L.LightningModule):
    """A network in a minimal LightningModule, for experiments on time, bytes and files."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self.net, 0.01)
