"""A second ``fit`` begins from the module's tensors, and no trace of the first stays on it (contract 16)."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional

from resist_lightning.methods.resist.scaling import ScaleHook
from tests.helpers.nets import Undeclared, mlp
from tests.helpers.plain import Classifier, make_net, stream
from tests.helpers.trainers import kind_for, make_strategy, make_trainer
from tests.helpers.training import assert_equal_states, clone_state

FACES: dict[str, dict[str, Any]] = {
    "resist": {"test_scale": 0.3},
    "resist, batch statistics": {"face": "resist", "test_scale": 0.3, "batch_norm": "batch"},
    "ist": {"face": "ist"},
    "ist, batch statistics": {"face": "ist", "batch_norm": "batch"},
    "local_sgd": {"face": "local_sgd"},
}


@pytest.fixture(autouse=True)
def threads_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the number of threads, since otherwise Lightning sets it, and leaves it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


class Noting(Classifier):
    """Remembers the weights at its first step."""

    first: dict[str, Tensor] | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.first is None:
            self.first = clone_state(self.net)
        return super().training_step(batch, batch_idx)


def fitted(options: dict[str, Any]) -> tuple[Any, Noting]:
    trainer, module = make_trainer(make_strategy(**options), max_epochs=1), Noting(kind=kind_for(**options))
    trainer.fit(module, stream(0, 4))
    module.first = None
    return trainer, module


def fit_again(trainer: Any, module: Noting) -> dict[str, Tensor]:
    trainer.fit_loop.max_epochs = 2
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*were changed after")
        trainer.fit(module, stream(0, 4, start=4))
    assert module.first is not None
    return module.first


def load(module: Noting, other: dict[str, Tensor]) -> None:
    module.net.load_state_dict(other)


def assign(module: Noting, other: dict[str, Tensor]) -> None:
    module.net.load_state_dict({name: tensor.clone() for name, tensor in other.items()}, assign=True)


def write(module: Noting, other: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in module.net.state_dict().items():
            tensor.copy_(other[name])


@pytest.mark.parametrize(("name", "change"), [("resist", assign), ("resist", write), *((name, load) for name in FACES)])
def test_other_weights_are_what_the_next_fit_begins_with(name: str, change: Callable[..., None]) -> None:
    options = FACES[name]
    trainer, module = fitted(options)
    other = clone_state(make_net(kind_for(**options), seed=99))
    change(module, other)
    assert_equal_states(fit_again(trainer, module), other, exactly=True)


@pytest.mark.parametrize("name", ["resist", "ist"])
def test_what_is_not_written_goes_on_as_in_training_and_what_is_written_stays(name: str) -> None:
    options = {**FACES[name], "batch_norm": "recalibrate"}
    trainer, module = fitted(options)
    twin_trainer, twin = fitted(options)
    norms = [child for child in module.net.modules() if isinstance(child, nn.BatchNorm2d | nn.BatchNorm1d)]
    norms[0].reset_running_stats()
    expected = fit_again(twin_trainer, twin)
    found = fit_again(trainer, module)
    written = {key for key in expected if not torch.equal(expected[key], found[key])}
    assert len(written) == 3, "of one layer: mean, variance, and the number of batches"
    assert torch.equal(found[sorted(written)[1]], torch.zeros_like(found[sorted(written)[1]]))


def test_unwritten_weights_are_unscaled_exactly() -> None:
    """By the same Trainer; the next step equals that of an uninterrupted training."""
    trainer, module = fitted(FACES["resist"])
    folded = module.net.state_dict()["section3.1.conv2.weight"].clone()
    torch.testing.assert_close(0.3 * fit_again(trainer, module)["section3.1.conv2.weight"], folded)


def test_a_mixture_of_old_and_new_tensors_is_told() -> None:
    trainer, module = fitted(FACES["resist"])
    with torch.no_grad():
        module.net.get_parameter("section3.1.conv2.weight").zero_()
    trainer.fit_loop.max_epochs = 2
    with pytest.warns(UserWarning, match=r"1 tensors .* changed after .*section3\.1\.conv2\.weight"):
        trainer.fit(module, stream(0, 4, start=4))


def test_after_a_test_of_a_checkpoint_a_fit_goes_on_from_its_full_model(tmp_path: Path) -> None:
    """Not from the middle of that training, as Lightning's loops are elsewhere."""
    saving = ModelCheckpoint(tmp_path, "middle", every_n_train_steps=2)
    options = {"max_epochs": 1, "enable_checkpointing": True, "callbacks": [saving]}
    trainer, module = make_trainer(make_strategy(), **options), Noting()
    trainer.fit(module, stream(0, 3))
    trainer.test(module, stream(0, 2), ckpt_path=tmp_path / "middle.ckpt", verbose=False)
    state = trainer.strategy.resumer.state_of(module)
    assert state["step"] == 2
    assert "files" not in state
    assert torch.load(tmp_path / "middle.ckpt", weights_only=True)["resist_lightning"]["files"]


def test_a_fit_after_an_error_goes_on_from_the_module_and_not_from_the_checkpoint_before(tmp_path: Path) -> None:
    """It went back to the weights of the checkpoint that the fit with the error had resumed from, in silence."""
    saving = ModelCheckpoint(tmp_path, "middle", every_n_train_steps=2)
    first = make_trainer(make_strategy("local_sgd"), max_epochs=1, enable_checkpointing=True, callbacks=[saving])
    first.fit(Classifier(), stream(0, 3))

    class Breaks(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 4:
                raise RuntimeError("of the user's")

    trainer, module = make_trainer(make_strategy("local_sgd"), max_epochs=1, callbacks=[Breaks()]), Noting()
    with pytest.raises(RuntimeError, match="of the user's"):
        trainer.fit(module, stream(0, 6), ckpt_path=tmp_path / "middle.ckpt")
    left, module.first = clone_state(module.net), None
    assert_equal_states(fit_again(trainer, module), left, exactly=True)


class Hooked(Classifier):
    """Blocks whose scale does not fold into a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(Undeclared)
        self.hooks: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        hooks = [hook for block in self.net.body for hook in block._forward_hooks.values()]
        self.hooks.append(sum(isinstance(hook, ScaleHook) for hook in hooks))
        return functional.cross_entropy(self.net(batch[0].mean((2, 3))), batch[1])


def test_hooks_neither_stay_in_a_training_nor_add_up() -> None:
    options = {"blocks": "body.*", "min_blocks": 0, "test_scale": 0.5}
    module, x = Hooked(), torch.randn(5, 6)
    trainer = make_trainer(make_strategy(**options), max_epochs=1)
    trainer.fit(module, stream(0, 4))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, stream(0, 4))
    make_trainer(make_strategy(**options), max_epochs=1).fit(copy.deepcopy(module), stream(0, 4))
    make_trainer(make_strategy(**options), max_epochs=1).fit(module, stream(0, 4))

    assert set(module.hooks) == {0}
    block = module.net.body[0]
    for twin in (block, copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        torch.testing.assert_close(twin(x), x + 0.5 * torch.sin(block.inside(x)))
        assert [type(hook) for hook in twin._forward_hooks.values()] == [ScaleHook]
    make_trainer(make_strategy("local_sgd"), max_epochs=1).fit(module, stream(0, 4))
    assert not block._forward_hooks
