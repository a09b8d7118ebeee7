"""The method on a chain of scalars, in plain Python: no torch, no engine, no simulator. Only the partition is given.

The network is y = s * (1 + w_1) * ... * (1 + w_L) * x with loss y: every gradient is known by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

HELD = Sequence[Sequence[int]]


class Link(nn.Module):
    """x + w x."""

    residual_branch_end = "weight"

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Linear(1, 1, bias=False, dtype=torch.float64)
        nn.init.constant_(self.weight.weight, weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight(x)


def chain(stem: float, links: Sequence[float]) -> nn.Sequential:
    """The network, as a module with ``body`` of blocks; double precision."""
    net = nn.Sequential()
    net.add_module("stem", nn.Linear(1, 1, bias=False, dtype=torch.float64))
    nn.init.constant_(net.stem.weight, stem)
    net.add_module("body", nn.Sequential(*map(Link, links)))
    return net


def input_of(worker: int, step: int) -> float:
    return 0.5 + 0.25 * ((3 * worker + 7 * step) % 5)


@dataclass
class Worker:
    stem: float
    links: dict[int, float]
    velocity: dict[int | str, float] = field(default_factory=dict)


@dataclass
class Outer:
    """An outer optimizer: SGD with Nesterov momentum, from the values at the beginning of the round."""

    rate: float
    momentum: float
    start: dict[int | str, float] = field(default_factory=dict)
    velocity: dict[int | str, float] = field(default_factory=dict)

    def step(self, name: int | str, mean: float) -> float:
        gradient = self.start[name] - mean
        self.velocity[name] = self.momentum * self.velocity.get(name, 0.0) + gradient
        self.start[name] -= self.rate * (gradient + self.momentum * self.velocity[name])
        return self.start[name]


def train(
    stem: float,
    links: Sequence[float],
    rounds: Sequence[HELD],
    local_steps: int,
    *,
    lr: float,
    beta: float = 0.0,
    momentum: str = "reset",
    outer: Outer | None = None,
    overlap: int = 0,
    overlap_of_blocks: int = 0,
) -> tuple[float, list[float]]:
    """Train with SGD and sync after each of ``rounds`` but the last; returns the mean over the last round's holders.

    A sync takes the tensors that all average ``overlap`` steps before the end of its round, moving blocks later.
    """
    workers = [Worker(stem, {block: links[block] for block in held}) for held in rounds[0]]
    step = 0
    if outer is not None:
        outer.start = {"stem": stem, **dict(enumerate(links))}
    for number, held in enumerate(rounds):
        after = rounds[number + 1] if number + 1 < len(rounds) else None
        sent = Sent(own=[Worker(0.0, {}) for _ in workers])
        for left in range(local_steps, -1, -1):
            if after is not None and left == overlap:
                everywhere = [b for b in _all(links) if all(b in h for h in (*held, *after)) and len(workers) > 1]
                _send(sent, workers, held, ["stem", *everywhere], outer)
            if after is not None and left == overlap_of_blocks:
                _send(sent, workers, held, [b for b in _all(links) if b not in sent.means], outer)
            if left:
                for index, worker in enumerate(workers):
                    _step(worker, input_of(index, step), lr, beta)
                step += 1
        if after is not None:
            _receive(workers, held, after, sent, momentum)
    return _mean([w.stem for w in workers]), [_mean([w.links[b] for w in workers if b in w.links]) for b in _all(links)]


def _step(worker: Worker, x: float, lr: float, beta: float) -> None:
    product = 1.0
    for weight in worker.links.values():
        product *= 1 + weight
    gradients: dict[int | str, float] = {"stem": product * x}
    for block, weight in worker.links.items():
        gradients[block] = worker.stem * product / (1 + weight) * x
    for name, gradient in gradients.items():
        worker.velocity[name] = beta * worker.velocity.get(name, 0.0) + gradient
    worker.stem -= lr * worker.velocity["stem"]
    for block in worker.links:
        worker.links[block] -= lr * worker.velocity[block]


@dataclass
class Sent:
    """A sync under way: the means to send, and each worker's own values when they were taken."""

    own: list[Worker]
    means: dict[int | str, float] = field(default_factory=dict)
    speeds: dict[int | str, float] = field(default_factory=dict)


def _send(sent: Sent, workers: list[Worker], before: HELD, names: Sequence[int | str], outer: Outer | None) -> None:
    for name in names:
        holders = [i for i, held in enumerate(before) if name == "stem" or name in held]
        values = [workers[i].stem if name == "stem" else workers[i].links[name] for i in holders]
        sent.means[name] = _mean(values) if outer is None else outer.step(name, _mean(values))
        sent.speeds[name] = _mean([workers[i].velocity.get(name, 0.0) for i in holders])
        for i, value in zip(holders, values, strict=True):
            if name == "stem":
                sent.own[i].stem = value
            else:
                sent.own[i].links[name] = value


def _receive(workers: list[Worker], before: HELD, after: HELD, sent: Sent, momentum: str) -> None:
    for worker, own, old, new in zip(workers, sent.own, before, after, strict=True):
        worker.stem += sent.means["stem"] - own.stem
        links = {}
        for block in new:
            # The worker's own change of a block since then is kept, unless the block comes from another worker.
            since = worker.links[block] - own.links[block] if block in old else 0.0
            links[block] = sent.means[block] + since
        worker.links = links
        kept: dict[int | str, float] = {}
        if momentum != "reset":
            kept["stem"] = worker.velocity["stem"]
            kept.update({block: worker.velocity[block] for block in set(old) & set(new)})
        if momentum == "travel":
            kept.update({block: sent.speeds[block] for block in new})
        worker.velocity = kept


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _all(links: Sequence[float]) -> range:
    return range(len(links))
