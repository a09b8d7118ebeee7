"""Small networks whose neurons are dealt out, and the same training of them by workers and by the simulator."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from resist_lightning import Engine, NeuronConfig, NeuronSimulator
from resist_lightning.comm.collective import Collective
from resist_lightning.methods.ist.layout import NeuronLayout
from resist_lightning.schedule.partition import Partition
from tests.helpers.training import clone_state, decay, train_step

CLASSES = 4
INPUTS = 6

ONE_AT_A_TIME = threading.Lock()  # workers may be threads, and torch.fx patches shared state while it traces

EachStep = Callable[[Engine, int], None]


def _paper() -> nn.Module:
    """The paper's network: batch norm after every layer, no bias, a last norm without weights."""
    return nn.Sequential(
        *(nn.Linear(INPUTS, 12, bias=False), nn.BatchNorm1d(12), nn.ReLU()),
        *(nn.Linear(12, 12, bias=False), nn.BatchNorm1d(12), nn.ReLU()),
        *(nn.Linear(12, CLASSES, bias=False), nn.BatchNorm1d(CLASSES, affine=False)),
    )


def _mixed() -> nn.Module:
    """Batch norm, layer norm and no norm; widths that few numbers of workers divide.

    No bias before batch norm: its gradient is zero but for rounding, which Adam blows up to steps of full length. The
    same holds through layer norm over two neurons, whose outputs are 1 and -1: each of four workers has three at least.
    """
    return nn.Sequential(
        *(nn.Linear(INPUTS, 11, bias=False), nn.BatchNorm1d(11), nn.ReLU()),
        *(nn.Linear(11, 13), nn.LayerNorm(13), nn.ReLU()),
        *(nn.Linear(13, 8), nn.PReLU(8), nn.Linear(8, CLASSES)),
    )


def _biased() -> nn.Module:
    """Biases everywhere, before batch norm too."""
    return nn.Sequential(
        *(nn.Linear(INPUTS, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10), nn.BatchNorm1d(10), nn.ReLU()),
        nn.Linear(10, CLASSES),
    )


def _plain() -> nn.Module:
    """No norm at all: sums over fewer neurons are scaled."""
    return nn.Sequential(nn.Linear(INPUTS, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, CLASSES))


def _conv() -> nn.Module:
    """A convolutional chain, whose channels are flattened with the four positions of each."""
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 7, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(7 * 4, 9), nn.ReLU(), nn.Linear(9, CLASSES)),
    )


NETS: dict[str, Callable[[], nn.Module]] = {
    "paper": _paper,
    "mixed": _mixed,
    "biased": _biased,
    "plain": _plain,
    "conv": _conv,
}


@dataclass(frozen=True)
class Run:
    """A small training run; picklable, so that workers build it by themselves."""

    config: NeuronConfig
    steps: int
    net: str = "mixed"
    optimizer: str = "sgd"
    frozen: tuple[str, ...] = ()
    observe_at: tuple[int, ...] = field(default=())
    decay: float = 1.0  # factor of the learning rate after each step


def one_holder(**settings: Any) -> NeuronConfig:
    """Settings of a run in which each neuron has one holder, with more than two workers too."""
    return NeuronConfig(min_share=0, **settings)


def make_net(run: Run) -> nn.Module:
    """The network of a run, the same in every process; no weight or statistic of a norm is 0 or 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        net = NETS[run.net]()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.LayerNorm) and module.weight is not None:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, 0.0, 0.5)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name not in run.frozen)
    return net


def make_optimizer(run: Run, net: nn.Module) -> Optimizer:
    if run.optimizer == "adamw":
        return torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
    return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-3)


def batch_of(run: Run, worker: int, step: int) -> tuple[Tensor, Tensor]:
    """The batch that a worker sees at a step."""
    generator = torch.Generator().manual_seed(1000 * worker + step)
    shape = (8, 3, 8, 8) if run.net == "conv" else (8, INPUTS)
    return torch.randn(shape, generator=generator), torch.randint(0, CLASSES, (8,), generator=generator)


def start_engine(run: Run, collective: Collective | None = None) -> tuple[Engine, Optimizer]:
    """This worker's engine, started, and its optimizer."""
    with ONE_AT_A_TIME:
        net = make_net(run)
        optimizer = make_optimizer(run, net)
        engine = Engine(net, [optimizer], run.config, collective=collective, total_steps=run.steps)
    engine.start()
    return engine, optimizer


