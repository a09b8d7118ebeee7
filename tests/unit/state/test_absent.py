"""Contract 5: an absent tensor's values cannot be read in any way that torch has; everything else of it can."""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, parameters_to_vector, prune
from torch.optim.swa_utils import AveragedModel

from resist_lightning import Config, Engine, PartialModelError, Simulator
from resist_lightning.state.absent import Absence
from resist_lightning.state.memory import make_absent, replace_memory
from tests.helpers.nets import Computed, Recurrent, mlp, small_preact
from tests.helpers.threads import run_threads
from tests.helpers.training import Run, assert_equal_states, batch_of, clone_state, make_optimizer, train_step

ABSENCE = Absence("worker 1 has it")


def absent(*shape, kind=nn.Parameter, **options):
    tensor = kind(torch.zeros(shape)) if kind is nn.Parameter else torch.zeros(shape, **options)
    make_absent("layer.weight", tensor, ABSENCE)
    return tensor


def square():
    return torch.ones(8, 8)


@torch.jit.script
def scripted(a, b):
    return a.add_(b)


# Each reads an absent p of shape (8, 8), and a present e. Without the error most would return e, or memory that
# was never written.
READS = {
    "add_": lambda p, e: e.add_(p),
    "add_ alpha": lambda p, e: e.mul_(0.9).add_(p, alpha=0.1),
    "mul_": lambda p, e: e.mul_(p),
    "addcmul_": lambda p, e: e.addcmul_(p, p),
    "lerp_": lambda p, e: e.lerp_(p, 0.1),
    "copy_": lambda p, e: e.copy_(p),
    "_foreach_add_": lambda p, e: torch._foreach_add_([e], [p], alpha=0.1),
    "_foreach_lerp_": lambda p, e: torch._foreach_lerp_([e], [p], 0.1),
    "_foreach_norm": lambda p, e: torch._foreach_norm([e, p]),
    "+": lambda p, e: e + p,
    "*": lambda p, e: 0.1 * p,
    "maximum": lambda p, e: torch.maximum(e, p),
    "where": lambda p, e: torch.where(e > 0, p, e),
    "matmul": lambda p, e: e @ p,
    "linear": lambda p, e: functional.linear(e, p),
    "addmm": lambda p, e: torch.addmm(e, e, p),
    "conv2d": lambda p, e: functional.conv2d(e[None, None], p[None, None]),
    "layer_norm": lambda p, e: functional.layer_norm(e, (8, 8), p, p),
    "embedding": lambda p, e: functional.embedding(torch.tensor([0]), p),
    "cat": lambda p, e: torch.cat([e, p]),
    "stack": lambda p, e: torch.stack([p]),
    "scatter_": lambda p, e: e.scatter_(0, torch.zeros(8, 8, dtype=torch.long), p),
    "index_copy_": lambda p, e: e.index_copy_(0, torch.arange(8), p),
    "[]": lambda p, e: p[0],
    "[] =": lambda p, e: e.__setitem__(slice(None), p),
    "an index": lambda p, e: e[p.long()],
    "iteration": lambda p, e: list(p),
    "view": lambda p, e: p.view(-1),
    "sum": lambda p, e: p.sum(),
    "norm": lambda p, e: torch.linalg.vector_norm(p),
    "==": lambda p, e: e == p,
    "zeros_like": lambda p, e: e.add_(torch.zeros_like(p)),
    "clone": lambda p, e: p.clone(),
    "detach": lambda p, e: p.detach(),
    "data": lambda p, e: p.data,
    "data =": lambda p, e: setattr(p, "data", e),
    "write": lambda p, e: nn.init.normal_(p),
    "cpu": lambda p, e: p.cpu(),
    "to": lambda p, e: p.to("cpu"),
    "to dtype": lambda p, e: p.to(torch.float64),
    "numpy": lambda p, e: p.numpy(),
    "asarray": lambda p, e: np.asarray(p),
    "tolist": lambda p, e: p.tolist(),
    "dlpack": lambda p, e: torch.from_dlpack(p),
    "deepcopy": lambda p, e: copy.deepcopy(p),
    "pickle": lambda p, e: pickle.dumps(p),
    "torch.save": lambda p, e: torch.save({"p": p}, io.BytesIO()),
    "functional_call": lambda p, e: functional_call(nn.Linear(8, 8), {"weight": p}, (e,)),
    "vmap": lambda p, e: torch.vmap(torch.add)(e, p),
    "parameters_to_vector": lambda p, e: parameters_to_vector([p]),
    "histogram": lambda p, e: torch.histc(p),
    "Parameter": lambda p, e: nn.Parameter(p),
    "out": lambda p, e: torch.add(e, e, out=p),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
@pytest.mark.parametrize("kind", [nn.Parameter, torch.zeros], ids=["parameter", "buffer"])
def test_reading_a_value_raises_and_says_what_where_and_the_way_out(read, kind):
    with (
        pytest.raises(PartialModelError, match=r"layer.weight cannot be read: worker 1 has it. Read it where.*is_meta"),
        torch.no_grad(),
    ):
        read(absent(8, 8, kind=kind), square())


def test_a_number_a_mask_and_a_scripted_function_raise_too():
    with pytest.raises(PartialModelError):
        absent().item()
    with pytest.raises(PartialModelError):
        bool(absent())
    with pytest.raises(PartialModelError):
        square()[absent(8, 8, kind=torch.zeros, dtype=torch.bool)]
    with pytest.raises(RuntimeError, match="TorchScript interpreter"):  # the only error of TorchScript
        scripted(square(), absent(8, 8, kind=torch.zeros))


def test_what_is_no_value_is_free():
    class Special(nn.Parameter):
        pass

    weight = Special(torch.ones(3, 4).T)
    weight.group = "slow"
    number, hooked = hash(weight), []
    make_absent("layer.weight", weight, ABSENCE)
    assert (weight.shape, weight.stride(), weight.dtype, weight.dim()) == ((4, 3), (1, 4), torch.float32, 2)
    assert (weight.numel(), len(weight), weight.nbytes, weight.group) == (12, 4, 48, "slow")
    assert weight.is_meta
    assert weight.is_leaf
    assert weight.grad is None
    assert hash(weight) == number == id(weight)
    assert weight in {weight}
    assert isinstance(weight, Special)
    assert repr(weight) == str(weight) == "Special(absent: layer.weight, (4, 3), torch.float32; worker 1 has it)"
    assert not weight.requires_grad_(False).requires_grad
    assert torch.zeros_like(weight).is_meta
    assert weight.new_ones(2, dtype=torch.int64, device="cpu").tolist() == [1, 1]
    weight.requires_grad_(True)
    weight.register_hook(lambda gradient: hooked.append("hook"))
    replace_memory("layer.weight", weight, torch.ones(4, 3))
    assert type(weight) is Special
    assert vars(weight) == {"group": "slow"}
    weight.sum().backward()
    assert hooked == ["hook"]


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=["default", "foreach", "fused"])
def test_what_goes_by_gradients_skips_what_is_absent(options):
    present, gone = nn.Parameter(torch.ones(3)), absent(2)
    optimizer = torch.optim.AdamW([present, gone], lr=0.1, **options)
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(2):
        optimizer.zero_grad()
        scaler.scale(present.sum()).backward()
        scaler.unscale_(optimizer)
        assert clip_grad_norm_([present, gone], 1.0) == pytest.approx(3**0.5)
        clip_grad_value_([present, gone], 0.5)
        scaler.step(optimizer)
        scaler.update()
    optimizer.load_state_dict(optimizer.state_dict())
    assert list(optimizer.state) == [present]
    assert not present.detach().equal(torch.ones(3))
    assert torch.autograd.grad(present.sum(), [present, gone], allow_unused=True)[1] is None


