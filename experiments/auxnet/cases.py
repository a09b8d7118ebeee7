"""Tasks and cases: a case is a training of a task, small enough for two cores; the tables choose among all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from experiments.harness.study import Case as AnyCase
from experiments.links.rig import gbit_of
from resist_lightning.methods.auxnet.config import StageConfig

AUXNET = ("penalty", "al-net", "penalty-store", "al-store")
# The penalty method in a warm-up that does not end: stages on workers that wait for each other, as back-propagation
# must.
SERIAL_STAGES = "serial-stages"
HYBRID = "hybrid"  # the penalty method with a step of back-propagation now and then
HYBRID_EVERY = 4
DELAYED = "delayed"  # true gradients that arrive late, from the first step on
WARMED = "delayed-warm"  # the same after a warm-up, as by default
LATE = (DELAYED, WARMED)
WITH_THREE = ("penalty", "al-net", HYBRID, *LATE)  # methods that are trained on three workers too
SWEEP_SEED = 1000  # settings are judged on the hold-out, with a seed that no other table uses
SWEEP_WORKERS = 2
STEP_WORKERS = 3  # for the step of the guesses, which matters from three stages on


TITLES = {
    "serial": "one process",
    "penalty": "AuxNet, penalty",
    "al-net": "AuxNet, augmented Lagrangian",
    HYBRID: f"AuxNet, every {HYBRID_EVERY}th step serial",
    "penalty-store": "penalty, stored guesses",
    "al-store": "augmented Lagrangian, stored guesses",
    DELAYED: "AuxNet, late gradients, no warm-up",
    WARMED: "AuxNet, late gradients",
    "pipeline": "pipeline (torch's)",
    SERIAL_STAGES: "stages in series (AuxNet's warm-up)",
}


def title(method: str, schedule: str | None = None) -> str:
    """A method's title, and the schedule of a pipeline where there are several."""
    return TITLES[method] + (f", {schedule}" if schedule else "")


@dataclass(frozen=True)
class Scale:
    """The size of a task."""

    blocks: int  # residual blocks of each of the three sections
    width: int  # channels of the first section
    batch: int  # images per step, of all workers: they all see the same
    epochs: int  # passes over the training images
    limit: int | None  # training images of each class before the hold-out is taken; None for all
    limit_test: int | None  # test images of each class; None for all
    cuts: Mapping[int, tuple[str, ...]]  # for each number of workers, the modules behind which the network is cut


@dataclass(frozen=True)
class Task:
    """Images and a network."""

    title: str  # in words
    # ``digits`` (scikit-learn's), ``folder`` (the command line names it) or ``random`` (for timing only)
    images: Literal["digits", "folder", "random"]
    pixels: int  # height and width of an image
    holdout: float  # share of the training images that is kept from training; settings are chosen by it
    lr: float  # highest learning rate
    scales: Mapping[str, Scale]  # by size of the study
    schedule: str = "steps"  # of the learning rate: a `Recipe`'s
    channels_last: bool = False  # of the convolutions: a third faster with narrow layers on large images


def _smoke() -> Scale:
    cuts = {2: ("section2.0",), 3: ("section1.0", "section2.0")}
    return Scale(blocks=1, width=4, batch=8, epochs=2, limit=8, limit_test=5, cuts=cuts)


def _timed(pixels: int, blocks: int, width: int, batch: int, cuts: Mapping[int, tuple[str, ...]]) -> Task:
    full = Scale(blocks, width, batch, epochs=1, limit=None, limit_test=None, cuts=cuts)
    scales = {"full": full, "smoke": _smoke()}
    return Task(f"random images of {pixels} x {pixels}", "random", pixels, holdout=0.1, lr=0.01, scales=scales)


def _cifar(
    shape: str, blocks: int, width: int, cuts: Mapping[int, tuple[str, ...]], *, epochs: int, limit: int
) -> Task:
    full = Scale(blocks, width, batch=32, epochs=epochs, limit=limit, limit_test=500, cuts=cuts)
    scales = {"full": full, "smoke": _smoke()}
    return Task(f"CIFAR-10, JPEG copy, {shape}", images="folder", pixels=16, holdout=0.1, lr=0.1, scales=scales)


ALL_IMAGES = "cifar_all"  # the full-size task: an hour for each training

