"""The full model during a run: its outputs, and that it does not affect the training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resist_lightning import Config, Engine, NeuronConfig
from tests.helpers import ist
from tests.helpers.by_hand import chain
from tests.helpers.nets import Undeclared, mlp, small_preact
from tests.helpers.threads import run_threads
from tests.helpers.training import (
    assert_equal_states,
    batch_of,
    clone_state,
    engine_for,
    train_step,
)


def observed(model):
    return {name: (id(t), t.detach().clone(), t.requires_grad) for name, t in model.state_dict(keep_vars=True).items()}


def assert_untouched(before, after):
    assert before.keys() == after.keys()
    for name, (identity, value, grad) in before.items():
        assert (identity, grad) == (after[name][0], after[name][2])
        assert torch.equal(value, after[name][1])


@pytest.mark.parametrize("policy", ["recalibrate", "running", "batch"])
def test_observing_gives_back_weights_gradients_state_modes_and_random_numbers(policy):
    engine, model, optimizer = engine_for(Config(local_steps=9, min_blocks=2, test_scale=0.3, batch_norm=policy))
    engine.start()
    for step in range(2):
        train_step(model, optimizer, batch_of(0, step))
        engine.after_step()
    before = observed(model)
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    state = [optimizer.state[parameter]["momentum_buffer"].clone() for parameter in model.parameters()]
    modes, random = [child.training for child in model.modules()], torch.get_rng_state()

    for kind in ("evaluation", "checkpoint"):
        with engine.full_model(kind) as full:
            assert full is model
            assert engine.observing
            assert not torch.equal(model.section3[1].conv2.weight, before["section3.1.conv2.weight"][1])
            model.eval()(batch_of(0, 5)[0])
            torch.rand(3)
            model.train()

    assert not engine.observing
    assert_untouched(before, observed(model))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(
        torch.equal(optimizer.state[p]["momentum_buffer"], s) for p, s in zip(model.parameters(), state, strict=True)
    )
    assert [child.training for child in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert (engine.clock.round, engine.clock.step) == (0, 2)


def test_observation_ends_also_when_the_evaluation_fails():
    engine, model, _ = engine_for(Config(local_steps=9, test_scale=0.3))
    engine.start()
    before = observed(model)
    with pytest.raises(KeyError), engine.full_model():
        raise KeyError("in the user's evaluation")
    assert not engine.observing
    assert_untouched(before, observed(model))


def test_the_full_model_is_the_training_model_with_scaled_branches():
    net = chain(0.8, (0.25, -0.5))
    engine = Engine(net, [], Config(blocks="body.*", test_scale=0.5, min_blocks=0))
    engine.start()
    x = torch.ones(1, 1, dtype=torch.float64)
    assert net(x).item() == pytest.approx(0.8 * 1.25 * 0.5)
    with engine.full_model():
        assert net(x).item() == pytest.approx(0.8 * 1.125 * 0.75)
    assert net(x).item() == pytest.approx(0.8 * 1.25 * 0.5)
    engine.finish()
    assert net(x).item() == pytest.approx(0.8 * 1.125 * 0.75)


def test_a_block_of_unknown_kind_stays_scaled_by_a_hook_and_the_checkpoint_says_so():
    net = mlp(Undeclared)
    engine = Engine(net, [], Config(blocks="body.*", test_scale=0.5, min_blocks=0))
    engine.start()
    x = torch.randn(2, 3)
    inside = net.stem(x)
    for block in net.body:
        inside = inside + 0.5 * (block(inside) - inside)
    expected = net.head(inside).detach()
    plain = net(x).detach()
    with engine.full_model():
        torch.testing.assert_close(net(x), expected)
        assert engine.checkpoint_state()["hooked"] == [f"body.{index}" for index in range(4)]
    torch.testing.assert_close(net(x), plain)
    engine.finish()
    torch.testing.assert_close(net(x), expected)


def test_batch_statistics_of_the_evaluated_batch():
    engine, model, optimizer = engine_for(Config(local_steps=9, batch_norm="batch"))
    engine.start()
    train_step(model, optimizer, batch_of(0, 0))
    engine.after_step()
    x = batch_of(0, 1)[0]
    twin = small_preact(track_running_stats=False)
    twin.load_state_dict(model.state_dict(), strict=False)
    running = model.eval()(x)
    with engine.full_model():
        torch.testing.assert_close(model.eval()(x), twin.eval()(x))
    torch.testing.assert_close(model.eval()(x), running)


def test_a_warm_up_scales_the_training_and_observing_scales_once():
    net = chain(0.8, (0.25, -0.5))
    engine = Engine(net, [], Config(blocks="body.*", test_scale=0.5, min_blocks=0, warmup_rounds=1, local_steps=1))
    engine.start()
    x = torch.ones(1, 1, dtype=torch.float64)
    scaled, plain = 0.8 * 1.125 * 0.75, 0.8 * 1.25 * 0.5
    assert net(x).item() == pytest.approx(scaled)
    with engine.full_model():
        assert net(x).item() == pytest.approx(scaled)
    assert net(x).item() == pytest.approx(scaled)
    engine.after_step()
    assert net(x).item() == pytest.approx(plain)


NEURONS = ist.Run(NeuronConfig(), 0, "conv")  # batch norm after the first convolution
METHODS: dict[str, Any] = {
    "resist": Config(local_steps=2, min_blocks=1),
    "local_sgd": Config(local_steps=2, blocks=[], batch_norm="running"),
    "ist": NeuronConfig(local_steps=2, momentum="travel"),
}


@torch.inference_mode()
def evaluate(engine: Engine, x: Tensor) -> Tensor:
    """Evaluate in inference mode by a decorator, as is common."""
    with engine.full_model() as full:
        logits: Tensor = full.eval()(x)
        full.train()
    return logits


def evaluated(collective: Any, name: str, mode: str) -> tuple[dict[str, Tensor], list[Tensor]]:
    with ist.ONE_AT_A_TIME:
        torch.manual_seed(0)
        net: nn.Module = ist.make_net(NEURONS) if name == "ist" else small_preact()
        optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
        engine = Engine(net, [optimizer], METHODS[name], collective=collective)
    engine.start()
    seen = []
    for step in range(5):
        generator = torch.Generator().manual_seed(100 * collective.worker + step)
        x, y = torch.randn(8, 3, 8, 8, generator=generator), torch.randint(0, 4, (8,), generator=generator)
        train_step(net, optimizer, (x, y))
        engine.count_step()
        if mode != "no evaluation":
            look = evaluate if mode == "inference mode" else torch.no_grad()(evaluate.__wrapped__)
            seen.append(look(engine, torch.ones(2, 3, 8, 8)))
        for parameter in net.parameters():  # as in fine-tuning
            parameter.requires_grad_(False).requires_grad_(True)
        engine.sync_if_due()
    with torch.inference_mode():
        engine.finish()
    net(torch.ones(2, 3, 8, 8)).sum().backward()
    return clone_state(net), [logits.clone() for logits in seen]


@pytest.mark.parametrize("name", METHODS)
def test_inference_mode_changes_neither_the_training_nor_what_is_seen(name: str) -> None:
    plain, usual, inference = (
        run_threads(evaluated, 2, name, mode)[0] for mode in ("no evaluation", "no gradients", "inference mode")
    )
    for (expected, _), (state, seen), (state_too, seen_too) in zip(plain, usual, inference, strict=True):
        assert_equal_states(state, expected, exactly=True)
        assert_equal_states(state_too, expected, exactly=True)
        assert all(map(torch.equal, seen, seen_too))
