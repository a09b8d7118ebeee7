"""Messages between workers of stages in a step, and unusual uses of batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resist_lightning import StageConfig, WorkersDisagree
from resist_lightning.methods.auxnet.step.guesses import StoredGuesses
from resist_lightning.methods.auxnet.step.store import Samples
from tests.helpers.nets import mlp
from tests.helpers.stages import CLASSES, ONE_AT_A_TIME, Staged, TanhBlock, load_guess, make_staged, two_layers
from tests.helpers.threads import Room, ThreadCollective, run_threads

CUTS = {2: ["body.1"], 3: ["body.0", "body.2"]}
METHODS = ("penalty", "al-net", "penalty-store", "al-store")
Loss = Callable[[Tensor], Tensor]


def config_for(workers: int, **options: Any) -> StageConfig:
    usual = {"cuts": CUTS[workers], "method": "penalty", "warmup_steps": 0, "aux_network": two_layers}
    return StageConfig(**{**usual, **options})


def make_net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return mlp(TanhBlock, width=3).double()


def batch(number: int, size: int = 4) -> tuple[Tensor, Loss]:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(size, 3, dtype=torch.float64, generator=generator)
    y = torch.randint(0, CLASSES, (size,), generator=generator)
    return x, lambda output: nn.functional.cross_entropy(output, y)


def stage_of(collective: ThreadCollective, config: StageConfig) -> Staged:
    with ONE_AT_A_TIME:
        net = make_net()
    return make_staged(collective, net, config, batch(0)[0])


def is_left(room: Room) -> bool:
    return any(not box.empty() for box in room.boxes.values())


# ------------------------------------------------------------------ messages


def some_steps(collective: ThreadCollective, config: StageConfig, sizes: list[int]) -> list[tuple[int, Counter[str]]]:
    """The bytes that the worker sends in each step, by kind."""
    staged, found = stage_of(collective, config), []
    for number, size in enumerate(sizes):
        before = Counter(collective.sent_bytes)
        x, loss = batch(number, size)
        loss(staged.worker(x)).backward()
        staged.worker.end_step()
        sent = Counter(collective.sent_bytes)
        sent.subtract(before)
        found.append(sent)
    last = collective.worker == collective.workers - 1
    boundaries = 1 if last or collective.worker == 0 else 2
    for size, sent in zip(sizes, found, strict=True):
        # Eight bytes a number; a boundary is 3 wide.
        assert sent["boundary"] == 8 * size * 3 * boundaries
        assert sent["output"] == (8 * size * CLASSES * (collective.workers - 1) if last else 0)
    return found


@pytest.mark.parametrize(("workers", "method"), [(2, "al-net"), *((3, method) for method in METHODS)])
def test_a_worker_sends_what_its_neighbours_need_and_no_byte_more(workers: int, method: Any) -> None:
    """Over each boundary one tensor down and one up, in serial steps too, and the output from the last worker."""
    sizes = [4, 4, 2, 3, 4]
    found, room = run_threads(some_steps, workers, config_for(workers, method=method, warmup_steps=2), sizes)
    for worker, steps in enumerate(found):
        ends = 1 if worker in (0, workers - 1) else 2
        for size, sent in zip(sizes, steps, strict=True):
            assert sent["boundary"] == ends * size * 3 * 8
            assert sent["output"] == (workers - 1) * size * CLASSES * 8 * (worker == workers - 1)
            assert not {kind for kind, count in sent.items() if count} - {"boundary", "output"}
    verbs = Counter(verb for _, verb, _ in room.log)
    assert verbs["start_send"] == verbs["start_receive"] == len(sizes) * 3 * (workers - 1)
    assert not is_left(room)


@pytest.mark.parametrize("workers", [2, 3])
def test_no_collective_is_called_after_the_first_three_steps(workers: int) -> None:
    """In those, each worker sends two numbers about its batch."""
    _, room = run_threads(some_steps, workers, config_for(workers), [4] * 7)
    for worker in range(workers):
        log = [verb for who, verb, _ in room.log if who == worker]
        others = [place for place, verb in enumerate(log) if verb not in ("start_send", "start_receive")]
        assert [log[place] for place in others] == ["gather_numbers"] * 3
        assert len(log[others[-1] :]) > 3
        assert "start_send" in log[others[0] : others[1]]


# ------------------------------------------------------------------ unusual uses of batches


def in_parts(
    collective: ThreadCollective, config: StageConfig, parts: int, steps: int
) -> tuple[dict[str, Tensor], Any]:
    """The gradients of a batch of six that comes in parts, and the stored guesses afterwards."""
    staged, (x, _) = stage_of(collective, config), batch(0, 6)
    y = torch.arange(6) % CLASSES
    staged.worker.accumulate = parts
    guess = multiplier = None
    if collective.worker:
        generator = torch.Generator().manual_seed(collective.worker)
        guess = torch.randn(6, 3, dtype=torch.float64, generator=generator)
        multiplier = torch.randn(6, 3, dtype=torch.float64, generator=generator) if config.multipliers else None
    load_guess(staged.worker, x, guess, multiplier, steps)
    for rows in torch.arange(6).chunk(parts):
        loss = nn.functional.cross_entropy(staged.worker(x[rows]), y[rows])
        (loss / parts).backward()
    staged.worker.end_step()
    guesses = staged.worker.guesses
    assert staged.worker.steps == steps + 1
    return staged.stage_gradients, guesses.make(Samples(x)) if isinstance(guesses, StoredGuesses) else None


@pytest.mark.parametrize(
    ("workers", "warmup_steps", "method"),
    [(2, 0, "penalty-store"), (2, 100, "al-store"), (3, 0, "al-store"), (3, 100, "penalty-store")],
)
def test_gradients_of_a_batch_in_parts_add_up_to_those_of_the_whole(
    workers: int, warmup_steps: int, method: Any
) -> None:
    config = config_for(workers, method=method, beta=5.0, warmup_steps=warmup_steps, multiplier_every=4)
    for steps in (0, 3):
        whole, _ = run_threads(in_parts, workers, config, 1, steps)
        parts, room = run_threads(in_parts, workers, config, 3, steps)
        for (expected, guesses), (gradients, found) in zip(whole, parts, strict=True):
            assert gradients.keys() == expected.keys()
            for name, gradient in gradients.items():
                torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-14)
            if guesses is not None:
                torch.testing.assert_close(found, guesses, rtol=1e-10, atol=1e-14)
        assert not is_left(room)


def with_a_pause(
    collective: ThreadCollective, config: StageConfig, skipped: bool
) -> tuple[dict[str, Tensor], list[float]]:
    """Three steps, between which a batch may be computed without training on it; the last one trains on it."""
    staged, losses = stage_of(collective, config), []
    parameters = [p for p in staged.net.parameters() if p.requires_grad]
    for number, trained in [(0, True), (1, False), (0, True), (1, True)]:
        if not trained and not skipped:
            continue
        x, loss = batch(number)
        for parameter in parameters:
            parameter.grad = None
        found = loss(staged.worker(x))
        if trained:
            found.backward()
            losses.append(found.item())
            staged.worker.end_step()
    return staged.stage_gradients, losses


@pytest.mark.parametrize(
    ("method", "warmup_steps"),
    [("penalty", 0), ("penalty", 9), ("al-net", 1), ("penalty-store", 1), ("al-store", 0), ("al-store", 9)],
)
def test_a_batch_that_nobody_trains_on_leaves_nothing_behind(method: Any, warmup_steps: int) -> None:
    """No message, no guess and no gradient: the next batches train as if it had not been computed."""
    config = config_for(3, method=method, beta=5.0, warmup_steps=warmup_steps)
    expected, _ = run_threads(with_a_pause, 3, config, False)
    found, room = run_threads(with_a_pause, 3, config, True)
    assert not is_left(room)
    for (gradients, losses), (expected_gradients, expected_losses) in zip(found, expected, strict=True):
        assert losses == expected_losses
        assert all(torch.equal(gradients[name], value) for name, value in expected_gradients.items())
        assert gradients.keys() == expected_gradients.keys() != set()


def called_twice(collective: ThreadCollective, config: StageConfig) -> None:
    staged, (x, loss) = stage_of(collective, config), batch(0)
    first, second = loss(staged.worker(x)), loss(staged.worker(x))
    with pytest.raises(RuntimeError, match=r"called again before the backward pass.*once per training_step"):
        (first + second).backward()


def saved_between(collective: ThreadCollective, config: StageConfig) -> None:
    staged, (x, loss) = stage_of(collective, config), batch(0)
    first = loss(staged.worker(x))
    staged.worker.finish()  # as to assemble the full model
    with pytest.raises(RuntimeError, match=r"the full model was assembled in between.*save behind the step"):
        first.backward()


@pytest.mark.parametrize("options", [{}, {"method": "delayed", "aux_network": None}], ids=["guesses", "late"])
def test_a_full_model_between_the_passes_is_refused_on_every_worker(options: dict[str, Any]) -> None:
    run_threads(saved_between, 3, config_for(3, **options))


@pytest.mark.parametrize("warmup_steps", [0, 1])
def test_two_calls_before_a_backward_pass_are_refused_on_every_worker(warmup_steps: int) -> None:
    run_threads(called_twice, 3, config_for(3, warmup_steps=warmup_steps))


def another_size(collective: ThreadCollective, config: StageConfig) -> str:
    staged = stage_of(collective, config)
    with pytest.raises(ValueError, match="the network is given") as error:
        staged.worker(torch.zeros(4, 5, dtype=torch.float64))
    return str(error.value)


def test_an_input_of_another_size_is_refused_before_anything_is_sent() -> None:
    messages, room = run_threads(another_size, 2, config_for(2))
    assert all("(5,)" in message and "(3,)" in message for message in messages)
    assert room.log == []


def another_batch(collective: ThreadCollective, config: StageConfig, same_steps: int) -> None:
    staged = stage_of(collective, config)
    for step in range(same_steps):
        x, loss = batch(step)
        loss(staged.worker(x)).backward()
        staged.worker.end_step()
    x, _ = batch(100)
    x[1] += collective.worker == 2
    with pytest.raises(WorkersDisagree, match=f"step {same_steps}.*do not see the same batch.*1 of 4 samples"):
        staged.worker(x)


@pytest.mark.parametrize("same_steps", [0, 2])
def test_another_batch_on_one_worker_is_told_to_all(same_steps: int) -> None:
    run_threads(another_batch, 3, config_for(3), same_steps)


def in_place(collective: ThreadCollective, config: StageConfig, changed: bool) -> tuple[dict[str, Tensor], float]:
    staged, (x, loss) = stage_of(collective, config), batch(0)
    output = staged.worker(x)
    output = output.mul_(0.5) if changed else output * 0.5
    found = loss(output)
    found.backward()
    staged.worker.end_step()
    return staged.stage_gradients, found.item()


@pytest.mark.parametrize("warmup_steps", [0, 1])
def test_the_output_may_be_changed_in_place_on_every_worker(warmup_steps: int) -> None:
    """The last worker's output was a view of the sent tensor: autograd refused the change, and the others waited."""
    config = config_for(2, beta=5.0, warmup_steps=warmup_steps)
    expected, _ = run_threads(in_place, 2, config, False)
    found, _ = run_threads(in_place, 2, config, True)
    for (gradients, loss), (expected_gradients, expected_loss) in zip(found, expected, strict=True):
        assert loss == expected_loss
        assert all(torch.equal(gradients[name], value) for name, value in expected_gradients.items())
