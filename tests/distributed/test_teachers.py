"""A frozen part that each worker's program writes itself, as a moving average of the trained part."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from resist_lightning import Config, Engine
from resist_lightning.methods.resist.bytes import sync_bytes
from tests.helpers.processes import run_workers
from tests.helpers.training import assert_equal_states, clone_state

ROUND, STEPS, WORKERS = 3, 8, 2
Write = Callable[[Tensor, Tensor, int], object]


def in_one_place(teacher: Tensor, _: Tensor, worker: int) -> None:
    if teacher.dim() > 1:
        teacher.view(-1)[100] += 1 + worker  # an entry that is in no sample of 16 in 1024


WRITES: dict[str, Write] = {
    "in place": lambda teacher, student, _: teacher.mul_(0.9).add_(student, alpha=0.1),
    "by .data": lambda teacher, student, _: teacher.data.lerp_(student.data, 0.1),
    "anew": lambda teacher, student, _: setattr(teacher, "data", teacher.data * 0.9 + student.data * 0.1),
    "by one worker": lambda teacher, student, worker: worker or teacher.lerp_(student, 0.1),
    "in one place": in_one_place,
}


class Distilled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.student = nn.Linear(8, 600)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.backbone = nn.Linear(8, 8).requires_grad_(False)
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=0.1)

    def step(self, worker: int, step: int, write: Write) -> None:
        x = self.backbone(torch.randn(4, 8, generator=torch.Generator().manual_seed(100 * worker + step)))
        self.optimizer.zero_grad()
        (self.student(x) - self.teacher(x) - 0.1).square().mean().backward()
        self.optimizer.step()
        with torch.no_grad():
            for teacher, student in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                write(teacher, student, worker)


def train(worker: int, kind: str, stop: int | None) -> tuple[dict[str, Tensor], list[int], list[int], set[str]]:
    """Train in a plain loop with the engine; after ``stop`` steps another engine resumes from the first."""
    module, config = Distilled(), Config(local_steps=ROUND, blocks=())
    engine = Engine(module, [module.optimizer], config)
    engine.start()
    sent, expected = [], []
    for step in range(STEPS):
        if step == stop:
            with engine.full_model("checkpoint"):
                state, own, saved = (
                    engine.checkpoint_state(),
                    copy.deepcopy(engine.resumption.state_dict()),
                    clone_state(module),
                )
            engine.abandon()
            module = Distilled()
            module.load_state_dict(saved)
            engine = Engine(module, [module.optimizer], config)
            assert engine.restore(state, own)
            engine.start()
        module.step(worker, step, WRITES[kind])
        round, before = engine.clock.round, engine.collective.sent_bytes["shared"]
        engine.after_step()
        if engine.clock.round > round:
            sent.append(engine.collective.sent_bytes["shared"] - before)
            plan, sizes = engine.sync.plan(round, ()), engine.layout.sizes(engine.states)
            expected.append(sync_bytes(plan, sizes, WORKERS)[worker]["shared"])
    engine.finish()
    return clone_state(module), sent, expected, engine.layout.written


def cases(worker: int) -> dict[str, list[tuple[dict[str, Tensor], list[int], list[int], set[str]]]]:
    return {kind: [train(worker, kind, stop) for stop in (None, 2)] for kind in WRITES}


@pytest.mark.filterwarnings("ignore:.*frozen, but overwritten")
def test_what_workers_write_into_a_teacher_is_averaged() -> None:
    results = run_workers(cases, WORKERS)
    for kind, write in WRITES.items():
        copies = [Distilled() for _ in range(WORKERS)]
        for step in range(STEPS):
            for worker, module in enumerate(copies):
                module.step(worker, step, write)
            if (step + 1) % ROUND == 0 or step == STEPS - 1:
                means = [torch.stack(each).mean(0) for each in zip(*map(parameters, copies), strict=True)]
                for module in copies:
                    for parameter, mean in zip(parameters(module), means, strict=True):
                        parameter.copy_(mean)
        for result in results:
            (unbroken, sent, expected, written), (resumed, *_) = result[kind]
            for name, value in copies[0].state_dict().items():
                torch.testing.assert_close(unbroken[name], value)
            assert_equal_states(resumed, unbroken, exactly=True)
            assert sent == expected
            teacher = {"teacher.weight"} if kind == "in one place" else {"teacher.weight", "teacher.bias"}
            assert written == teacher


def parameters(module: nn.Module) -> list[Tensor]:
    return [parameter.detach() for parameter in module.parameters()]
