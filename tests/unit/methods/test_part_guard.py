"""A worker's part of a network can be trained, but not used as the whole network (contract 5)."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from resist_lightning import Config, Engine, NeuronConfig
from resist_lightning.errors import PartialModelError
from tests.helpers.ist import ONE_AT_A_TIME, Run, make_net
from tests.helpers.nets import MlpBlock, mlp
from tests.helpers.plain import Classifier, batch_of, held_out, stream
from tests.helpers.threads import run_threads
from tests.helpers.trainers import make_strategy, make_trainer, run_trainers

METHODS: dict[str, Any] = {
    "resist": (lambda: mlp(MlpBlock), Config(local_steps=1, blocks="body.*", min_blocks=1), torch.randn(8, 3)),
    "ist": (lambda: make_net(Run(NeuronConfig(), 0)), NeuronConfig(local_steps=1), torch.randn(8, 6)),
}


def evaluate(net: nn.Module, x: torch.Tensor) -> None:
    net.eval()
    with torch.no_grad():
        net(x)


def evaluate_in_inference_mode(net: nn.Module, x: torch.Tensor) -> None:
    net.eval()
    with torch.inference_mode():
        net(x)


REFUSED: dict[str, Any] = {
    "evaluate": evaluate,
    "evaluate in inference mode": evaluate_in_inference_mode,
    "trace": lambda net, x: torch.jit.trace(net, x, check_trace=False),
    "export": lambda net, x: torch.export.export(net, (x,)),
    "deepcopy": lambda net, x: copy.deepcopy(net),
    "pickle": lambda net, x: pickle.dumps(net),
}


def started(collective: Any, name: str) -> tuple[Any, nn.Module, torch.Tensor]:
    make, config, x = METHODS[name]
    with ONE_AT_A_TIME:
        net = make()
        engine = Engine(net, [torch.optim.SGD(net.parameters(), 0.1)], config, collective=collective)
    engine.start()
    return engine, net, x


def tried(collective: Any, name: str) -> tuple[dict[str, str], list[str]]:
    """The errors of all ways to use a part as the whole, and the warnings of allowed ones."""
    engine, net, x = started(collective, name)
    found = {}
    for what, act in REFUSED.items():
        with ONE_AT_A_TIME:
            with pytest.raises(PartialModelError) as refused:
                act(net.train(), x)
            found[what] = str(refused.value)
    with ONE_AT_A_TIME, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        net.train()(x).sum().backward()
        with torch.no_grad():
            net(x)  # a metric of the training
        said = [str(warning.message) for warning in caught]
        net.eval()(x)  # with gradients: in a plain loop it may be a network whose norms are frozen
        said.append(str(caught[-1].message))
    with engine.full_model(), ONE_AT_A_TIME:
        evaluate(net, x)
        for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            torch.testing.assert_close(twin(x), net(x))
    engine.finish()
    evaluate(net, x)
    return found, said


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", METHODS)
def test_a_part_is_neither_evaluated_nor_traced_nor_copied_in_silence(name: str) -> None:
    for worker, (found, said) in enumerate(run_threads(tried, 2, name)[0]):
        for what, text in found.items():
            assert f"worker {worker}" in text, (what, text)
            assert "engine.full_model()" in text, (what, text)
        assert len(said) == 1, "training and its metrics are nobody's business"
        assert "evaluates the part of the network that it has in this round" in said[0]


# Under Lightning training steps are known.


class Looking(Classifier):
    """Calls its network in hooks and in training steps, where a part may be of use."""

    def __init__(self, face: str) -> None:
        super().__init__(kind="chain" if face == "ist" else "small")
        self.said: list[str] = []
        self.full: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.eval()
        with torch.no_grad():
            self(batch[0])  # pseudo-labels
        self.net(batch[0])
        self.train()
        with torch.no_grad():
            self(batch[0])
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        images = batch_of(0, 0)[0]
        for act in (lambda: self.eval()(images), lambda: copy.deepcopy(self.net), lambda: pickle.dumps(self.net)):
            with pytest.raises(PartialModelError) as refused:
                act()
            self.said.append(str(refused.value))
            self.train()
        strategy: Any = self.trainer.strategy
        with strategy.engine.full_model():
            self.full.append(float(self.eval()(images).detach().sum()))
        self.train()
        self(images)  # in training mode and with gradients, as hooks are called

    def on_validation_end(self) -> None:
        self.full.append(float(copy.deepcopy(self.net)(batch_of(0, 0)[0]).detach().sum()))


def look(worker: int, face: str) -> tuple[list[str], list[float], list[str]]:
    module = Looking(face)
    trainer = make_trainer(make_strategy(face), max_epochs=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, stream(worker, 4), held_out(worker))
    return module.said, module.full, [str(w.message) for w in caught if "the part of the network" in str(w.message)]


@pytest.mark.parametrize("face", ["resist", "ist"])
def test_hooks_outside_the_training_step_are_told_where_the_full_model_is(face: str) -> None:
    for worker, (said, full, warned) in enumerate(run_trainers(look, 2, face)):
        assert len(said) == 3
        assert all("trainer.strategy.engine" in text and f"worker {worker}" in text for text in said)
        assert full == pytest.approx([full[0]] * 2)
        assert len(warned) == 2
        assert "evaluates the part of the network" in warned[0]
        assert "calls, outside a training step, the part of the network" in warned[1]
