"""Batch-norm statistics of the full model: re-estimated, or of each batch, and nothing else changes."""

from __future__ import annotations

import copy
import io
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from resist_lightning.checkpoint.files import to_sealed_bytes
from resist_lightning.models import PreActBlock
from resist_lightning.state.batch_norm import BatchStatistics, norms_with_statistics, recalibrate
from resist_lightning.state.input_recorder import InputRecorder
from tests.helpers.nets import randomise_norms, small_preact


class Noisy(nn.Module):
    """A convolution, dropout, batch norm, and a head."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Dropout(0.5), nn.BatchNorm2d(5, momentum=0.3))
        self.head = nn.Linear(5, 2)

    def forward(self, x, *, scale=1.0):
        return self.head(self.net(scale * x).mean((2, 3)))


def images(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 3, 6, 6, generator=generator) for _ in range(count)]


def test_recalibration_is_the_plain_mean_over_the_recorded_inputs():
    module = Noisy()
    norm = module.net[2]
    batches = images(5)
    changed = recalibrate(module, [(module, (x,), {"scale": 2.0}) for x in batches], nullcontext)

    inputs = [module.net[0](2.0 * x).detach() for x in batches]
    means = torch.stack([y.mean((0, 2, 3)) for y in inputs]).mean(0)
    variances = torch.stack([y.var((0, 2, 3), unbiased=True) for y in inputs]).mean(0)
    torch.testing.assert_close(norm.running_mean, means)
    torch.testing.assert_close(norm.running_var, variances)
    assert [id(t) for t in changed] == [id(norm.running_mean), id(norm.running_var)]


def test_recalibration_sees_what_flows_through_the_whole_network():
    """The second norm sees the first one's output, normalised by the batch as in training."""
    block = PreActBlock(3, 3)
    randomise_norms(block)
    x = images(1)[0]
    recalibrate(block, [(block, (x,), {})], nullcontext)
    normal = torch.nn.functional.batch_norm(x, None, None, block.bn1.weight, block.bn1.bias, training=True)
    inside = block.conv1(torch.relu(normal)).detach()
    torch.testing.assert_close(block.bn2.running_mean, inside.mean((0, 2, 3)))


def test_recalibration_moves_nothing_else():
    module = Noisy().train()
    module.net[1].eval()
    norm = module.net[2]
    norm.num_batches_tracked.fill_(17)
    others = {n: t.clone() for n, t in module.state_dict().items() if "running" not in n}
    modes = [child.training for child in module.modules()]
    random = torch.get_rng_state()
    entered = []

    @contextmanager
    def context():
        entered.append(torch.is_grad_enabled())
        yield

    calls = [(module, (x,), {}) for x in images(3)]
    recalibrate(module, calls, context)
    first = norm.running_mean.clone()
    recalibrate(module, calls, context)

    torch.testing.assert_close(norm.running_mean, first, rtol=0, atol=0)  # dropout is off
    assert torch.equal(torch.get_rng_state(), random)
    assert [child.training for child in module.modules()] == modes
    assert norm.momentum == 0.3
    assert int(norm.num_batches_tracked) == 17
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in others.items())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert entered == [False, False]


def test_only_norms_that_keep_statistics_count():
    module = nn.ModuleDict(
        {"a": nn.BatchNorm1d(2), "b": nn.BatchNorm2d(2, track_running_stats=False), "c": nn.GroupNorm(1, 2)}
    )
    assert list(norms_with_statistics(module)) == ["a"]


def recorded(module, calls=3):
    recorder = InputRecorder(module, calls)
    return recorder, lambda: [(type(called).__name__, args, kwargs) for called, args, kwargs in recorder.calls]


def test_the_recorder_keeps_the_last_training_calls_of_the_outermost_module():
    module = Noisy().train()
    recorder, seen = recorded(module)
    batches = images(5)
    for x in batches:
        module(x, scale=3.0)
    assert [(name, kwargs) for name, _, kwargs in seen()] == [("Noisy", {"scale": 3.0})] * 3
    assert [args[0] is x or torch.equal(args[0], x) for (_, args, _), x in zip(seen(), batches[2:], strict=True)]
    recorder.remove()
    module(batches[0])
    assert seen() == []


