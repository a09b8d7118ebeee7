"""A worker of `run.py`: trains on random examples, and measures seconds of every local step and sync, and bytes.

::

    rounds     start  broadcast, a round of local steps | sync, round, sync, round, ... | full model, end
    ddp        start  broadcast, steps without sync, one with | steps                   | end
                                                   ready ┘                     measured ┘
                                        links: unshaped  |  shaped                      | unshaped
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from math import prod
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, TensorDataset

from experiments.app.quiet import hush
from experiments.harness.links.workers import Place
from experiments.links.closed_form import closed_form
from experiments.links.rig import make_strategy
from experiments.networks import described, fully_connected
from experiments.trainers import Module, quiet_trainer
from resist_lightning.comm.byte_formulas import share_of
from resist_lightning.comm.collective import Collective
from resist_lightning.engine.engine import Engine

# Shape and classes of the examples: CIFAR's, and those of Speech Commands, as IST's paper has it.
CIFAR, SPEECH = ((3, 32, 32), 10), ((4096,), 35)
PHASES = ("waiting", "averaging", "hand_over")


class PhaseClock:
    """Seconds inside the collective's calls, by phase of the sync.

    The header of a sync is sent first, and returns when all workers have come: that is *waiting*; except for buffers
    that the members of a worker share before, which wait for the members. The rest of a sync is *packing*: copies into
    and out of flat buffers, and compression.
    """

    def __init__(self, collective: Collective) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._inside = False
        for name in dir(type(collective)):
            if not name.startswith("_") and callable(getattr(collective, name)):
                setattr(collective, name, self._timed(getattr(collective, name), name))

    def take(self) -> dict[str, float]:
        """The seconds added since the last call."""
        taken, self.seconds = self.seconds, dict.fromkeys(PHASES, 0.0)
        return taken

    def _timed(self, verb: Callable[..., Any], name: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:  # a verb that uses another one
                return verb(*args, **kwargs)
            self._inside, start = True, time.perf_counter()
            try:
                told = verb(*args, **kwargs)
            finally:
                self._inside = False
                self.seconds[_phase(name, args)] += time.perf_counter() - start
            return self._timed(told, name) if callable(told) else told  # waits for a mean that was started

        return timed


def _phase(verb: str, arguments: tuple[Any, ...]) -> str:
    """The phase of a call; a compressed average is an exchange too, of bytes of the kind ``shared``."""
    if verb == "exchange":
        return "averaging" if "shared" in arguments[2] else "hand_over"
    return "waiting" if verb in ("gather_numbers", "broadcast_inside") else "averaging"


class Window(L.Callback):
    """Opens at the start of a step, before its sync, and closes at the end of another one.

    In DDP's silent steps, the first ones, gradients are not averaged: for the seconds of the compute.
    """

    def __init__(self, place: Place, opens_at: int, closes_after: int, silent_steps: int = 0) -> None:
        self.place = place
        self.opens_at = opens_at
        self.closes_after = closes_after
        self.silent_steps = silent_steps
        self.result: dict[str, Any] = {"worker": place.worker}
        self.steps: list[float] = []
        self.silent: list[float] = []
        self.syncs: list[dict[str, float]] = []
        self._began = self._opened = self._sync_before = 0.0
        self._phases: PhaseClock | None = None
        self._engine: Engine | None = None
        self._bytes: tuple[int, int] | None = None
        self._counted: dict[str, int] = {}
        self._inside: dict[str, int] = {}
        self._first_round = 0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Called before the strategy's own, in which a sync happens that is due."""
        if isinstance(trainer.strategy, DDPStrategy) and self.silent_steps:
            trainer.strategy.model.require_backward_grad_sync = batch_idx >= self.silent_steps  # type: ignore[union-attr]
        if batch_idx == self.opens_at:
            self._open(trainer)
        # A sync that is due happens in the strategy's hook, behind this one: it is taken out of the step's seconds.
        self._sync_before = self._sync_seconds()
        self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        seconds = time.perf_counter() - self._began
        synced = self._sync_seconds() - self._sync_before
        if 0 < batch_idx < self.silent_steps:  # the first one warms up
            self.silent.append(seconds)
        if self.opens_at <= batch_idx <= self.closes_after:
            self.steps.append(seconds - synced)
            self._note_sync(synced)
        if batch_idx == self.closes_after:
            self._close(trainer, pl_module)

    def _open(self, trainer: L.Trainer) -> None:
        self._engine = getattr(trainer.strategy, "engine", None)
        if self._engine is not None:
            self._phases = PhaseClock(self._engine.collective)
            self._counted = dict(self._engine.collective.sent_bytes)
            self._inside = dict(self._engine.collective.inside_bytes)
            self._first_round = self._engine.clock.round
        self.place.ready()
        self._bytes = self.place.bytes()
        self._opened = time.perf_counter()

    def _note_sync(self, seconds: float) -> None:
        phases = self._phases.take() if self._phases is not None else {}
        if seconds > 0:
            packing = seconds - sum(phases.values())
            self.syncs.append({"seconds": seconds, **phases, "packing": packing})

    def _close(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        window = time.perf_counter() - self._opened
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        holds = held(module, trainer)  # before the full model is assembled, which holds everything
        after = self.place.measured()
        if self._bytes is not None and after is not None:
            self.result["kernel"] = {"sent": after[0] - self._bytes[0], "received": after[1] - self._bytes[1]}
        if self._engine is not None:
            self._note_bytes(self._engine)
        self.result |= {
            "step_seconds": self.steps,
            "silent_step_seconds": self.silent,
            "syncs": self.syncs,
            "window_seconds": window,
            "peak_rss_bytes": peak,
            **holds,
        }

    def _note_bytes(self, engine: Engine) -> None:
        """Note the bytes counted in the window, and the closed forms."""
        collective, place = engine.collective, self.place
        sent, inside = collective.sent_bytes, collective.inside_bytes
        self.result["counted"] = {kind: sent[kind] - self._counted.get(kind, 0) for kind in sent}
        self.result["inside"] = {kind: inside[kind] - self._inside.get(kind, 0) for kind in inside}
        rounds = range(self._first_round, engine.clock.round)
        # The members of a worker divide its bytes among themselves.
        self.result["closed_form"] = [
            {direction: share_of(size, collective.member, collective.members) for direction, size in sync.items()}
            for sync in closed_form(engine, rounds, [collective.worker])
        ]
        first = place.worker - place.worker % place.per_node
        of_node = {rank // collective.members for rank in range(first, first + place.per_node)}
        self.result["crossing"] = closed_form(engine, rounds, of_node)

    def _sync_seconds(self) -> float:
        return self._engine.seconds.sync if self._engine is not None else 0.0


def held(module: L.LightningModule, trainer: L.Trainer) -> dict[str, int]:
    """Bytes of the model, of this worker's parameters, and of parameters, gradients and optimizer state together."""
    layout = getattr(getattr(trainer.strategy, "engine", None), "layout", None)
    whole = getattr(layout, "shapes", {})  # of tensors of which this worker has a slice
    model = subnet = states = 0
    for name, parameter in module.named_parameters():
        model += prod(whole.get(name, parameter.shape)) * parameter.element_size()
        if not parameter.is_meta:
            subnet += parameter.nbytes
            states += parameter.grad.nbytes if parameter.grad is not None else 0
    for optimizer in trainer.optimizers:
        for state in optimizer.state.values():
            # Of each tensor, not of its storage, in which others may have a part.
            states += sum(getattr(value, "nbytes", 0) for value in state.values())
    return {"model_bytes": model, "subnet_bytes": subnet, "held_bytes": subnet + states}


def window_of(method: str, settings: dict[str, int]) -> tuple[int, int, int]:
    """First and last step of the window, and DDP's silent steps before it."""
    per_round, rounds = settings["steps_per_round"], settings["rounds"]
    if method == "ddp":
        silent = per_round + 1
        opens = silent + 1  # one step with sync: DDP arranges its buckets
        return opens, opens + settings["ddp_steps"] - 1, silent
    return per_round, per_round * (rounds + 1) - 1, 0


def main(place: Place, settings: dict[str, Any]) -> None:
    """Train for as long as is measured; the examples are random, the same for every method."""
    hush()
    torch.manual_seed(settings["seed"])
    method, network = settings["method"], settings["network"]
    opens, closes, silent = window_of(method, settings)
    window = Window(place, opens, closes, silent)
    strategy = make_strategy(method, settings, settings["steps_per_round"])
    # Each namespace is a host.
    trainer = quiet_trainer(
        strategy, place.per_node, num_nodes=place.nodes, max_epochs=1, max_steps=closes + 1, callbacks=[window]
    )
    shape, classes = SPEECH if fully_connected(network) else CIFAR
    module = Module(described(network, num_classes=classes, in_features=shape[0]))
    generator = torch.Generator().manual_seed(settings["seed"])
    count = (closes + 1) * settings["batch"] * place.workers
    # More than one epoch would start the loader anew in the window.
    values = torch.randn(count, *shape, generator=generator)
    labels = torch.randint(classes, (count,), generator=generator)
    trainer.fit(module, DataLoader(TensorDataset(values, labels), settings["batch"]))
    place.report(window.result)
