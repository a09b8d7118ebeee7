"""Checks the reference simulator against the method by hand, on scalars (spec 2.1)."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from resist_lightning import QSR, Config, PostLocal, Simulator
from resist_lightning.schedule.partition import draw_partition, everything
from tests.helpers import by_hand
from tests.helpers.nets import Normed
from tests.helpers.threads import run_threads
from tests.helpers.training import (
    Run,
    assert_equal_states,
    batch_of,
    clone_state,
    decay,
    make_model,
    make_optimizer,
    start_engine,
    train_simulator,
    train_step,
)

LINKS = (0.3, -0.2, 0.5, 0.1, -0.4)
RATE = 0.05


def simulate(config, workers, rounds, beta):
    simulator = Simulator(
        by_hand.chain(0.8, LINKS),
        lambda net: torch.optim.SGD(net.parameters(), RATE, momentum=beta),
        config,
        workers,
    )
    for step in range(rounds * config.local_steps - 1):  # the last step is taken below, without its sync
        one_step(simulator, step)
        simulator.after_step()
    one_step(simulator, rounds * config.local_steps - 1)
    return simulator


def one_step(simulator, step):
    for index, worker in enumerate(simulator.workers):
        worker.optimizers[0].zero_grad()
        x = torch.full((1, 1), by_hand.input_of(index, step), dtype=torch.float64)
        worker.module(x).sum().backward()
        worker.optimizers[0].step()


@pytest.mark.parametrize("momentum", ["reset", "keep", "travel"])
@pytest.mark.parametrize(("workers", "least"), [(1, 0), (2, 0), (3, 0), (3, 3), (4, 2), (6, 0)])
def test_the_simulator_trains_what_one_computes_by_hand(workers, least, momentum):
    config = Config(local_steps=3, min_blocks=least, blocks="body.*", momentum=momentum)
    rounds = [draw_partition(5, workers, least, 0, round).held for round in range(4)]
    simulator = simulate(config, workers, len(rounds), beta=0.7)
    stem, links = by_hand.train(0.8, LINKS, rounds, 3, lr=RATE, beta=0.7, momentum=momentum)

    full = simulator.full_model(scale=1.0)
    assert full.stem.weight.item() == pytest.approx(stem, abs=1e-12)
    assert [link.weight.weight.item() for link in full.body] == pytest.approx(links, abs=1e-12)
    assert links != pytest.approx(LINKS, abs=1e-3)


@pytest.mark.parametrize(("workers", "least"), [(1, 0), (2, 0), (3, 3), (4, 2)])
@pytest.mark.parametrize(("rate", "beta"), [(0.7, 0.9), (1.3, 0.0), (0.7, None)])
def test_the_outer_optimizer_steps_from_where_the_round_began(workers, least, rate, beta):
    outer = {"outer": "nesterov", "outer_rate": rate, "outer_momentum": beta}
    config = Config(local_steps=3, min_blocks=least, blocks="body.*", **outer)
    rounds = [draw_partition(5, workers, least, 0, round).held for round in range(5)]
    simulator = simulate(config, workers, len(rounds), beta=0.7)
    momentum = {1: 0.3, 2: 0.65, 3: 1 - 0.7 / 3, 4: 0.825}[workers] if beta is None else beta
    stem, links = by_hand.train(0.8, LINKS, rounds, 3, lr=RATE, beta=0.7, outer=by_hand.Outer(rate, momentum))

    full = simulator.full_model(scale=1.0)
    assert full.stem.weight.item() == pytest.approx(stem, abs=1e-12)
    assert [link.weight.weight.item() for link in full.body] == pytest.approx(links, abs=1e-12)
    without, _ = by_hand.train(0.8, LINKS, rounds, 3, lr=RATE, beta=0.7)
    assert stem != pytest.approx(without, abs=1e-3)


@pytest.mark.parametrize("outer", [None, by_hand.Outer(0.7, 0.9)], ids=["mean", "outer"])
@pytest.mark.parametrize(("workers", "least", "overlap"), [(1, 0, 2), (2, 0, 1), (2, 3, 3), (3, 3, 2), (4, 5, 1)])
def test_an_overlapped_sync_brings_what_was_sent_at_its_border_and_keeps_what_was_learned_since(
    workers, least, overlap, outer
):
    settings = (
        {} if outer is None else {"outer": "nesterov", "outer_rate": outer.rate, "outer_momentum": outer.momentum}
    )
    config = Config(local_steps=4, overlap=overlap, min_blocks=least, blocks="body.*", momentum="keep", **settings)
    rounds = [draw_partition(5, workers, least, 0, round).held for round in range(5)]
    simulator = simulate(config, workers, len(rounds), beta=0.7)
    blocks = sum(map(len, rounds[0])) / workers  # each as large as the stem, which is sent twice
    later = math.ceil(overlap * blocks / (blocks + 2))
    trained = {}
    for ahead, of_blocks in ((overlap, later), (0, 0)):
        again = None if outer is None else by_hand.Outer(outer.rate, outer.momentum)
        trained[ahead] = by_hand.train(
            0.8, LINKS, rounds, 4, lr=RATE, beta=0.7, momentum="keep", outer=again, overlap=ahead,
            overlap_of_blocks=of_blocks,
        )  # fmt: skip

    full = simulator.full_model(scale=1.0)
    stem, links = trained[overlap]
    assert full.stem.weight.item() == pytest.approx(stem, abs=1e-12)
    assert [link.weight.weight.item() for link in full.body] == pytest.approx(links, abs=1e-12)
    if workers > 1 or outer is not None:
        assert links != pytest.approx(trained[0][1], abs=1e-4)  # an overlap has an effect


def test_by_default_the_state_of_adam_stays_at_a_sync():
    plain = Run(Config(local_steps=2, min_blocks=3), steps=6, optimizer="adamw", net=Normed)
    states = {}
    for momentum in (None, "keep", "reset"):
        run = replace(plain, config=replace(plain.config, momentum=momentum))
        states[momentum] = train_simulator(run, 2).full_model().state_dict()
    assert_equal_states(states[None], states["keep"], exactly=True)
    assert not torch.equal(states[None]["head.weight"], states["reset"]["head.weight"])


@pytest.mark.parametrize("wire", ["fp32", "int8"])
def test_an_outer_step_of_rate_one_without_momentum_is_none(wire):
    plain = Run(Config(local_steps=2, min_blocks=3, wire=wire, warmup_rounds=1), steps=7, net=Normed)
    same = replace(plain.config, outer="nesterov", outer_rate=1.0, outer_momentum=0.0)
    states = [train_simulator(replace(plain, config=c), 3).full_model().state_dict() for c in (plain.config, same)]
    assert_equal_states(states[1], states[0], exactly=True)


@pytest.mark.parametrize(("decay", "rule"), [(1.0, QSR(2, 1.8 * RATE)), (0.9, QSR(3, 1e-9)), (0.9, PostLocal(3, 3, 5))])
def test_rules_that_give_equal_rounds_are_a_number_of_local_steps(decay, rule):
    plain = Run(Config(local_steps=3, min_blocks=3, warmup_rounds=1), steps=8, decay=decay, net=Normed)
    same = replace(plain.config, local_steps=rule)
    simulators = [train_simulator(replace(plain, config=config), 3) for config in (plain.config, same)]
    assert [simulator.clock.round for simulator in simulators] == [2, 2]
    states = [simulator.full_model().state_dict() for simulator in simulators]
    assert_equal_states(states[1], states[0], exactly=True)


@pytest.mark.parametrize(
    ("rule", "lengths"),
    [(QSR(2, 0.1), [4, 8, 39]), (QSR(2, 0.1, warmup_steps=5), [2, 2, 2, 12]), (PostLocal(1, 4, 2), [1, 1, 4])],
)
def test_rounds_are_as_long_as_the_rule_says_at_their_beginning(rule, lengths):
    """By hand: the rate of step t is 0.05 / 1.1^t, and a round reads it before its first step."""
    run = Run(Config(local_steps=rule, min_blocks=3), steps=0, decay=1 / 1.1, net=Normed)
    simulator = train_simulator(run, 2)
    found = [simulator.clock.local_steps]
    while len(found) < len(lengths):
        for worker in simulator.workers:
            decay(run, worker.optimizers[0])
        simulator.after_step()
        if simulator.clock.step == 0:
            found.append(simulator.clock.local_steps)
    assert found == lengths


def test_simulated_workers_must_agree_on_the_rate_that_rounds_follow():
    simulator = train_simulator(Run(Config(local_steps=QSR(1, 0.05), min_blocks=3), steps=0, net=Normed), 2)
    simulator.workers[1].optimizers[0].param_groups[0]["lr"] = 0.01
    with pytest.raises(ValueError, match=r"the workers' learning rates differ \(\[0\.05, 0\.01\]\)"):
        simulator.after_step()


def test_all_blocks_on_all_workers_is_local_sgd():
    config = Config(local_steps=2, min_blocks=5, blocks="body.*")
    simulator = simulate(config, 3, 3, beta=0.0)
    stem, links = by_hand.train(0.8, LINKS, [everything(5, 3).held] * 3, 2, lr=RATE)
    full = simulator.full_model()
    assert full.stem.weight.item() == pytest.approx(stem, abs=1e-12)
    assert [link.weight.weight.item() for link in full.body] == pytest.approx(links, abs=1e-12)


def test_the_full_model_is_scaled_and_the_training_is_not():
    config = Config(local_steps=2, min_blocks=2, blocks="body.*")
    simulator = simulate(config, 2, 2, beta=0.0)
    plain, scaled = simulator.full_model(scale=1.0), simulator.full_model()
    assert simulator.scale == pytest.approx(0.5)
    for link, whole in zip(scaled.body, plain.body, strict=True):
        assert link.weight.weight.item() == pytest.approx(0.5 * whole.weight.weight.item())
    assert scaled.stem.weight.item() == plain.stem.weight.item()


def test_a_warm_up_trains_scaled_branches_on_all_workers():
    config = Config(local_steps=1, min_blocks=2, blocks="body.*", warmup_rounds=1)
    simulator = simulate(config, 2, 1, beta=0.0)
    gradients = {name: p.grad.item() for name, p in simulator.workers[0].module.named_parameters()}
    product = 1.0
    for link in LINKS:
        product *= 1 + 0.5 * link
    x = by_hand.input_of(0, 0)
    assert gradients["stem.weight"] == pytest.approx(product * x)
    for index, link in enumerate(LINKS):
        expected = 0.8 * product / (1 + 0.5 * link) * 0.5 * x
        assert gradients[f"body.{index}.weight.weight"] == pytest.approx(expected)


def test_a_run_that_is_all_finish_is_one_that_is_all_warm_up():
    run = Run(Config(local_steps=2, min_blocks=1, momentum="travel"), steps=7, net=Normed)
    configs = [replace(run.config, warmup_rounds=4), replace(run.config, finish_rounds=4), run.config]
    warm, finish, plain = [train_simulator(replace(run, config=c), 2).full_model().state_dict() for c in configs]
    assert_equal_states(finish, warm, exactly=True)
    assert any(not torch.equal(plain[name], warm[name]) for name in warm)


def test_growth_to_one_share_is_that_many_blocks_and_growth_to_all_is_a_warm_up():
    run = Run(Config(local_steps=2, min_blocks=3, momentum="travel"), steps=7, net=Normed)
    pairs = (
        (run.config, replace(run.config, min_blocks=None, growth=[0.75, 0.75])),
        # Half of four blocks at first: the scale of the first stage, not of three blocks.
        (replace(run.config, min_blocks=2, finish_rounds=2), replace(run.config, min_blocks=None, growth=[0.5, 1])),
    )
    for plain, growing in pairs:
        states = [train_simulator(replace(run, config=c), 2).full_model().state_dict() for c in (plain, growing)]
        assert_equal_states(states[1], states[0], exactly=True)


def test_a_later_stage_trains_scaled_branches():
    """By hand: a worker has three of five links at first (shares of 0.5), and four later."""
    config = Config(local_steps=1, blocks="body.*", growth=[0.5, 0.8])
    simulator = Simulator(
        by_hand.chain(0.8, LINKS), lambda net: torch.optim.SGD(net.parameters(), 0.0), config, 2, total_steps=2
    )
    factors = []
    for round, scale in enumerate((1.0, 0.6 / 0.8)):
        one_step(simulator, round)
        for index, worker in enumerate(simulator.workers):
            held = simulator.schedule.partition(round).held[index]
            factors.append(len(held))
            product = 1.0
            for link in held:
                product *= 1 + scale * LINKS[link]
            gradient = worker.module.stem.weight.grad.item()
            assert gradient == pytest.approx(product * by_hand.input_of(index, round))
        simulator.after_step()
    assert factors == [3, 3, 4, 4]
    assert simulator.scale == 0.6


def test_the_last_rounds_need_the_number_of_steps():
    with pytest.raises(ValueError, match=r"finish_rounds=1 needs the number of local steps .*total_steps of"):
        Simulator(
            by_hand.chain(0.8, LINKS),
            lambda net: torch.optim.SGD(net.parameters(), RATE),
            Config(finish_rounds=1, blocks="body.*"),
            2,
        )


def test_one_simulated_worker_is_plain_training_with_momentum_restarts():
    run = Run(Config(local_steps=3), steps=7, net=Normed)
    simulator = Simulator(make_model(run), lambda net: make_optimizer(run, net), run.config, 1)
    model = make_model(run)
    for step in range(run.steps):
        if step % 3 == 0:
            optimizer = make_optimizer(run, model)
        train_step(model, optimizer, batch_of(0, step))
        train_step(simulator.workers[0].module, simulator.workers[0].optimizers[0], batch_of(0, step))
        simulator.after_step()
    assert_equal_states(simulator.full_model().state_dict(), model.state_dict(), exactly=True)


def test_the_user_s_network_is_copied_and_not_changed():
    run = Run(Config(local_steps=1, min_blocks=1), steps=2, net=Normed)
    model = make_model(run)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    simulator = Simulator(model, lambda net: make_optimizer(run, net), run.config, 2)
    for worker in simulator.workers:
        train_step(worker.module, worker.optimizers[0], batch_of(0, 0))
    simulator.after_step()
    assert_equal_states(model.state_dict(), before, exactly=True)


def test_simulated_workers_have_no_speed():
    with pytest.raises(ValueError, match="blocks_per_worker='auto': simulated workers have no speed"):
        train_simulator(Run(Config(blocks_per_worker="auto"), steps=0, net=Normed), 2)
    with pytest.raises(ValueError, match="overlap='auto': simulated syncs take no time"):
        train_simulator(Run(Config(overlap="auto"), steps=0, net=Normed), 2)


def thaw(step, model):
    """Unfreeze everything before the third round of two steps."""
    if step == 4:
        model.requires_grad_(True)


def trained_and_thawed(collective, run):
    engine, optimizer = start_engine(collective, run)
    for step in range(run.steps):
        thaw(step, engine.module)
        train_step(engine.module, optimizer, batch_of(collective.worker, step))
        engine.after_step()
    engine.finish()
    return clone_state(engine.module)


@pytest.mark.parametrize("wire", ["int8", "int2"])
def test_what_is_unfrozen_between_rounds_is_sent_as_workers_send_it(wire):
    """It is sent exactly in its first round, as workers did not know of it when that began."""
    run = Run(
        Config(local_steps=2, min_blocks=3, batch_norm="running", wire=wire), 9, frozen=("stem", "body"), net=Normed
    )
    states, _ = run_threads(trained_and_thawed, 2, run)

    simulator = train_simulator(replace(run, steps=0), 2)
    for step in range(run.steps):
        for number, worker in enumerate(simulator.workers):
            thaw(step, worker.module)
            train_step(worker.module, worker.optimizers[0], batch_of(number, step))
        simulator.after_step()

    for state in states:
        assert_equal_states(state, simulator.full_model().state_dict())
