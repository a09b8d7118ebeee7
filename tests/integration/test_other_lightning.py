"""``pytorch_lightning`` has classes and a registry of its own; mixing the two packages gives a clear error."""

from __future__ import annotations

import importlib.util
from typing import Any

import lightning
import pytest

from resist_lightning import register_strategies
from tests.helpers.plain import Classifier, stream
from tests.helpers.processes import run_workers
from tests.helpers.trainers import QUIET

NAMES = ("resist", "resist_spawn", "resist_fork", "resist_notebook", "local_sgd", "local_sgd_spawn", "ist", "ist_fork")

if importlib.util.find_spec("pytorch_lightning") is None:
    pytest.skip("pytorch_lightning is not installed", allow_module_level=True)


def mix(_: int) -> dict[str, str]:
    """Mix both packages, in a process of its own, as they stay imported."""
    import pytorch_lightning

    register_strategies()  # as `import resist_lightning` does after `import pytorch_lightning`
    messages = {}
    for name in NAMES:
        with pytest.raises(ValueError, match="pytorch_lightning") as caught:
            pytorch_lightning.Trainer(**QUIET, strategy=name, devices=2)
        messages[name] = str(caught.value)

    class Foreign(pytorch_lightning.LightningModule):
        pass

    with pytest.raises(TypeError) as of_module:
        lightning.Trainer(**QUIET, strategy="resist", devices=2).fit(Foreign(), stream(0, 1))  # type: ignore[arg-type]
    messages["module"] = str(of_module.value)
    assert lightning.Trainer(**QUIET, strategy="resist", devices=2).world_size == 2
    assert isinstance(Classifier(), lightning.LightningModule)
    return messages


def test_the_other_lightning_gets_a_clear_error() -> None:
    (messages,) = run_workers(mix, 1)

    module: Any = messages.pop("module")
    assert "must be a `LightningModule`" in module
    assert set(messages) == set(NAMES)
    for message in messages.values():
        assert "Use lightning.Trainer, and lightning.LightningModule for your module" in message
