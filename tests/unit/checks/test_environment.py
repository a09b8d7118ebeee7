"""A worker's description of its environment: every relevant item changes its fingerprint, and nothing else does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import resist_lightning
from resist_lightning import Config
from resist_lightning.checks import environment as facts
from resist_lightning.checks.environment import fingerprint_of
from resist_lightning.checks.fingerprint import differences
from resist_lightning.methods.resist.layout import BlockLayout
from resist_lightning.state.optimizer_state import OptimizerStates
from tests.helpers.nets import MlpBlock, mlp, small_preact


def fingerprint(config=None, workers=2, change=lambda _: None, make=small_preact, lr=0.1, surroundings=(), **sgd):
    net = make()
    change(net)
    layout = BlockLayout(net, config or Config(min_blocks=1), workers)
    states = OptimizerStates([torch.optim.SGD(net.parameters(), lr, **sgd)])
    return fingerprint_of(layout, states, dict(surroundings))


def told(**other):
    return differences([fingerprint(), fingerprint(**other)])


def channels_last(net):
    net.to(memory_format=torch.channels_last)


def swap_order(net):
    """Put the same names in another order."""
    head = net.head
    del net.head
    net._modules = {"head": head, **net._modules}


def test_weights_do_not_matter():
    assert told(change=lambda net: nn.init.zeros_(net.head.weight)) == []


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"config": Config(min_blocks=3)}, "min_blocks: worker 0 1, worker 1 3"),
        ({"config": Config(min_blocks=1, seed=4)}, "seed: worker 0 0, worker 1 4"),
        ({"config": Config(min_blocks=1, check="off")}, "check: worker 0 sampled, worker 1 off"),
        ({"config": Config(min_blocks=1, blocks="section3.[123]")}, "blocks: only worker 0 has section3.4"),
        ({"workers": 3}, "workers: worker 0 2, worker 1 3"),
        ({"lr": 0.2}, "lr of optimizer 0, group 0: worker 0 0.1, worker 1 0.2"),
        ({"lr": torch.tensor(0.5)}, "lr of optimizer 0, group 0: worker 0 0.1, worker 1 0.5"),
        ({"momentum": 0.9}, "momentum of optimizer 0, group 0: worker 0 0, worker 1 0.9"),
        (
            {"change": lambda net: net.head.weight.requires_grad_(False)},
            "head.weight: worker 0 (4, 32) float32 requires_grad, worker 1 (4, 32) float32 frozen",
        ),
        (
            {"change": lambda net: net.head.double()},
            "head.weight: worker 0 (4, 32) float32 requires_grad, worker 1 (4, 32",
        ),
        ({"change": lambda net: net.register_buffer("m", torch.zeros(1))}, "tensors: only worker 1 has m"),
        ({"change": channels_last}, "strides"),
        ({"change": swap_order}, "order of tensors and blocks"),
        ({"surroundings": {"precision": "16"}}, "settings: only worker 1 has precision"),
    ],
)
def test_what_matters_is_told(other, said):
    assert said in "\n".join(told(**other))


def test_versions_are_told_without_the_tag_of_the_build(monkeypatch):
    before = fingerprint()
    monkeypatch.setattr(torch, "__version__", before["versions"]["torch"] + "+cu999")
    assert fingerprint() == before
    monkeypatch.setattr(torch, "__version__", "1.0.0")
    assert differences([before, fingerprint()]) == [f"torch: worker 0 {before['versions']['torch']}, worker 1 1.0.0"]


def test_code_of_the_package_and_of_the_users_classes_is_compared_but_not_torchs(tmp_path, monkeypatch):
    sources = fingerprint(make=lambda: mlp(MlpBlock), config=Config(min_blocks=1, blocks="body.*"))["source files"]
    assert set(sources) == {"resist_lightning", "tests.helpers.nets"}
    other = tmp_path / "nets.py"
    other.write_text("# other code\n")
    monkeypatch.setattr(sys.modules["tests.helpers.nets"], "__file__", str(other))
    changed = fingerprint(make=lambda: mlp(MlpBlock), config=Config(min_blocks=1, blocks="body.*"))["source files"]
    assert changed["tests.helpers.nets"] != sources["tests.helpers.nets"]
    assert changed["resist_lightning"] == sources["resist_lightning"]
    monkeypatch.setattr(sys.modules["tests.helpers.nets"], "__file__", str(tmp_path / "gone.py"))
    gone = fingerprint(make=lambda: mlp(MlpBlock), config=Config(min_blocks=1, blocks="body.*"))["source files"]
    assert set(gone) == {"resist_lightning"}


def test_the_hash_of_the_package_covers_all_its_rooms(tmp_path, monkeypatch):
    assert Path(facts.__file__).parents[1] == Path(resist_lightning.__file__).parent
    (tmp_path / "comm").mkdir()
    other_room = tmp_path / "comm" / "mean.py"
    other_room.write_text("a = 1\n")
    monkeypatch.setattr(facts, "__file__", str(tmp_path / "checks" / "environment.py"))
    facts._hash_of_package.cache_clear()
    first = facts._hash_of_package()
    other_room.write_text("a = 2\n")
    facts._hash_of_package.cache_clear()
    assert facts._hash_of_package() != first
    facts._hash_of_package.cache_clear()


def test_a_predicate_is_compared_by_what_it_chooses():
    def one(name, module):
        return name == "section3.1"

    def same(name, module):
        return name in ("section3.1",)

    chosen = [fingerprint(config=Config(min_blocks=1, blocks=predicate)) for predicate in (one, same)]
    assert differences(chosen) == []
