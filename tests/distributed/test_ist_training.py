"""IST by real gloo processes: weights of the simulator, bytes of the closed form, and memory of the slices alone.

Each number of workers trains its runs in one set of processes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resist_lightning import NeuronConfig
from resist_lightning.comm.byte_formulas import SYNC_KINDS, all_reduce_bytes
from resist_lightning.methods.ist.layout import NeuronLayout
from resist_lightning.schedule.progress import Clock
from resist_lightning.state.optimizer_state import OptimizerStates
from tests.helpers.ist import Run, batch_of, make_net, make_optimizer, one_holder, start_engine, train_simulator
from tests.helpers.memory import storage_bytes
from tests.helpers.processes import run_workers
from tests.helpers.training import assert_equal_states, clone_state, train_step
from tests.helpers.wire import Call, Quantizer, collectives_so_far, groups, sent_bytes

# AdamW trains no bias before batch norm: its gradient is rounding noise, which Adam blows up to steps of full length.
RUNS = {
    "reset": Run(one_holder(local_steps=3), 7),
    "travel, AdamW": Run(one_holder(local_steps=2, momentum="travel", seed=5), 5, optimizer="adamw"),
    "convolutions, travel": Run(one_holder(local_steps=2, momentum="travel"), 5, "conv"),
    "the paper's net, statistics of batches": Run(one_holder(local_steps=2, batch_norm="batch"), 5, "paper"),
    "biases, running statistics, keep": Run(
        one_holder(local_steps=2, batch_norm="running", momentum="keep"), 5, "biased"
    ),
    "no norm, a sync after every step": Run(NeuronConfig(local_steps=1, momentum="travel"), 4, "plain"),
    "frozen, travel": Run(one_holder(local_steps=2, momentum="travel"), 5, frozen=("0.weight", "3.weight", "8.bias")),
    "a choice of layers": Run(one_holder(local_steps=2, layers=["3", "6"]), 5),
    "several holders, travel": Run(NeuronConfig(local_steps=2, momentum="travel", min_share=0.6), 5),
    "more and more holders, at last all": Run(NeuronConfig(local_steps=1, growth=(0.1, 0.6), finish_rounds=1), 5),
    "one layer": Run(one_holder(local_steps=2, layers="0", momentum="travel"), 5),
}
OF_WORKERS = {2: ("reset", "convolutions, travel", "several holders, travel"), 3: tuple(RUNS)}


@dataclass
class Step:
    """A worker's messages and memory in a step."""

    training: list[Call]
    syncing: list[Call]
    numbers: tuple[int, int, int]
    counted: Counter[str]
    kept_bytes: int
    inner_bytes: int
    groups: int


@dataclass
class History:
    """A worker's record of a run, and its weights at the end."""

    steps: list[Step] = field(default_factory=list)
    final: dict[str, Tensor] = field(default_factory=dict)
    objects_stayed: bool = True


Trained = list[dict[str, History]]


def train_all(worker: int, names: Sequence[str]) -> dict[str, History]:
    return {name: train(worker, RUNS[name]) for name in names}


def train(worker: int, run: Run) -> History:
    engine, optimizer = start_engine(run)
    objects = [id(tensor) for tensor in [*engine.module.parameters(), *engine.module.buffers()]]
    history = History()
    for step in range(run.steps):
        before = Counter(engine.collective.sent_bytes)
        with Quantizer() as wire:
            first = collectives_so_far()
            train_step(engine.module, optimizer, batch_of(run, worker, step))
            training, second = wire.take(), collectives_so_far()
            kept, inner = storage_bytes(engine.module, [optimizer]), inner_bytes(engine, optimizer)
            engine.after_step()
            syncing, third = wire.take(), collectives_so_far()
        counted = Counter(engine.collective.sent_bytes)
        counted.subtract(before)
        history.steps.append(Step(training, syncing, (first, second, third), counted, kept, inner, groups()))
        history.objects_stayed &= objects == [id(t) for t in [*engine.module.parameters(), *engine.module.buffers()]]
    engine.finish()
    history.final = clone_state(engine.module)
    return history


def inner_bytes(engine: Any, optimizer: Any) -> int:
    """Bytes of the matrices between hidden layers, with gradients and state."""
    found = 0
    for name in engine.layout.inner():
        parameter = engine.module.get_parameter(name)
        tensors = [parameter, parameter.grad, *optimizer.state.get(parameter, {}).values()]
        found += sum(t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor) and t.dim())
    return found


@pytest.fixture(scope="module")
def all_trained() -> dict[int, list[dict[str, History]]]:
    """For each number of workers and each worker, its record of each run."""
    return {workers: run_workers(train_all, workers, names) for workers, names in OF_WORKERS.items()}


