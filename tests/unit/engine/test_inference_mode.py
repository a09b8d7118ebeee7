"""An evaluation under ``torch.inference_mode()``, as a decorator often says, leaves a training as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resist_lightning import Config, Engine, NeuronConfig
from tests.helpers.ist import ONE_AT_A_TIME, Run, make_net
from tests.helpers.nets import small_preact
from tests.helpers.threads import run_threads
from tests.helpers.training import assert_equal_states, clone_state, train_step

RUN = Run(NeuronConfig(), 0, "conv")  # batch norm behind the first convolution
METHODS: dict[str, Any] = {
    "resist": Config(local_steps=2, min_blocks=1),
    "local_sgd": Config(local_steps=2, blocks=[], batch_norm="running"),
    "ist": NeuronConfig(local_steps=2, momentum="travel"),
}


@torch.inference_mode()
def evaluate(engine: Engine, x: Tensor) -> Tensor:
    with engine.full_model() as full:
        logits: Tensor = full.eval()(x)
        full.train()
    return logits


def trained(collective: Any, name: str, mode: str) -> tuple[dict[str, Tensor], list[Tensor]]:
    with ONE_AT_A_TIME:
        torch.manual_seed(0)
        net: nn.Module = make_net(RUN) if name == "ist" else small_preact()
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
        for parameter in net.parameters():  # as a fine-tuning does
            parameter.requires_grad_(False).requires_grad_(True)
        engine.sync_if_due()
    with torch.inference_mode():
        engine.finish()
    net(torch.ones(2, 3, 8, 8)).sum().backward()
    return clone_state(net), [logits.clone() for logits in seen]


@pytest.mark.parametrize("name", METHODS)
def test_it_changes_neither_the_training_nor_what_is_seen(name: str) -> None:
    plain, usual, inference = (
        run_threads(trained, 2, name, mode)[0] for mode in ("no evaluation", "no gradients", "inference mode")
    )
    for (expected, _), (state, seen), (state_too, seen_too) in zip(plain, usual, inference, strict=True):
        assert_equal_states(state, expected, exactly=True)
        assert_equal_states(state_too, expected, exactly=True)
        assert all(map(torch.equal, seen, seen_too))