@pytest.fixture
def net():
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    for name, tensor in [*net[1].named_parameters(), *net[1].named_buffers()]:
        make_absent(name, tensor, ABSENCE)
    return net


@pytest.mark.parametrize(
    "save",
    [
        lambda net: net.state_dict(),
        lambda net: net[1].state_dict(),
        copy.deepcopy,
        pickle.dumps,
        lambda net: torch.save(net, io.BytesIO()),
        lambda net: torch.save(net.state_dict(keep_vars=True), io.BytesIO()),
        lambda net: AveragedModel(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))).update_parameters(net),
        lambda net: prune.l1_unstructured(net[1], "weight", 0.5),
        lambda net: net[1].to(torch.float64),
        lambda net: net(torch.ones(2, 3)),
    ],
)
def test_a_module_with_absent_parts_is_not_saved_copied_or_converted(net, save):
    with pytest.raises(PartialModelError):
        save(net)
    assert set(net[0].state_dict()) == {"weight", "bias"}
    torch.testing.assert_close(copy.deepcopy(net[0])(torch.ones(2, 3)), net[0](torch.ones(2, 3)))


def test_counting_freezing_and_compiling_another_part_are_free(net):
    assert sum(parameter.numel() for parameter in net.parameters()) == 3 * 3 + 3 + 2 * 3
    net.requires_grad_(False)
    net.zero_grad()
    compiled = torch.compile(net[0], backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(torch.ones(2, 3)), net[0](torch.ones(2, 3)))


