"""A worker whose weights, gradients and optimizer state exceed its memory limit gets an error before it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from resist_lightning.state import memory_limit
from resist_lightning.state.memory_limit import Limit, Needed, needed_to_train, shortage
from resist_lightning.state.optimizer_state import OptimizerStates
from resist_lightning.strategies.launching import checks
from tests.helpers.plain import Classifier, stream
from tests.helpers.trainers import make_strategy, make_trainer

LIMIT = Limit(300_000_000, "a test")


def test_it_says_how_much_is_missing_and_the_way_out() -> None:
    assert shortage(Needed(100_000_000, 100_000_000, 100_000_000), LIMIT, "Take more.") == ""
    assert shortage(Needed(100_000_000, 100_000_000, 250_000_000), LIMIT, "Take more.") == (
        "this worker cannot train: without activations it needs at least 450.0 MB (weights 100.0 MB, gradients 100.0 "
        "MB, optimizer state 250.0 MB), but its limit is 300.0 MB (a test), 150.0 MB too little. Take more."
    )


@pytest.mark.parametrize(("optimizer", "slots"), [(torch.optim.SGD, 0), (torch.optim.Adam, 2)])
def test_what_is_frozen_or_absent_needs_no_gradients_and_no_state(optimizer: Any, slots: int) -> None:
    module = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 4, bias=False), nn.Linear(4, 4, device="meta"))
    module[1].requires_grad_(False)
    states = OptimizerStates([optimizer(module.parameters(), lr=0.1)])
    found = needed_to_train(module, states, gradients=True)
    counter = 4 if slots else 0  # Adam's number of steps
    assert found == Needed(4 * (64 + 32), 4 * 64, slots * 4 * 64 + counter)
    assert needed_to_train(module, states, gradients=False).gradients == 0


@pytest.mark.parametrize(
    ("line", "files", "expected"),
    [
        ("5:memory:/a/b", {"memory/a/b/memory.limit_in_bytes": "9223372036854771712"}, []),
        ("5:memory:/a/b", {"memory/a/memory.limit_in_bytes": "70", "memory/a/b/memory.limit_in_bytes": "90"}, [90, 70]),
        ("5:memory:/of/the/host", {"memory/memory.limit_in_bytes": "50"}, [50]),
        ("5:cpu,cpuacct:/a", {"memory/a/memory.limit_in_bytes": "50"}, []),
        ("0::/a/b", {"a/b/memory.max": "max", "a/memory.max": "80"}, [80]),
        ("0::/", {"memory.max": "80"}, [80]),
        ("", {}, []),
    ],
)
def test_limits_of_control_groups(tmp_path: Path, line: str, files: dict[str, str], expected: list[int]) -> None:
    for name, text in files.items():
        file = tmp_path / "root" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    (tmp_path / "mine").write_text(f"{line}\n" if line else "")
    found = memory_limit._of_groups(tmp_path / "mine", tmp_path / "root")
    assert [limit.bytes for limit in found] == expected


def test_a_training_that_cannot_fit_is_refused_before_its_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counts(Classifier):
        steps = 0

        def training_step(self, *args: Any) -> Any:
            self.steps += 1
            return super().training_step(*args)

    def fit(limit: int) -> Counts:
        monkeypatch.setattr(checks, "memory_limit", lambda device: Limit(limit, "a test"))
        make_trainer(make_strategy("local_sgd"), max_steps=1).fit(module, stream(0, 1))
        return module

    module = Counts("preact", 7)
    weights = sum(parameter.nbytes for parameter in module.parameters())
    with pytest.raises(ValueError, match=r"worker 0: this worker cannot train.* 0\.0 MB too little.*`resist`"):
        fit(3 * weights - 1)
    assert module.steps == 0
    module = Counts("preact", 7)
    assert fit(3 * weights).steps == 1