def test_where_a_training_step_calls_the_network_only_the_network_is_recorded():
    module = nn.ModuleDict({"net": Noisy(), "loss": nn.Linear(2, 1)}).train()
    recorder, seen = recorded(module)
    x = images(1)[0]
    module["loss"](module["net"](x))
    assert [name for name, _, _ in seen()] == ["Noisy"]
    recorder.remove()


def test_a_network_in_compiled_code_is_recorded_where_the_code_is_called():
    module = nn.ModuleDict({"net": torch.compile(Noisy(), backend="eager"), "loss": nn.Linear(2, 1)}).train()
    recorder, seen = recorded(module)
    for x in images(2):
        module["net"](x).sum().backward()
    assert [name for name, _, _ in seen()] == ["OptimizedModule"] * 2
    assert recorder.idle
    recorder.remove()


def test_the_recorder_ignores_evaluation_and_calls_without_gradient():
    module = Noisy().train()
    recorder, seen = recorded(module)
    x = images(1)[0]
    with torch.no_grad():
        module(x)
    module.eval()(x)
    module.train()
    assert seen() == []
    module(x)
    assert len(seen()) == 1
    recorder.remove()


def test_the_recorder_keeps_no_graph_and_survives_an_error_in_forward():
    module = Noisy().train()
    recorder, seen = recorded(module)
    with pytest.raises(RuntimeError):
        module(torch.randn(2, 7, 6, 6))
    x = images(1)[0].requires_grad_()
    module(2 * x)
    assert len(seen()) == 2
    assert not seen()[-1][1][0].requires_grad
    recorder.remove()
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())


def test_batch_statistics_normalise_by_the_batch_and_leave_the_buffers_alone():
    module = small_preact()
    randomise_norms(module)
    twin = small_preact(track_running_stats=False)
    twin.load_state_dict(module.state_dict(), strict=False)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    x = torch.randn(6, 3, 8, 8)
    running = module.eval()(x)

    batch = BatchStatistics(norms_with_statistics(module).values())
    torch.testing.assert_close(module.eval()(x), twin.eval()(x))
    torch.testing.assert_close(module.train()(x), twin.train()(x))
    assert list(module.state_dict()) == list(state)
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in state.items())

    batch.remove()
    torch.testing.assert_close(module.eval()(x), running, rtol=0, atol=0)
    assert not torch.allclose(running, twin.eval()(x))


def test_a_norm_that_the_recorded_inputs_do_not_reach_keeps_its_statistics():
    """A teacher, or an averaged copy of the network, lives in the module and is not called in training."""
    module = nn.ModuleDict({"student": Noisy(), "teacher": Noisy()})
    randomise_norms(module)
    before = module["teacher"].net[2].running_mean.clone()
    recalibrate(module, [(module["student"], (x,), {}) for x in images(2)], nullcontext)
    torch.testing.assert_close(module["teacher"].net[2].running_mean, before, rtol=0, atol=0)


def test_a_norm_that_the_user_keeps_in_evaluation_mode_keeps_its_statistics():
    """Frozen batch norm, as in fine-tuning: statistics that do not train are not re-estimated."""
    module = nn.Sequential(Noisy().net, Noisy().net[2]).train()
    randomise_norms(module)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    recorder, _ = recorded(module)
    module[0][2].eval()
    for x in images(2):
        module(x)
    assert recorder.still == {"0.2"}
    changed = recalibrate(module, list(recorder.calls), nullcontext, recorder.still)
    assert [id(t) for t in changed] == [id(module[1].running_mean), id(module[1].running_var)]
    assert torch.equal(module[0][2].running_mean, before["0.2.running_mean"])
    assert torch.equal(module[0][2].running_var, before["0.2.running_var"])
    assert not torch.equal(module[1].running_mean, before["1.running_mean"])
    assert [child.training for child in module.modules()].count(False) == 1
    module[0][2].train()
    module(images(1)[0])
    assert recorder.still == set()
    recorder.remove()


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.section = nn.Sequential(PreActBlock(4, 4))

    def forward(self, x):
        return checkpoint(self.section, self.stem(x), use_reentrant=False)