# ------------------------------------------------------------------ while workers train


@torch.no_grad()
def update(average, net):
    """A moving average as users write it."""
    for name, parameter in net.named_parameters():
        average[name].mul_(0.9).add_(parameter, alpha=0.1)


def train_partially(collective):
    """The errors of a worker that reads the other one's blocks, and this worker's blocks; the full model works."""
    net = small_preact()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    engine = Engine(net, [optimizer], Config(local_steps=2, min_blocks=1), collective=collective)
    average = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    engine.start()
    said = []
    for step in range(3):
        train_step(net, optimizer, batch_of(collective.worker, step))
        with pytest.raises(PartialModelError) as error:
            update(average, net)
        said.append(str(error.value))
        for copied in (copy.deepcopy, pickle.dumps, lambda module: module.state_dict()):
            with pytest.raises(PartialModelError):
                copied(net)
        assert net.section1.state_dict()
        with engine.full_model():
            assert copy.deepcopy(net)(batch_of(0, 0)[0]).isfinite().all()
            pickle.loads(pickle.dumps(net)).load_state_dict(net.state_dict())
        engine.after_step()
    held = engine.layout.partition(1).held[collective.worker]
    engine.finish()
    assert {type(parameter) for parameter in net.parameters()} == {nn.Parameter}
    net.state_dict()
    return said, held


def test_a_worker_is_told_who_has_what_it_asked_for():
    for worker, (said, held) in enumerate(run_threads(train_partially, 2)[0]):
        first = next(block for block in range(4) if block not in held)
        where = f"in round 1 its block is held by worker(s) {1 - worker}, not by worker {worker}"
        assert said[2].startswith(f"section3.{first + 1}.bn1.weight cannot be read: {where}. Read it where")
        assert said[0] == said[1] != said[2]


def end_early(collective):
    net = small_preact()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    engine = Engine(net, [optimizer], Config(local_steps=2, min_blocks=1), collective=collective)
    engine.start()
    engine.abandon()
    with pytest.raises(PartialModelError, match=r"training ended with an error.*Load a checkpoint"):
        net.state_dict()
    with pytest.raises(RuntimeError, match="cannot be read: the training ended with an error"):
        net.load_state_dict(small_preact().state_dict())
    return sum(parameter.is_meta for parameter in net.parameters())


def test_after_an_error_what_is_absent_says_so():
    assert all(run_threads(end_early, 2)[0])


def train_blocks(collective, nets):
    net = nets[collective.worker]
    optimizer = make_optimizer(SEQUENCES, net)
    engine = Engine(net, [optimizer], SEQUENCES.config, collective=collective)
    engine.start()
    for step in range(5):
        train_step(net, optimizer, sequence_batch(collective.worker, step))
        if step == 3:
            with engine.full_model():
                net.eval()(sequence_batch(0, 0)[0])
        engine.after_step()
    engine.finish()
    return clone_state(net)


def trained(block):
    return run_threads(train_blocks, 2, [sequences(block), sequences(block)])[0][0]


SEQUENCES = Run(Config(local_steps=2, min_blocks=1, blocks="body.*", batch_norm="running"), 0)


def sequences(block):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return mlp(block)


def sequence_batch(worker, step):
    generator = torch.Generator().manual_seed(100 * worker + step)
    return torch.randn(4, 4, 3, generator=generator), torch.randint(0, 4, (4, 4), generator=generator)


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU])
def test_blocks_with_recurrent_layers_train_as_in_the_reference(layer):
    block = partial(Recurrent, layer=layer)
    simulator = Simulator(sequences(block), lambda net: make_optimizer(SEQUENCES, net), SEQUENCES.config, 2)
    for step in range(5):
        for worker, simulated in enumerate(simulator.workers):
            train_step(simulated.module, simulated.optimizers[0], sequence_batch(worker, step))
        simulator.after_step()
    assert_equal_states(trained(block), clone_state(simulator.full_model()))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_old_weight_norm_trains_as_the_new_one_does():
    old = trained(partial(Computed, wrap=nn.utils.weight_norm))
    new = trained(partial(Computed, wrap=nn.utils.parametrizations.weight_norm))
    for name, tensor in old.items():
        other = name.replace("weight_g", "parametrizations.weight.original0")
        torch.testing.assert_close(tensor, new[other.replace("weight_v", "parametrizations.weight.original1")])
