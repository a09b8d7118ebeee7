"""Contract 17: every launcher, method and file path once with a network of 25 million parameters or more.

Small networks hide what depends on size: up to version 0.1, worker 0's results went through a pipe that holds 64 KB,
which the main process read when the workers had ended; ResNet-34 and larger never came back from ``spawn`` and
``fork``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.ordinary import BATCH, Module, images
from tests.helpers.programs import ROOT, run_program
from tests.helpers.training import assert_equal_states

PROGRAM = ["-m", "tests.helpers.ordinary"]
TORCHRUN = [
    *("-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"),
    *PROGRAM,
]
PATIENCE_SECONDS = 280

# Every launcher, every method and every network; not all of their combinations.
CASES = [
    ("resist", "resnet50", "spawn", PROGRAM),
    ("resist", "vit", "fork", PROGRAM),
    ("ist", "mlp", "popen", PROGRAM),
    ("local_sgd", "mlp", "popen", TORCHRUN),
    ("auxnet", "resnet50", "fork", PROGRAM),
]


def mean_loss(module: Module) -> float:
    """Of the plain module, in this process."""
    module.eval()
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(module(x), y) for x, y in images(2 * BATCH)]
    return float(sum(losses) / len(losses))


def outputs(module: Module) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([module(x) for x, _ in images(2 * BATCH)])


@pytest.mark.timeout(PATIENCE_SECONDS + 30)
@pytest.mark.parametrize(("method", "network", "start_method", "program"), CASES)
def test_an_ordinary_network_goes_through_all_that_a_trainer_does(
    method: str, network: str, start_method: str, program: list[str], tmp_path: Path
) -> None:
    run_program(
        [*program, method, network, start_method, str(tmp_path)], ROOT, timeout=PATIENCE_SECONDS, TMPDIR=str(tmp_path)
    )

    found: dict[str, Any] = torch.load(tmp_path / "found.pt", weights_only=True)
    assert found["parameters"] >= 25_000_000
    assert not list(tmp_path.glob("resist_lightning_*"))  # what workers bring home is removed
    assert_equal_states(found["state"], found["resumed"])
    checkpoint = torch.load(tmp_path / "whole" / "step=2.ckpt", weights_only=True)
    plain = Module(network)
    plain.load_state_dict(checkpoint["state_dict"])
    if (method, network) != ("resist", "vit"):  # whose scale stays in hooks (docs/assumptions.md)
        assert found["tested"] == pytest.approx(mean_loss(plain), rel=1e-4)
    assert found["validated"] == pytest.approx(found["tested"], rel=1e-4)
    if found["predicted"] is not None:  # Lightning brings none home from spawned and forked processes
        # Of two workers, worker 0 has every second sample.
        torch.testing.assert_close(found["predicted"], outputs(plain)[::2], rtol=1e-3, atol=1e-4)