def test_activation_checkpointing_records_a_batch_once():
    """Stale activations of a section would be replayed as inputs, and displace real batches."""
    module = Checkpointed().train()
    recorder, seen = recorded(module)
    module(images(1)[0]).sum().backward()
    assert [name for name, _, _ in seen()] == ["Checkpointed"]
    recorder.remove()


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(x.sub_(5).div_(2))


def test_recorded_inputs_are_those_that_the_network_was_called_with():
    """They stay the same if a forward changes them, in training or replay, or if a loader refills them."""
    module, static = InPlace().train(), torch.empty(64, 3)
    recorder, _ = recorded(module, calls=8)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(64, 3, generator=generator) * 2 + 5 + step for step in range(8)]
    for batch in batches:
        module(static.copy_(batch))
    expected = torch.stack([(batch.mean(0) - 5) / 2 for batch in batches]).mean(0)
    for _ in range(2):
        recalibrate(module, list(recorder.calls), nullcontext)
        torch.testing.assert_close(module.norm.running_mean, expected)
    recorder.remove()


class Counting(Noisy):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def test_recalibration_does_not_count_as_calls():
    module = Counting()
    recalibrate(module, [(module, (x,), {}) for x in images(3)], nullcontext)
    assert int(module.calls) == 0


@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "the network"])
def test_compiled_networks_are_recorded_without_graph_breaks_and_re_estimated(whole):
    torch._dynamo.reset()
    net = small_preact()
    plain = copy.deepcopy(net)
    compiled = [net] if whole else [block for block in net.modules() if type(block).__name__ == "PreActBlock"][:2]
    for module in compiled:
        module.compile(backend="eager", fullgraph=True)
    recorder = InputRecorder(net, 2)
    batches = [torch.randn(2, 3, 8, 8) for _ in range(3)]
    for batch in batches:
        net(batch).sum().backward()
    assert [
        len(recorder.calls),
        *(args[0].equal(x) for (_, args, _), x in zip(recorder.calls, batches[1:], strict=True)),
    ] == [2, True, True]
    recalibrate(net, list(recorder.calls), nullcontext)
    recalibrate(plain, [(plain, args, {}) for _, args, _ in recorder.calls], nullcontext)
    expected = norms_with_statistics(plain)
    for name, norm in norms_with_statistics(net).items():
        torch.testing.assert_close(norm.running_mean, expected[name].running_mean)
        torch.testing.assert_close(norm.running_var, expected[name].running_var)
    torch._dynamo.reset()


def test_calls_without_gradients_only_are_noted_as_missed():
    net = small_preact()
    recorder = InputRecorder(net, 2)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    net.eval()(x)
    assert not recorder.missed
    checkpoint(net.train(), x, use_reentrant=True).sum().backward()
    assert recorder.missed
    assert not recorder.calls


class Images(NamedTuple):
    images: torch.Tensor


class OfImages(Noisy):
    def forward(self, x, **options):
        return super().forward(x.images if isinstance(x, Images) else x, **options)


@pytest.mark.parametrize(
    ("given", "options", "saved"),
    [
        (Images(images(1)[0]), {}, False),
        (images(1)[0], {"scale": np.float64(2)}, False),
        (images(1)[0], {"scale": 2.0}, True),
    ],
)
def test_only_inputs_that_a_file_can_hold_are_saved(given, options, saved):
    """Files with a class of the user's were written, and refused when the run was to resume."""
    module = OfImages()
    recorder = InputRecorder(module, 2)
    module(given, **options)
    state = recorder.state_dict()
    recorder.remove()
    assert (state is not None) == saved
    torch.load(io.BytesIO(to_sealed_bytes(state)), weights_only=True)