@pytest.fixture(params=OF_WORKERS)
def trained(all_trained: dict[int, list[dict[str, History]]], request: pytest.FixtureRequest) -> Trained:
    return all_trained[request.param]


EACH = pytest.mark.parametrize(
    ("trained", "name"),
    [(workers, name) for workers, names in OF_WORKERS.items() for name in names],
    indirect=["trained"],
)


def runs_of(trained: Trained) -> list[tuple[str, Run]]:
    return [(name, RUNS[name]) for name in trained[0]]


def layout_of(run: Run, workers: int) -> NeuronLayout:
    layout = NeuronLayout(make_net(run), run.config, workers)
    layout.plan_end(Clock.by(run.config.local_steps, lambda: None), run.steps)
    return layout


def has_several_holders(run: Run) -> bool:
    return run.config.min_share != 0 or run.config.growth is not None


# ------------------------------------------------------------------ weights


@EACH
def test_processes_train_what_the_simulator_trains(trained: Trained, name: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes
    expected = train_simulator(RUNS[name], len(trained)).full_model().state_dict()
    torch.set_num_threads(threads)
    assert_equal_states(trained[0][name].final, expected)
    for worker in trained[1:]:
        assert_equal_states(worker[name].final, trained[0][name].final, exactly=True)


@EACH
def test_entries_that_were_in_no_slice_are_what_they_were_bit_for_bit(trained: Trained, name: str) -> None:
    """Check 4 of section 8, over all rounds; of trained tensors nearly all other entries have changed."""
    run, workers = RUNS[name], len(trained)
    layout, net = layout_of(run, workers), make_net(run)
    first, untouched = clone_state(net), 0
    rounds = -(-run.steps // run.config.local_steps)
    for key, parameter in net.named_parameters():
        never = torch.ones(parameter.shape, dtype=torch.bool)
        cut = layout.inner().get(key)
        for round in range(rounds):
            for worker in range(workers):
                if cut is None:
                    never[:] = False
                    continue
                rows, columns = (layout.partition(round)[side].held[worker] for side in (cut.rows, cut.columns))
                spread = [column * cut.repeat + i for column in columns for i in range(cut.repeat)]
                never[torch.tensor(rows).unsqueeze(1), torch.tensor(spread)] = False
        final = trained[0][name].final[key]
        assert torch.equal(final[never], first[key][never])
        if not parameter.requires_grad:
            assert torch.equal(final, first[key])
        elif name != "biases, running statistics, keep":  # before batch norm they have no gradient
            assert (final[~never] != first[key][~never]).float().mean() > 0.95
        untouched += int(never.sum())
    # With several holders, every entry may have been in a slice after so many rounds.
    assert has_several_holders(run) or (untouched > 0) == bool(layout.inner())


def test_parameters_are_the_same_objects_all_the_time(trained: Trained) -> None:
    assert all(history.objects_stayed for worker in trained for history in worker.values())


# ------------------------------------------------------------------ messages


def syncs(run: Run, history: History) -> list[Step]:
    found = history.steps[run.config.local_steps - 1 :: run.config.local_steps]
    assert len(found) == run.steps // run.config.local_steps > 0
    return found


def test_bytes_counted_are_the_closed_form_for_every_worker_round_and_kind(trained: Trained) -> None:
    workers, kinds = len(trained), Counter[str]()
    for name, run in runs_of(trained):
        layout = layout_of(run, workers)
        states = OptimizerStates([make_optimizer(run, layout.module)])
        changing = [tensor for key, tensor in layout.shared.items() if key in layout.changing()]
        whole = Counter[torch.dtype]()
        for tensor in changing:
            whole[tensor.dtype] += tensor.nbytes
        shared = sum(all_reduce_bytes(size, workers) for size in whole.values())
        for worker in range(workers):
            for round, sync in enumerate(syncs(run, trained[worker][name])):
                expected = {"shared": shared, "merge": 0, "outer": 0, **layout.hand_over_bytes(round, states)[worker]}
                assert {kind: sync.counted[kind] for kind in SYNC_KINDS} == expected, (name, worker, round)
                kinds.update(expected)
                others = {kind for kind, count in sync.counted.items() if count} - set(SYNC_KINDS)
                assert others == {"control"}
    assert all(kinds[kind] > 0 for kind in ("shared", "merge", "hand_over", "state"))


def test_bytes_counted_are_those_that_crossed_the_wire(trained: Trained) -> None:
    for worker, histories in enumerate(trained):
        for history in histories.values():
            for step in history.steps:
                wire = sent_bytes(step.syncing, worker, len(trained))
                assert step.counted["shared"] == wire["allreduce_"]
                assert sum(step.counted[kind] for kind in ("merge", "hand_over", "state")) == wire["send"]
                assert step.counted["control"] == wire["_allgather_base_"]
                assert sum(step.counted.values()) == sum(wire.values())


def test_between_two_syncs_nobody_says_a_word_and_no_group_is_ever_made(trained: Trained) -> None:
    silent = 0
    for histories in trained:
        for name, history in histories.items():
            due = {id(step) for step in syncs(RUNS[name], history)}
            for step in history.steps:
                first, second, third = step.numbers
                assert step.training == []
                assert (second - first, third - second) == (0, len(step.syncing))
                assert bool(step.syncing) == (id(step) in due)
                assert step.groups == 1
                silent += id(step) not in due
    assert silent > 0


def test_a_worker_sends_every_other_at_most_one_message_of_each_data_type(trained: Trained) -> None:
    """However many tensors there are, with receives posted before sends; with several holders another one for means."""
    sent, received, times = Counter[Any](), Counter[Any](), Counter[Any]()
    for worker, histories in enumerate(trained):
        for name, history in histories.items():
            for round, sync in enumerate(syncs(RUNS[name], history)):
                verbs = [call.verb for call in sync.syncing]
                assert set(verbs) <= {"_allgather_base_", "allreduce_", "send", "recv_"}
                assert verbs.count("_allgather_base_") == 1
                assert verbs.count("allreduce_") <= 2  # of floats, and of batch norm's counters of batches
                messages = [verb for verb in verbs if verb in ("send", "recv_")]
                begins = [verb for verb, _ in groupby(messages)]  # "recv_" before "send", once or twice
                assert begins == ["recv_", "send"] * (len(begins) // 2)
                assert len(begins) <= (4 if has_several_holders(RUNS[name]) else 2)
                for call in sync.syncing:
                    if call.verb == "send":
                        sent[name, round, worker, call.peer, call.payload_bytes, call.dtype] += 1
                        times[name, round, worker, call.peer, call.dtype] += 1
                    elif call.verb == "recv_":
                        received[name, round, call.peer, worker, call.payload_bytes, call.dtype] += 1
    assert sent == received
    assert sent.total() > 0
    assert all(count <= 1 + has_several_holders(RUNS[name]) for (name, *_), count in times.items())


# ------------------------------------------------------------------ memory


SLOTS = {"sgd": 1, "adamw": 2}


def test_after_every_step_a_worker_keeps_its_slices_with_gradients_and_state_and_no_byte_more(
    trained: Trained,
) -> None:
    workers = len(trained)
    for name, run in runs_of(trained):
        layout, net = layout_of(run, workers), make_net(run)
        shared = [tensor for key, tensor in layout.shared.items() if key in layout.changing()]
        together = any(isinstance(tensor, nn.Parameter) for tensor in shared)  # in one storage with buffers
        buffers = [tensor for tensor in shared if not isinstance(tensor, nn.Parameter) and tensor.is_floating_point()]
        for worker in range(workers):
            for number, step in enumerate(trained[worker][name].steps):
                expected, round = 0, number // run.config.local_steps
                for key, parameter in net.named_parameters():
                    shape = layout.held_shape(key, worker, round) if key in layout.shapes else parameter.shape
                    copies = 2 + SLOTS[run.optimizer] if parameter.requires_grad else 1
                    expected += copies * 4 * prod(shape)
                    expected += 4 * parameter.requires_grad * (run.optimizer == "adamw")  # AdamW counts its steps
                expected += together * sum(buffer.nbytes for buffer in buffers)
                assert step.kept_bytes == expected, (name, worker)


def test_of_matrices_between_hidden_layers_a_worker_keeps_the_square_of_its_share(
    trained: Trained,
) -> None:
    workers = len(trained)
    for name, run in runs_of(trained):
        if has_several_holders(run):
            continue
        layout = layout_of(run, workers)
        most = 0
        for key, cut in layout.inner().items():
            shape = layout.shapes[key]
            rows = -(-shape[0] // workers)
            columns = -(-(shape[1] // cut.repeat) // workers) * cut.repeat
            copies = 2 + SLOTS[run.optimizer] if key not in run.frozen else 1
            most += 4 * copies * rows * columns * prod(shape[2:])
        assert all(0 <= step.inner_bytes <= most for worker in trained for step in worker[name].steps)
        if any(isinstance(module, nn.LayerNorm) for module in layout.module) and layout.inner():
            assert trained[0][name].steps[0].inner_bytes > 0
