"""Messages and memory of real processes that train stages, step by step; observing the full model changes nothing."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resist_lightning import Engine, PartialModelError, StageConfig, StageSimulator
from resist_lightning.methods.auxnet.layout import StageLayout
from tests.helpers.memory import storage_bytes
from tests.helpers.processes import run_workers
from tests.helpers.stages import (
    CUTS,
    Run,
    batch_of,
    config_for,
    make_net,
    make_optimizer,
    start_engine,
    train_engine,
)
from tests.helpers.training import clone_state
from tests.helpers.wire import Call, Quantizer, groups, sent_bytes

RUNS = {
    "batch norm": Run(StageConfig(method="al-net", warmup_steps=2, aux_width=4, local_steps=100), 6, "preact"),
    "stored": Run(StageConfig(method="al-store", warmup_steps=2, local_steps=100), 5, batches=3),
    "rounds": Run(StageConfig(method="penalty", warmup_steps=2, local_steps=2), 5, optimizer="adamw"),
    "sequences": Run(StageConfig(method="penalty", warmup_steps=2, aux_width=4, local_steps=100), 4, "ids"),
}
OF_WORKERS = {2: ("stored", "rounds"), 3: tuple(RUNS)}


@dataclass
class Step:
    """A worker's messages and memory in a step."""

    calls: list[Call]
    counted: Counter[str]
    kept_bytes: int
    absent: set[str]


@dataclass
class History:
    """A worker's record of a run."""

    steps: list[Step] = field(default_factory=list)
    objects_stayed: bool = True
    answers_for_itself: bool = False
    groups: int = 0


def train_all(worker: int, workers: int) -> dict[str, History]:
    return {name: train(RUNS[name], workers) for name in OF_WORKERS[workers]}


def train(run: Run, workers: int) -> History:
    engine, optimizer = start_engine(run, workers)
    module, history = engine.module, History()
    objects = [id(tensor) for tensor in [*module.parameters(), *module.buffers()]]
    for step in range(run.steps):
        x, y = batch_of(run, step)
        before = Counter(engine.collective.sent_bytes)
        with Quantizer() as wire:
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(x), y).backward()
            optimizer.step()
            engine.count_step()
            calls = wire.take()
        counted = Counter(engine.collective.sent_bytes)
        counted.subtract(before)
        named = [*module.named_parameters(), *module.named_buffers()]
        absent = {name for name, tensor in named if tensor.is_meta}
        history.steps.append(Step(calls, counted, storage_bytes(module, [optimizer]), absent))
        engine.sync_if_due()
    history.groups = groups()
    engine.finish()
    history.objects_stayed = objects == [id(tensor) for tensor in [*module.parameters(), *module.buffers()]]
    history.answers_for_itself = "forward" not in vars(module)
    return history


def refusals(worker: int, run: Run, workers: int) -> list[str]:
    """The errors of a worker that is asked for what a stage alone cannot do."""
    engine, _ = start_engine(run, workers)
    x, _ = batch_of(run, 0)
    found = []
    with pytest.raises(PartialModelError) as error, torch.no_grad():
        engine.module(x)
    found.append(str(error.value))
    with pytest.raises(PartialModelError) as error:
        engine.module.eval()(x)
    found.append(str(error.value))
    with pytest.raises(PartialModelError) as error:
        engine.module.train()(x, x)
    found.append(str(error.value))
    with pytest.raises(PartialModelError) as error:
        engine.module.state_dict()
    found.append(str(error.value))
    engine.abandon()
    return found


@pytest.fixture(scope="module", params=OF_WORKERS)
def trained(request: pytest.FixtureRequest) -> list[dict[str, History]]:
    """For each worker, its record of each run."""
    return run_workers(train_all, request.param, request.param)


def shapes_of(run: Run, workers: int) -> tuple[list[int], int]:
    """Numbers per sample at each boundary and in the output, found by running the network."""
    net, found = make_net(run), []
    for name in CUTS[run.net][workers]:
        net.get_submodule(name).register_forward_hook(lambda *call: found.append(call[2][0].numel()))
    output = net.eval()(batch_of(run, 0)[0])
    return found, output[0].numel()


# ------------------------------------------------------------------ messages


