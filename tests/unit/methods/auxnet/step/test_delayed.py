"""Stages with delayed gradients, in threads, against plain back-propagation with gradients delayed by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from resist_lightning import StageConfig
from resist_lightning.methods.auxnet.step.worker import StageWorker
from tests.helpers.nets import mlp
from tests.helpers.stages import CLASSES, ONE_AT_A_TIME, TanhBlock, make_chain, make_staged
from tests.helpers.threads import ThreadCollective, run_threads

CUTS = {2: ["body.1"], 3: ["body.0", "body.2"], 4: ["body.0", "body.1", "body.2"]}
SIZES = (4, 2, 5, 3, 4, 4, 2)


class Recomputed(TanhBlock):
    """A block with activation checkpointing."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


class Recomputing(nn.Sequential):
    """Blocks with activation checkpointing around each."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = checkpoint(block, x, use_reentrant=False)
        return x


class Tied(TanhBlock):
    """A block with a weight under two names."""

    def __init__(self, width: int = 6) -> None:
        super().__init__(width)
        self.again = nn.Linear(width, width)
        self.again.weight = self.out.weight

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.again(torch.tanh(self.out(x))))


@dataclass(frozen=True)
class Training:
    """A training of some batches."""

    workers: int = 2
    delay: int = 1
    accumulate: int = 1
    warmup_steps: int = 0
    block: type[TanhBlock] = TanhBlock
    around: bool = False  # activation checkpointing around blocks
    untrained: tuple[int, ...] = ()  # batches without a backward pass
    saved_at: int | None = None  # a batch after which each worker is replaced by one that resumes
    settled: tuple[int, ...] = ()  # batches after which the full model is assembled

    @property
    def config(self) -> StageConfig:
        return StageConfig(cuts=CUTS[self.workers], delay=self.delay, warmup_steps=self.warmup_steps)

    def net(self) -> nn.Module:
        with ONE_AT_A_TIME, torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            net = mlp(self.block, width=3).double()
        if self.around:
            net.body = Recomputing(*net.body)
        return net

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(SIZES[number], 3, dtype=torch.float64, generator=generator)
        return x, torch.randint(0, CLASSES, (SIZES[number],), generator=generator)

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, y) / self.accumulate


def make_optimizer(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), 0.3, momentum=0.9, weight_decay=0.01)


def by_stages(collective: ThreadCollective, training: Training) -> tuple[dict[str, Tensor], Counter[str], int]:
    """This worker's part of the network, its sent bytes, and the bytes that it holds beside its stage."""
    staged = make_staged(collective, training.net(), training.config, training.batch(0)[0])
    optimizer, worker = make_optimizer(staged.net), staged.worker
    worker.accumulate = training.accumulate
    for number in range(len(SIZES)):
        x, y = training.batch(number)
        if number % training.accumulate == 0:
            optimizer.zero_grad()
        output = worker(x)
        if number not in training.untrained:
            training.loss(output, y).backward()
        if (number + 1) % training.accumulate == 0:
            optimizer.step()
            worker.end_step()
        if number in (*training.settled, training.saved_at, len(SIZES) - 1):
            worker.finish()
            if worker.delayed is not None:
                worker.delayed.settle()
        if number == training.saved_at:
            worker = resumed(worker, collective, training)
    names = staged.layout.stage_tensors(collective.worker)
    state = {name: tensor for name, tensor in staged.net.state_dict().items() if name in names}
    return state, collective.sent_bytes, worker.held_bytes


def resumed(worker: StageWorker, collective: ThreadCollective, training: Training) -> StageWorker:
    """A new worker of the same stage, with the state of this one."""
    cpu = torch.device("cpu")
    made = StageWorker(
        worker._stage, worker._shapes, False, training.config, collective=collective, device=cpu, rate=lambda: 0.1
    )
    made.accumulate = training.accumulate
    made.load_state_dict(worker.state_dict())
    return made


def by_hand(training: Training) -> dict[str, Tensor]:
    """Plain back-propagation, with a list of the gradients of every batch."""
    net = training.net()
    stages = make_chain(net, training.config, training.workers)
    optimizer = make_optimizer(net)
    late = {}
    for k, stage in enumerate(stages):
        late.update(dict.fromkeys(stage.parameters(), training.delay * (training.workers - 1 - k)))
    found: list[dict[Tensor, Tensor]] = []  # by batch
    history = [{p: p.detach().clone() for p in late}]  # weights before each step
    for number in range(len(SIZES)):
        x, y = training.batch(number)
        if number % training.accumulate == 0:
            optimizer.zero_grad()
        now, before = history[-1], history[max(len(history) - 2, 0)]
        warm = training.warmup_steps * training.accumulate  # batches
        put({p: now[p] + (number >= warm) * n / training.accumulate * (now[p] - before[p]) for p, n in late.items()})
        gradients = torch.autograd.grad(training.loss(net(x), y), list(late))
        found.append(dict(zip(late, gradients, strict=True)))
        put(now)
        for p, batches in late.items():
            taken = number if number < warm else number - batches
            if number < warm or taken >= warm:
                gradient = found[taken][p]
                p.grad = gradient if p.grad is None else p.grad + gradient
        if (number + 1) % training.accumulate == 0:
            optimizer.step()
            history.append({p: p.detach().clone() for p in late})
    return {name: p.detach() for name, p in net.named_parameters()}