def train_engine(
    run: Run, worker: int, each_step: EachStep | None = None, collective: Collective | None = None
) -> tuple[Engine, dict[str, Tensor]]:
    """Train this worker to the end; returns the engine and the full model's state.

    Args:
        run: the training.
        worker: number of this worker.
        each_step: called after each optimizer step, before the sync that may follow it.
        collective: the workers; by default those of the process group.
    """
    engine, optimizer = start_engine(run, collective)
    for step in range(run.steps):
        train_step(engine.module, optimizer, batch_of(run, worker, step))
        decay(run, optimizer)
        engine.count_step()
        if step in run.observe_at:
            with engine.full_model():
                engine.module.eval()(batch_of(run, 0, 0)[0])
        if each_step is not None:
            each_step(engine, step)
        engine.sync_if_due()
    engine.finish()
    return engine, clone_state(engine.module)


def train_simulator(
    run: Run, workers: int, each_step: Callable[[NeuronSimulator, int], None] | None = None
) -> NeuronSimulator:
    """The same training by the reference simulator."""
    simulator = NeuronSimulator(make_net(run), lambda net: make_optimizer(run, net), run.config, workers, run.steps)
    for step in range(run.steps):
        for number, worker in enumerate(simulator.workers):
            train_step(worker.module, worker.optimizers[0], batch_of(run, number, step))
            decay(run, worker.optimizers[0])
        if each_step is not None:
            each_step(simulator, step)
        simulator.after_step()
    return simulator


def slice_of(layout: NeuronLayout, full: Tensor, name: str, held: Sequence[Partition], worker: int) -> Tensor:
    """A worker's part of a full tensor, by plain indexing."""
    cut = layout.neurons.cuts.get(name)
    if cut is None:
        return full
    if cut.rows is not None:
        full = full[list(held[cut.rows].held[worker])]
    if cut.columns is not None:
        neurons = held[cut.columns].held[worker]
        full = full[:, [neuron * cut.repeat + position for neuron in neurons for position in range(cut.repeat)]]
    return full


def full_state(engine: Engine) -> dict[str, Tensor]:
    """The current state of the full model. Collective: every worker must call this."""
    with engine.full_model() as full:
        return clone_state(full)


def masked_forward(run: Run, net: nn.Module, held: list[list[int]], x: Tensor) -> Tensor:
    """Output of the network "mixed" from ``held`` neurons alone, written out with the full model's tensors.

    Layer norm has the statistics of the held neurons only. Where no norm follows a layer, the next layer's input is
    scaled up, as if all neurons were there.
    """
    assert run.net == "mixed"
    first, batch_norm, _, second, layer_norm, _, third, prelu, last = net
    one, two, three = held
    h = x @ first.weight[one].T
    if net.training:
        mean, variance = h.mean(0), h.var(0, unbiased=False)
    else:
        mean, variance = batch_norm.running_mean[one], batch_norm.running_var[one]
    h = ((h - mean) / (variance + batch_norm.eps).sqrt() * batch_norm.weight[one] + batch_norm.bias[one]).relu()
    h = h @ second.weight[two][:, one].T + second.bias[two]
    centred = h - h.mean(1, keepdim=True)
    h = centred / (centred.square().mean(1, keepdim=True) + layer_norm.eps).sqrt()
    h = (h * layer_norm.weight[two] + layer_norm.bias[two]).relu()
    h = (h * 13 / len(two)) @ third.weight[three][:, two].T + third.bias[three]
    h = torch.where(h > 0, h, h * prelu.weight[three])
    return (h * 8 / len(three)) @ last.weight[:, three].T + last.bias


def plain_training(run: Run, worker: int = 0) -> tuple[nn.Module, Any]:
    """Training by one process without the package; with ``momentum="reset"`` a new optimizer in every round."""
    net = make_net(run)
    for step in range(run.steps):
        if (step % run.config.local_steps == 0 and run.config.momentum == "reset") or step == 0:
            optimizer = make_optimizer(run, net)
        train_step(net, optimizer, batch_of(run, worker, step))
    return net, optimizer