def test_bytes_counted_are_the_closed_form_for_every_worker_step_and_kind(trained: list[dict[str, History]]) -> None:
    workers = len(trained)
    for name in trained[0]:
        run = RUNS[name]
        boundaries, output = shapes_of(run, workers)
        assert len(boundaries) == workers - 1
        for worker in range(workers):
            ends = sum(boundaries[max(worker - 1, 0) : worker + 1])
            for number, step in enumerate(trained[worker][name].steps):
                size = len(batch_of(run, number)[0])
                to_others = (workers - 1) * output if worker == workers - 1 else 0
                assert step.counted["boundary"] == size * ends * 8 > 0
                assert step.counted["output"] == size * to_others * 8
                others = {kind for kind, count in step.counted.items() if count} - {"boundary", "output"}
                assert others == ({"control"} if number < 3 else set()), (name, worker, number)


def test_bytes_counted_are_those_that_crossed_the_wire(trained: list[dict[str, History]]) -> None:
    for worker, histories in enumerate(trained):
        for history in histories.values():
            for step in history.steps:
                wire = sent_bytes(step.calls, worker, len(trained))
                assert step.counted["boundary"] + step.counted["output"] == wire["send"]
                assert sum(step.counted.values()) == sum(wire.values())


def test_a_step_is_three_messages_for_each_boundary_and_no_collective_after_the_first_three(
    trained: list[dict[str, History]],
) -> None:
    workers = len(trained)
    for name in trained[0]:
        for number in range(RUNS[name].steps):
            verbs = Counter(call.verb for worker in trained for call in worker[name].steps[number].calls)
            assert verbs.pop("send") == verbs.pop("recv_") == 3 * (workers - 1)
            assert verbs == ({"_allgather_base_": workers} if number < 3 else {})
        assert all(worker[name].groups == 1 for worker in trained)


def test_neighbours_talk_to_each_other_and_the_last_worker_to_all(trained: list[dict[str, History]]) -> None:
    last = len(trained) - 1
    for worker, histories in enumerate(trained):
        neighbours = {peer for peer in (worker - 1, worker + 1) if 0 <= peer <= last}
        for history in histories.values():
            for step in history.steps:
                peers = {call.peer for call in step.calls if call.verb == "send"}
                assert peers == (set(range(last)) if worker == last else neighbours)


def test_receives_are_posted_before_anything_is_sent(trained: list[dict[str, History]]) -> None:
    for histories in trained:
        for history in histories.values():
            for step in history.steps:
                verbs = [call.verb for call in step.calls if call.verb in ("send", "recv_")]
                assert verbs == sorted(verbs)  # "recv_" before "send"


LATE = Run(StageConfig(warmup_steps=2, local_steps=3), 5, "preact")


def bytes_of_late_gradients(worker: int, workers: int) -> Counter[str]:
    engine, _ = train_engine(worker, LATE, workers)
    return Counter(engine.collective.sent_bytes)


def test_late_gradients_send_in_a_run_what_guesses_send() -> None:
    """Step by step they differ: gradients of the last batches are sent when the full model is assembled."""
    workers = 3
    boundaries, output = shapes_of(LATE, workers)
    samples = sum(len(batch_of(LATE, number)[0]) for number in range(LATE.steps))
    for worker, counted in enumerate(run_workers(bytes_of_late_gradients, workers, workers)):
        ends = sum(boundaries[max(worker - 1, 0) : worker + 1])
        to_others = (workers - 1) * output if worker == workers - 1 else 0
        assert counted["boundary"] == samples * ends * 8 > 0
        assert counted["output"] == samples * to_others * 8


# ------------------------------------------------------------------ memory


SLOTS = {"sgd": 1, "adamw": 2}


def test_a_worker_keeps_its_stage_with_gradients_and_state_and_no_byte_more(trained: list[dict[str, History]]) -> None:
    for name in trained[0]:
        run, workers, kept = RUNS[name], len(trained), Counter[str]()
        layout = StageLayout(make_net(run), config_for(run, workers), workers)
        assert layout.chain is not None
        layout.cuts = layout.chain.positions(CUTS[run.net][workers])
        tensors = {n for n, _ in [*layout.module.named_parameters(), *layout.module.named_buffers()]}
        for worker in range(workers):
            mine = layout.stage_tensors(worker)
            kept.update(list(mine))
            parameters = [tensor for tensor in mine.values() if isinstance(tensor, nn.Parameter)]
            expected = sum((2 + SLOTS[run.optimizer]) * parameter.nbytes for parameter in parameters)
            expected += 4 * len(parameters) * (run.optimizer == "adamw")  # AdamW counts its steps
            for step in trained[worker][name].steps:
                assert step.absent == tensors - set(mine)
                assert step.kept_bytes == expected > 0
        assert kept == Counter(tensors)