@torch.no_grad()
def put(values: dict[Tensor, Tensor]) -> None:
    for parameter, value in values.items():
        parameter.copy_(value)


def assert_equal(training: Training) -> None:
    found, _ = run_threads(by_stages, training.workers, training)
    trained = {name: value for state, _, _ in found for name, value in state.items()}
    expected = by_hand(training)
    assert trained.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(trained[name], value, rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("workers", "delay"), [(2, 2), (3, 0), (3, 1), (4, 1), (4, 2)])
def test_a_stage_takes_the_gradient_of_an_earlier_batch_at_weights_ahead(workers: int, delay: int) -> None:
    assert_equal(Training(workers, delay))


@pytest.mark.parametrize("block", [Recomputed, Tied])
def test_both_passes_use_the_same_weights_under_all_their_names(block: type[TanhBlock]) -> None:
    assert_equal(Training(3, block=block))


def test_both_passes_use_the_same_weights_where_the_network_recomputes_blocks() -> None:
    assert_equal(Training(3, around=True))


@pytest.mark.parametrize("workers", [2, 3])
def test_gradients_that_add_up_are_late_by_batches(workers: int) -> None:
    assert_equal(Training(workers, accumulate=2))


@pytest.mark.parametrize(("warmup_steps", "accumulate"), [(3, 1), (1, 2), (9, 1)])
def test_in_the_warm_up_no_gradient_is_late_and_none_is_taken_twice(warmup_steps: int, accumulate: int) -> None:
    assert_equal(Training(3, accumulate=accumulate, warmup_steps=warmup_steps))
    assert_equal(Training(3, 2, accumulate=accumulate, warmup_steps=warmup_steps, saved_at=1, settled=(3,)))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_looking_and_resuming_change_nothing(accumulate: int) -> None:
    assert_equal(Training(3, accumulate=accumulate, settled=(1, 3)))
    assert_equal(Training(3, 2, accumulate=accumulate, saved_at=3))
    assert_equal(Training(3, 1, accumulate=accumulate, saved_at=4, warmup_steps=1))


def test_a_batch_without_a_backward_pass_leaves_no_message() -> None:
    """It counts as a batch without gradients; gradients due in its step come in the next one."""
    found, room = run_threads(by_stages, 3, Training(3, untrained=(2,)))
    assert all(box.empty() for box in room.boxes.values())
    assert all(value.isfinite().all() for state, _, _ in found for value in state.values())


@pytest.mark.parametrize("delay", [1, 2])
def test_a_run_that_resumes_behind_such_a_batch_takes_the_gradients_that_were_due(delay: int) -> None:
    unbroken, _ = run_threads(by_stages, 3, Training(3, delay, untrained=(4,)))
    resumed_run, _ = run_threads(by_stages, 3, Training(3, delay, untrained=(4,), saved_at=4))
    for (expected, _, held), (found, _, held_too) in zip(unbroken, resumed_run, strict=True):
        assert held == held_too
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


def hooked(collective: ThreadCollective, training: Training, batches: int) -> tuple[int, list[bool]]:
    """The number of this stage's parameters, and for each call of a hook of theirs whether there was a gradient."""
    staged = make_staged(collective, training.net(), training.config, training.batch(0)[0])
    names = staged.layout.stage_tensors(collective.worker)
    parameters = [parameter for name, parameter in staged.net.named_parameters() if name in names]
    called: list[bool] = []
    for parameter in parameters:
        parameter.register_hook(lambda gradient: called.append(gradient is not None))
        parameter.register_post_accumulate_grad_hook(lambda parameter: called.append(parameter.grad is not None))
    for number in range(batches):
        x, y = training.batch(number)
        training.loss(staged.worker(x), y).backward()
        staged.worker.end_step()
    staged.worker.finish()
    return len(parameters), called


def test_hooks_of_gradients_are_called_where_there_is_a_gradient() -> None:
    found, _ = run_threads(hooked, 3, Training(3), 4)
    for late, (parameters, called) in zip((2, 1, 0), found, strict=True):
        assert called == [True] * (2 * parameters * (4 - late))


@pytest.mark.parametrize("workers", [2, 4])
def test_bytes_are_those_of_a_pipeline_and_the_output(workers: int) -> None:
    found, room = run_threads(by_stages, workers, Training(workers))
    boundary, output = 8 * 3 * sum(SIZES), 8 * CLASSES * sum(SIZES)
    for worker, (_, sent, _) in enumerate(found):
        neighbours = 1 if worker in (0, workers - 1) else 2
        assert sent["boundary"] == boundary * neighbours
        assert sent["output"] == (output * (workers - 1) if worker == workers - 1 else 0)
    assert all(box.empty() for box in room.boxes.values())


def test_what_is_held_beside_the_stage_is_weights_before_and_gradients_that_wait() -> None:
    training = Training(3, 1)
    found, _ = run_threads(by_stages, 3, training)
    sizes = [sum(p.nbytes for p in stage.parameters()) for stage in make_chain(training.net(), training.config, 3)]
    assert [held for _, _, held in found] == [3 * sizes[0], 2 * sizes[1], 0]