# Cuts are those that balance measured seconds of forward and backward, an auxiliary network being on every stage but the
# first; they are fixed here, so that all seeds and all methods have the same.
TASKS = {
    "digits": Task("digits of scikit-learn", "digits", 8, 0.1, 0.1, {
        "full": Scale(6, 16, 32, 20, None, None, {2: ("section2.2",), 3: ("section1.5", "section3.0")}),
        "smoke": _smoke(),
    }),
    "cifar_deep": _cifar(
        "deep and thin", 3, 16, {2: ("section2.0",), 3: ("section1.2", "section2.2")}, epochs=6, limit=1000
    ),
    "cifar_wide": _cifar(
        "shallow and wide", 2, 24, {2: ("section2.0",), 3: ("section1.1", "section2.1")}, epochs=5, limit=500
    ),
    ALL_IMAGES: Task("all of CIFAR-10, JPEG copy, deep and thin", "folder", 32, 0.04, 0.1, {
        "full": Scale(3, 16, 64, 20, None, None, {2: ("section2.0",), 3: ("section1.2", "section2.2")}),
        "smoke": _smoke(),
    }, schedule="one_cycle", channels_last=True),
}  # fmt: skip
SHORT_TASKS = [name for name in TASKS if name != ALL_IMAGES]
# Networks whose steps are timed, and that are not trained to the end.
TIMED = {
    "resnet_38": _timed(16, 6, 16, 64, {2: ("section2.0",), 3: ("section1.4", "section2.4")}),
    "resnet_110": _timed(32, 18, 16, 32, {2: ("section2.1",), 3: ("section1.12", "section2.9")}),
    "wrn_16_4": _timed(16, 2, 64, 64, {2: ("section2.0",), 3: ("section1.1", "section2.1")}),
}
ALL = {**TASKS, **TIMED}


@dataclass(frozen=True)
class Case(AnyCase):
    """A training. Settings that the method does not have are None."""

    task: str  # a key of `ALL`
    method: str  # serial, pipeline, `SERIAL_STAGES`, `HYBRID`, one of `LATE` or of `AUXNET`
    workers: int  # number of processes, of one thread each
    seed: int  # of weights, order and augmentation
    lr: float  # learning rate at the start
    augment: bool = True  # whether images are cropped and mirrored at random; off where guesses are stored
    beta: float | None = None  # weight of the penalty
    aux_width: int | None = None  # channels of the auxiliary networks
    aux_learning_rate: float | None = None  # of the auxiliary networks, at the start
    warmup_steps: int | None = None  # first steps, of plain back-propagation through the workers
    serial_every: int | None = None  # after them, steps from one of back-propagation to the next
    lambda_step: float | None = None  # step of the guess; None takes the default for the number of workers
    multiplier_every: int | None = None  # steps between two updates of the multipliers
    schedule: str | None = None  # of the pipeline
    micro_batches: int | None = None  # of the pipeline, in a step


@dataclass(frozen=True)
class LinkCase(Case):
    """A training whose workers are joined by links."""

    bandwidth_gbit: float | None = None  # of the links; None for unshaped ones, and where there is one worker


SETTINGS = (
    "beta", "aux_width", "aux_learning_rate", "warmup_steps", "serial_every", "lambda_step", "multiplier_every",
)  # fmt: skip


def settings_of(case: Case) -> dict[str, Any]:
    """Arguments of a `StageConfig`: the method, and the settings of the case."""
    methods = {SERIAL_STAGES: "penalty", HYBRID: "penalty", WARMED: DELAYED}
    usual = {"warmup_steps": 0} if case.method == DELAYED else {}
    given = {key: value for key, value in case.key.items() if key in SETTINGS and value is not None}
    return {"method": methods.get(case.method, case.method), **usual, **given}


def stored(method: str) -> bool:
    """Whether the method keeps guesses by sample, so that samples must not change."""
    return method.endswith("-store")


def base(task: str, method: str, workers: int, seed: int) -> Case:
    """The case of the main table, with the package's defaults; of a pipeline without its schedule."""
    case = Case(task, method, workers, seed, ALL[task].lr, augment=not stored(method))
    if method == HYBRID:
        return replace(base(task, "penalty", workers, seed), method=HYBRID, serial_every=HYBRID_EVERY)
    usual = StageConfig()
    if method == WARMED:
        return replace(case, warmup_steps=usual.warmup_steps)
    if method not in AUXNET:
        return case
    case = replace(case, beta=usual.beta, warmup_steps=usual.warmup_steps)
    if not stored(method):
        case = replace(case, aux_width=usual.aux_width, aux_learning_rate=usual.aux_learning_rate)
    return replace(case, multiplier_every=usual.multiplier_every) if method.startswith("al-") else case