def test_afterwards_the_module_is_the_whole_network_and_its_tensors_are_the_same_objects(
    trained: list[dict[str, History]],
) -> None:
    assert all(history.objects_stayed for worker in trained for history in worker.values())
    assert all(history.answers_for_itself for worker in trained for history in worker.values())


def test_a_stage_cannot_be_evaluated_and_says_what_can() -> None:
    for worker, (evaluated, too, called, saved) in enumerate(run_workers(refusals, 2, RUNS["batch norm"], 2)):
        assert evaluated == too
        assert f"worker {worker} has one stage" in evaluated
        assert "engine.full_model()" in evaluated
        assert "one input" in called
        assert f"it belongs to the stage of worker {1 - worker}, and this is worker {worker}" in saved


# ------------------------------------------------------------------ observations


def final(worker: int, runs: list[Run], workers: int) -> list[tuple[dict[str, Tensor], list[float], dict[str, Any]]]:
    found = []
    for run in runs:
        engine, losses = train_engine(worker, run, workers)
        found.append((clone_state(engine.module), losses, engine.sync.stage_worker.state_dict()))
    return found


def test_looking_at_the_full_model_in_the_middle_changes_nothing() -> None:
    """Bit for bit the same: weights, auxiliary networks, losses, and the worker's state."""
    run = replace(RUNS["batch norm"], config=replace(RUNS["batch norm"].config, local_steps=3, multiplier_every=3))
    watched = replace(run, observe_at=(0, 1, 2, 4, 5))
    for plain, observed in run_workers(final, 2, [run, watched], 2):
        assert observed[1] == plain[1]
        assert plain[0].keys() == observed[0].keys()
        assert all(torch.equal(observed[0][name], value) for name, value in plain[0].items())
        assert repr(observed[2]) == repr(plain[2])


class Tempered(nn.Module):
    """A module with a network inside, and a parameter of its own."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.net = make_net(run)
        self.temperature = nn.Parameter(torch.full((), 2.0, dtype=torch.float64))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits / self.temperature, labels)


OUTSIDE = {
    "late gradients": Run(StageConfig(warmup_steps=2, local_steps=3, network="net"), 7),
    "guesses": Run(StageConfig(method="penalty", warmup_steps=2, local_steps=3, beta=10.0, network="net"), 7),
}


def train_all_tempered(worker: int, workers: int) -> tuple[dict[str, dict[str, Tensor]], list[str], list[str]]:
    """The results, the warnings until then, and those of a training in which the workers' gradients differ."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        states = {name: train_tempered(run, workers) for name, run in OUTSIDE.items()}
        alike = [str(warning.message) for warning in caught]
        train_tempered(OUTSIDE["late gradients"], workers, factor=1.0 + worker)
        return states, alike, [str(warning.message) for warning in caught[len(alike) :]]


def train_tempered(run: Run, workers: int, factor: float = 1.0) -> dict[str, Tensor]:
    module = Tempered(run)
    optimizer = make_optimizer(run, module)
    engine = Engine(module, [optimizer], config_for(run, workers))
    engine.prepare(batch_of(run, 0)[0])
    engine.start()
    for step in range(run.steps):
        x, y = batch_of(run, step)
        optimizer.zero_grad()
        module.loss(module.net(x), y).backward()
        assert module.temperature.grad is not None
        module.temperature.grad *= factor
        optimizer.step()
        engine.after_step()
    engine.finish()
    return clone_state(module)


def test_what_lies_outside_of_the_network_trains_alike_on_all_workers() -> None:
    results = run_workers(train_all_tempered, 2, 2)
    states = [state for state, _, _ in results]
    said = "temperature, outside of the network that is cut, differed between the workers before a handshake"

    for _, alike, _ in results:
        assert not any(said in text for text in alike)
    assert [sum(said in text for text in apart) for _, _, apart in results] == [1, 0]
    for which, run in OUTSIDE.items():
        simulator = StageSimulator(
            Tempered(run), partial(make_optimizer, run), config_for(run, 2), 2, batch_of(run, 0)[0]
        )
        assert isinstance(simulator.module, Tempered)
        for step in range(run.steps):
            x, y = batch_of(run, step)
            simulator.step(x, partial(simulator.module.loss, labels=y))
        expected = clone_state(simulator.full_model())
        assert abs(expected["temperature"].item() - 2.0) > 1e-3
        for state in states:
            for name, value in expected.items():
                torch.testing.assert_close(state[which][name], value, rtol=1e-9, atol=1e-12)
                assert torch.equal(state[which][name], states[0][which][name])
