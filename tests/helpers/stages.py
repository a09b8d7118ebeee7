"""Small networks that are cut into stages, and the same training of them by workers and by the simulator."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import MultiStepLR

from resist_lightning import Engine, StageConfig, StageSimulator
from resist_lightning.comm.collective import Collective, SoloCollective
from resist_lightning.methods.auxnet.layout import StageLayout
from resist_lightning.methods.auxnet.network.chain import find_chain
from resist_lightning.methods.auxnet.step.store import contents
from resist_lightning.methods.auxnet.step.worker import StageWorker
from resist_lightning.models import PreActResNet
from tests.helpers.nets import MlpBlock, mlp
from tests.helpers.threads import ThreadCollective
from tests.helpers.training import clone_state

CLASSES = 4
VOCABULARY, TOKENS = 11, 5

ONE_AT_A_TIME = threading.Lock()  # workers may be threads, which share the seed and torch.fx's patches


class TanhBlock(nn.Module):
    """A smooth residual block that declares where its branch ends."""

    residual_branch_end = "out"

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.out(x))


class Positions(nn.Module):
    """A network with parameters and a buffer of its own, before and after the cuts."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, width), nn.Linear(width, CLASSES)
        self.first = nn.Parameter(torch.randn(width))
        self.later = nn.ParameterDict({"place": nn.Parameter(torch.randn(width))})
        self.register_buffer("shift", torch.randn(width))
        self.body = nn.ModuleList(TanhBlock(width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) + self.first
        for number, block in enumerate(self.body):
            x = block(x)
            if number == 2:
                x = x + self.later["place"] * self.shift
        return self.head(x)


def _convolutions() -> nn.Module:
    """No residual block and no batch norm; in-place operations right after the cuts."""
    return nn.Sequential(
        *(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(5, 6, 3, stride=2), nn.ReLU(inplace=True)),
        *(nn.Conv2d(6, 4, 1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(36, CLASSES)),
    )


class SmallViT(nn.Module):
    """A vision transformer of torch's own blocks, with a class token; it ends like torchvision's and timm's."""

    def __init__(self, width: int = 8, depth: int = 4, size: int = 8, patch: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 1 + (size // patch) ** 2, width) / 10)
        self.blocks = nn.ModuleList(_transformer_block(width, dropout) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(images.shape[0], -1, -1), patches], dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class TokenEncoder(nn.Module):
    """Classifies sequences of token ids; positions come from an embedding, too."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(TOKENS + 2, width)
        self.register_buffer("order", torch.arange(TOKENS))
        self.blocks = nn.ModuleList(_transformer_block(width, 0.0) for _ in range(4))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.places(self.order)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class Recurrent(nn.Module):
    """Two layers that return tuples, of which the forward takes the sequence, and then a state."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, width), nn.Linear(width, CLASSES)
        self.first = nn.LSTM(width, width, batch_first=True)
        self.last = nn.GRU(width, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x, (_, _) = self.first(self.stem(x))
        _, state = self.last(x)
        return self.head(state[-1])


def _transformer_block(width: int, dropout: float) -> nn.Module:
    return nn.TransformerEncoderLayer(width, 2, 2 * width, dropout, batch_first=True, norm_first=True)


NETS: dict[str, Callable[[], nn.Module]] = {
    "tanh": partial(mlp, TanhBlock),
    "mlp": partial(mlp, MlpBlock, width=5),
    "preact": partial(PreActResNet, (1, 1, 2, 1), CLASSES, width_multiplier=1 / 16),
    "convolutions": _convolutions,
    "positions": Positions,
    "vit": SmallViT,
    "ids": TokenEncoder,
    "recurrent": Recurrent,
}

_IMAGES = dict.fromkeys(("preact", "convolutions", "vit"), (3, 8, 8))
INPUTS = {**dict.fromkeys(("tanh", "positions", "mlp"), (3,)), **_IMAGES, "ids": (TOKENS,), "recurrent": (TOKENS, 3)}

_BLOCKS = {2: ["blocks.1"], 3: ["blocks.0", "blocks.2"]}

CUTS = {
    "positions": {2: ["body.2"], 3: ["body.0", "body.2"]},
    "tanh": {2: ["body.1"], 3: ["body.0", "body.2"], 4: ["body.0", "body.1", "body.2"]},
    "mlp": {2: ["body.1"], 3: ["body.1", "body.2"], 4: ["body.0", "body.1", "body.2"]},
    "preact": {2: ["section2"], 3: ["section1", "section3.0"], 4: ["section1", "section2", "section3.0"]},
    "convolutions": {2: ["3"], 3: ["1", "3"]},
    "vit": _BLOCKS,
    "ids": _BLOCKS,
    "recurrent": {2: ["first"], 3: ["stem", "first"]},
}


def two_layers(input_shape: tuple[int, ...], boundary_shape: tuple[int, ...]) -> nn.Module:
    """An auxiliary network between vectors."""
    return nn.Sequential(nn.Linear(input_shape[0], 7), nn.Tanh(), nn.Linear(7, boundary_shape[0]))


@dataclass(frozen=True)
class Run:
    """A small training run in double precision; picklable, so that workers build it by themselves.

    Args:
        config: the settings, but for the cuts, which follow from ``net`` and the workers.
        steps: number of steps.
        net: one of :data:`NETS`.
        batches: number of different batches, seen in turn; every fourth and the last one are smaller.
        milestones: steps after which the learning rate falls to a tenth.
        frozen: parts of names of parameters that do not train.
        observe_at: steps after which the full model is evaluated.
    """

    config: StageConfig
    steps: int
    net: str = "tanh"
    batches: int = 1000
    optimizer: str = "sgd"
    milestones: tuple[int, ...] = ()
    frozen: tuple[str, ...] = ()
    observe_at: tuple[int, ...] = ()


def config_for(run: Run, workers: int) -> StageConfig:
    """The settings with fixed cuts, since cuts by measured time would vary."""
    cuts = CUTS[run.net][workers] if workers > 1 else None
    return replace(run.config, cuts=cuts)


def make_net(run: Run) -> nn.Module:
    """The network of a run, the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        net = NETS[run.net]().double()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(not any(part in name for part in run.frozen))
    return net


def make_optimizer(run: Run, net: nn.Module) -> Optimizer:
    if run.optimizer == "adamw":
        return torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
    return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-3)


def batch_of(run: Run, step: int) -> tuple[Tensor, Tensor]:
    """The batch that all workers see at a step; every fourth and the last one before they repeat are smaller."""
    number = step % run.batches
    generator = torch.Generator().manual_seed(number)
    size = 3 if number % 4 == 3 or number == run.batches - 1 else 6
    shape = (size, *INPUTS[run.net])
    if run.net == "ids":
        x = torch.randint(0, VOCABULARY, shape, generator=generator)
    else:
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, CLASSES, (size,), generator=generator)


def loss_of(batch: tuple[Tensor, Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda output: nn.functional.cross_entropy(output, batch[1])


def start_engine(run: Run, workers: int, collective: Collective | None = None) -> tuple[Engine, Optimizer]:
    """This worker's engine, started, and its optimizer."""
    net = make_net(run)
    optimizer = make_optimizer(run, net)
    engine = Engine(net, [optimizer], config_for(run, workers), collective=collective)
    engine.prepare(batch_of(run, 0)[0])
    engine.start()
    return engine, optimizer


def train_engine(
    worker: int, run: Run, workers: int, each_step: Callable[[Engine, int], None] | None = None
) -> tuple[Engine, list[float]]:
    """Train this process's worker to the end; returns the engine, and the loss of each step."""
    engine, optimizer = start_engine(run, workers)
    schedule = MultiStepLR(optimizer, [step + 1 for step in run.milestones])
    losses = []
    for step in range(run.steps):
        batch = batch_of(run, step)
        optimizer.zero_grad()
        loss = loss_of(batch)(engine.module(batch[0]))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        engine.count_step()
        schedule.step()
        if each_step is not None:
            each_step(engine, step)
        engine.sync_if_due()
        if step in run.observe_at:
            with engine.full_model():
                engine.module.eval()(batch_of(run, 0)[0])
                engine.module.train()
    engine.finish()
    return engine, losses


def train_simulator(run: Run, workers: int) -> tuple[StageSimulator, list[float]]:
    """The same training by the reference simulator; returns it, and the loss of each step."""
    simulator = StageSimulator(
        make_net(run), partial(make_optimizer, run), config_for(run, workers), workers, batch_of(run, 0)[0]
    )
    schedule = MultiStepLR(simulator.optimizers[0], [step + 1 for step in run.milestones])
    losses = []
    for step in range(run.steps):
        batch = batch_of(run, step)
        losses.append(simulator.step(batch[0], loss_of(batch)).item())
        schedule.step()
    return simulator, losses


def plain_training(run: Run) -> tuple[dict[str, Tensor], list[float]]:
    """The same training by back-propagation, without the package."""
    net = make_net(run)
    optimizer = make_optimizer(run, net)
    schedule = MultiStepLR(optimizer, [step + 1 for step in run.milestones])
    losses = []
    for step in range(run.steps):
        batch = batch_of(run, step)
        optimizer.zero_grad()
        loss = loss_of(batch)(net(batch[0]))
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return clone_state(net), losses


# ------------------------------------------------------------------ workers without an engine


@dataclass
class Staged:
    """A worker that computes its stage of a network, and its copy of that network."""

    net: nn.Module
    layout: StageLayout
    worker: StageWorker

    @property
    def stage_gradients(self) -> dict[str, Tensor]:
        """Gradients of the stage's parameters, by name."""
        names = self.layout.stage_tensors(self.worker._collective.worker)
        named = self.net.named_parameters()
        return {name: p.grad.clone() for name, p in named if name in names and p.grad is not None}


def make_staged(
    collective: ThreadCollective,
    net: nn.Module,
    config: StageConfig,
    x: Tensor,
    rate: Callable[[], float] = lambda: 0.1,
) -> Staged:
    """A worker in a thread, with a copy of ``net``. Collective: every worker must call this."""
    with ONE_AT_A_TIME:
        net = copy.deepcopy(net)
        layout = StageLayout(net, config, collective.workers)
        layout.prepare(x, SoloCollective())
        number = collective.worker
        assert layout.chain is not None
        worker = StageWorker(
            layout.chain.stage(*layout.units(number)),
            layout.boundary_shapes,
            layout.nonnegative[number - 1] if number else False,
            config,
            collective=collective,
            device=torch.device("cpu"),
            rate=rate,
        )
    collective.room.barrier.wait()  # nobody may compute while another one traces
    return Staged(net, layout, worker)


def load_guess(worker: StageWorker, x: Tensor, guess: Tensor | None, multiplier: Tensor | None, steps: int = 0) -> None:
    """Have a worker of a stored method resume with λ and u of a batch, as from a checkpoint; None on worker 0."""
    guesses: dict[str, Any] = {}
    names = contents(x)
    if guess is not None:
        values = torch.stack([guess] if multiplier is None else [guess, multiplier], dim=1)
        listed = torch.tensor([list(name) for name in names], dtype=torch.uint8)
        guesses = {"store": {"names": listed, "values": values}}
    seen = [name.hex() for name in names]
    rates = {"highest_rate": 0.1, "share": 1.0, "misses": 0}
    worker.load_state_dict({"steps": steps, **rates, "seen": seen, "guesses": guesses})


def make_chain(net: nn.Module, config: StageConfig, workers: int) -> list[nn.Module]:
    """The stages of a network, which share its parameters."""
    chain = find_chain(net, config.network)
    assert config.cuts is not None
    ends = (0, *chain.positions(config.cuts), len(chain.units))
    assert len(ends) == workers + 1
    return [chain.stage(first, last) for first, last in itertools.pairwise(ends)]