def accuracy(options: Any) -> list[Case]:
    """Every training of the accuracy study, once: seeds outermost, so that an interrupted study has whole seeds."""
    return [case for seed in range(options.seeds) for task in options.tasks for case in _methods(options, task, seed)]


def _methods(options: Any, task: str, seed: int) -> Iterator[Case]:
    smallest = options.size == "smoke"
    for method in options.methods:
        if method == "serial":
            yield base(task, method, 1, seed)
            if any(map(stored, options.methods)):  # which see every image unchanged
                yield replace(base(task, method, 1, seed), augment=False)
            continue
        for workers in options.workers:
            case = base(task, method, workers, seed)
            if method == "pipeline":
                case = replace(case, schedule=options.schedule, micro_batches=options.micro_batches)
            if case.warmup_steps is not None and smallest:
                case = replace(case, warmup_steps=2)
            if workers > 2 and method not in WITH_THREE:
                continue
            if workers > 1 or (method == "penalty" and seed == 0):  # alone, every method is plain training
                yield case


def sweep(options: Any) -> list[Case]:
    """One setting changed at a time; with the penalty method, beta and the size of the auxiliary networks together."""
    found: list[Case] = []
    for task in options.sweep_tasks:
        usual, al, kept = (
            base(task, name, SWEEP_WORKERS, SWEEP_SEED) for name in ("penalty", "al-net", "penalty-store")
        )
        if options.size == "smoke":
            usual, al, kept = (replace(case, warmup_steps=2) for case in (usual, al, kept))
        found += [replace(usual, beta=beta, aux_width=width) for beta in options.betas for width in options.aux_widths]
        found += [
            replace(case, beta=beta) for case in (al, kept, replace(kept, method="al-store")) for beta in options.betas
        ]
        found += [replace(usual, aux_learning_rate=rate) for rate in options.aux_rates]
        found += [replace(usual, warmup_steps=steps) for steps in options.warmups]
        found += [replace(usual, method=HYBRID, serial_every=every) for every in options.serial_every]
        found += [replace(usual, workers=STEP_WORKERS, lambda_step=step) for step in options.lambda_steps]
    # Settings may coincide: a case that several lines of a table need is trained once.
    return [
        replace(case, multiplier_every=base(case.task, "al-store", 1, 0).multiplier_every)
        if case.method == "al-store"
        else case
        for case in dict.fromkeys(found)
    ]


def timing(options: Any) -> list[Case]:
    """The same networks by every method, interleaved; the seed is the number of the turn."""
    found = []
    for turn in range(options.repeats):
        for network in options.networks:
            found.append(base(network, "serial", 1, turn))
            # A step after the warm-up is as long as one without.
            for method in (name for name in options.methods if name not in ("serial", "pipeline", WARMED)):
                case = base(network, method, 2, turn)
                found.append(case if method == DELAYED else replace(case, warmup_steps=2))
            found += _pipelines(options, network, turn)
    return found


def links(options: Any) -> list[LinkCase]:
    """A single process, and two workers over every link, interleaved; the seed is the number of the turn."""
    found = []
    for turn in range(options.repeats):
        for network in options.link_networks:
            if "serial" in options.methods:
                found.append(LinkCase(**base(network, "serial", 1, turn).key))
            cases = _pipelines(options, network, turn)
            if "penalty" in options.methods:
                usual = base(network, "penalty", 2, turn)
                cases.append(replace(usual, method=SERIAL_STAGES, warmup_steps=options.link_steps))
                cases.append(replace(usual, warmup_steps=2))
            found += [
                LinkCase(**case.key, bandwidth_gbit=gbit_of(entry))
                for entry in options.bandwidths_gbit
                for case in cases
            ]
    return found


def _pipelines(options: Any, network: str, turn: int) -> list[Case]:
    if "pipeline" not in options.methods:
        return []
    pipe = base(network, "pipeline", 2, turn)
    return [replace(pipe, schedule=name, micro_batches=options.micro_batches) for name in ("gpipe", "1f1b")]


STUDIES: dict[str, Callable[[Any], list[Any]]] = {study.__name__: study for study in (accuracy, sweep, timing, links)}