def gradients_at_moved_weights(
    network: Callable[[Tensor], Tensor], parameters: dict[str, nn.Parameter], training: Training
) -> dict[str, Tensor | None]:
    """As of sharpness-aware training: gradients at weights that the same batch's first gradients have moved."""
    x, y = training.batch(0)
    training.loss(network(x), y).backward()
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(parameter.grad)
            parameter.grad = None
    training.loss(network(x), y).backward()
    return {name: parameter.grad for name, parameter in parameters.items()}


def moved(collective: ThreadCollective, training: Training) -> Any:
    """A stage's gradients at moved weights, or the error; where that one is expected, others stop before it."""
    staged = make_staged(collective, training.net(), training.config, training.batch(0)[0])
    names = staged.layout.stage_tensors(collective.worker)
    parameters = {name: p for name, p in staged.net.named_parameters() if name in names}
    staged.worker._checks = 0  # no messages but those of a batch
    if training.delay and staged.worker.delayed is None:
        x, y = training.batch(0)
        return training.loss(staged.worker(x), y).backward()
    try:
        return gradients_at_moved_weights(staged.worker, parameters, training)
    except RuntimeError as error:
        return str(error)


def test_weights_that_change_within_a_step_are_used() -> None:
    """Stages before the last took both gradients at the weights from the beginning of the step."""
    training = Training(3, delay=0)
    net = training.net()
    expected = gradients_at_moved_weights(net, dict(net.named_parameters()), training)
    found, _ = run_threads(moved, 3, training)
    gradients = {name: gradient for stage in found for name, gradient in stage.items()}
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-11, atol=1e-12)


def test_weights_that_change_within_a_step_are_refused_where_gradients_are_late() -> None:
    (refused, _), _ = run_threads(moved, 2, Training(warmup_steps=5))
    assert "the weights of this stage have changed since the last call of the network" in refused
    assert "delay=0 or method='penalty'" in refused


def rounded(collective: ThreadCollective, training: Training) -> bool:
    staged = make_staged(collective, training.net(), training.config, training.batch(0)[0])
    for number in range(2):
        x, y = training.batch(number)
        training.loss(staged.worker(x), y).backward()
        with torch.no_grad():
            for parameter in staged.net.parameters():
                parameter.nextafter_(2 * parameter)
    return True


def test_weights_that_return_from_a_validation_with_an_error_of_rounding_are_not_refused() -> None:
    """As those of schedule-free optimizers do."""
    assert run_threads(rounded, 2, Training(accumulate=2))[0] == [True, True]


class Keeping(TanhBlock):
    """A block that keeps its output."""

    kept = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        self.kept = super().forward(x)
        return self.kept


def with_a_loss_inside(collective: ThreadCollective, training: Training) -> str:
    """The error where the loss of the first batch has a term of what a block keeps."""
    staged = make_staged(collective, training.net(), training.config, training.batch(0)[0])
    staged.worker._checks = 0
    kept = next(block for block in staged.net.modules() if isinstance(block, Keeping))
    x, y = training.batch(0)
    (training.loss(staged.worker(x), y) + kept.kept.square().mean()).backward()
    if staged.worker.delayed is None:
        return ""
    staged.worker.end_step()
    with pytest.raises(RuntimeError) as error:
        staged.worker(x)
    return str(error.value)


def test_a_loss_of_features_inside_of_a_stage_is_told() -> None:
    (said, _), _ = run_threads(with_a_loss_inside, 2, Training(block=Keeping))
    assert "terms of features inside of the network (of hooks, or kept by a block) have no part in it" in said


def outputs(collective: ThreadCollective, training: Training) -> list[Tensor]:
    staged = make_staged(collective, training.net(), training.config, training.batch(0)[0])
    found: list[Tensor] = []
    for number in range(2):
        x, y = training.batch(number)
        output = staged.worker(x)
        found.append(output.detach())
        training.loss(output, y).backward()
        staged.worker.end_step()
    return found


def test_every_worker_has_the_output_of_its_own_batch() -> None:
    training = Training(3)
    found, _ = run_threads(outputs, 3, training)
    for worker in found:
        torch.testing.assert_close(worker[0], training.net()(training.batch(0)[0]))
        assert all(torch.equal(mine, first) for mine, first in zip(worker, found[0], strict=True))
        assert len(worker[1]) == SIZES[1]


def frozen(collective: ThreadCollective) -> Any:
    training = Training(2)
    net = training.net().requires_grad_(False)
    net.get_submodule("head").requires_grad_(True)
    staged = make_staged(collective, net, training.config, training.batch(0)[0])
    for number in range(3):
        x, y = training.batch(number)
        training.loss(staged.worker(x), y).backward()
        staged.worker.end_step()
    return staged.stage_gradients.keys()


def test_a_frozen_stage_passes_batches_on() -> None:
    found, _ = run_threads(frozen, 2)
    assert [set(names) for names in found] == [set(), {"head.weight", "head.bias"}]
