"""The study of transformers: every case runs, costs are the closed forms, and the language model is as described."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.harness import cli
from experiments.harness.record import read_record
from experiments.transformers import run
from experiments.transformers.cases import BLOCKS, STUDIES, Case
from experiments.transformers.networks import LanguageModel
from experiments.transformers.run import NAMES, Options
from experiments.transformers.text import EVERY, PARTS, baselines, standard_library, stretches, windows
from experiments.transformers.training import RECIPE, bits, costs, make_network
from resist_lightning.methods.resist.network import select_blocks

SMOKE = ["size=smoke", "samples=32", "image_samples=32", "rate_samples=32", "check_samples=64"]
TRAINED = [name for name in NAMES if name != "check"]


def settings(*more: str) -> Options:
    return cli.read([*SMOKE, "out=unused", *more], Options, NAMES)[1]


def main(*arguments: str) -> int:
    return cli.run(run.run, Options, "", NAMES, [*SMOKE, *arguments])


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_every_study_has_every_case_once_and_a_second_call_computes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("timm")
    assert main(*NAMES, f"out={tmp_path}") == 0
    for name in TRAINED:
        rows = read_record(tmp_path / f"{name}.jsonl")["rows"]
        assert [row["case"] for row in rows] == [case.key for case in STUDIES[name](settings())]
        assert len({row["samples"] for row in rows}) == 1
        largest = 100 if name == "images" else 9
        assert all(0 <= row["test"] <= largest for row in rows)
    for row in read_record(tmp_path / "check.jsonl")["rows"]:
        assert row["local_steps"] == 8
        assert row["largest_difference"] < 1e-5 < 0.01 < row["largest_change_by_training"]

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    before = {path: path.read_text() for path in tmp_path.glob("*.jsonl")}
    monkeypatch.setattr(run, "measure", refuse)
    monkeypatch.setattr(run.check, "compare", refuse)
    assert main(*NAMES, f"out={tmp_path}") == 0
    assert {path: path.read_text() for path in tmp_path.glob("*.jsonl")} == before


def test_the_language_model_sees_no_later_byte_and_its_head_is_the_embedding() -> None:
    torch.manual_seed(0)
    model = LanguageModel(256, 8, 16, 3, 2)
    tokens = torch.randint(256, (2, 8))
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 256
    ours, theirs = model(tokens), model(changed)

    assert ours.shape == (2, 8, 256)
    torch.testing.assert_close(ours[:, :5], theirs[:, :5])
    for place in (5, 6, 7):
        assert (ours[:, place] - theirs[:, place]).abs().max() > 1e-3
    assert model.head.weight is model.token.weight


@pytest.mark.parametrize("images", [False, True])
def test_all_blocks_but_the_first_are_partitioned_as_by_default(images: bool) -> None:
    if images:
        pytest.importorskip("timm")
    network = make_network(Case("single", 1, 0, 0.1, images=images), settings("depth=5", "width=64"))

    for blocks in (BLOCKS, None):
        assert [block.name for block in select_blocks(network, blocks)] == [
            f"blocks.{number}" for number in range(1, 5)
        ]


def test_hold_out_and_test_are_stretches_of_their_own() -> None:
    text = torch.frombuffer(bytearray(standard_library()), dtype=torch.uint8).split(16_384)
    found = windows("test", 64)

    assert torch.equal(stretches()["test"][0], text[PARTS["test"]])
    assert torch.equal(found.codes[0], text[PARTS["test"]][:64])
    assert torch.equal(found.labels[0], text[PARTS["test"]][1:65])
    assert sum(map(len, stretches().values())) == len(text) > 2 * EVERY


def test_bits_per_byte_and_the_baselines() -> None:
    uniform = torch.nn.Linear(1, 256)
    torch.nn.init.zeros_(uniform.weight)
    torch.nn.init.zeros_(uniform.bias)
    batches = [(torch.ones(2, 3, 1), torch.randint(256, (2, 3))), (torch.ones(1, 3, 1), torch.randint(256, (1, 3)))]
    counted = torch.bincount(torch.cat(stretches()["train"]).long(), minlength=256).double()
    test = torch.cat(stretches()["test"]).long()
    # Where every byte is frequent, the smoothing of a unigram has no effect.
    plain = -(counted / counted.sum()).clamp(min=1e-9).log2()[test].mean()

    assert bits(uniform, batches) == pytest.approx(8)
    assert baselines()["unigram"] == pytest.approx(float(plain), abs=0.001)
    assert baselines()["unigram"] > baselines()["bigram"] > baselines()["trigram"] > 2


def test_the_costs_are_closed_forms() -> None:
    options = settings()
    model = make_network(Case("single", 1, 0, 0.1), options)
    whole = sum(parameter.numel() for parameter in model.parameters())
    block = sum(parameter.numel() for parameter in model.blocks[0].parameters())

    def cost(method: str, momentum: str = "") -> dict[str, Any]:
        return costs(Case(method, 2, 0, 0.1, momentum), options, steps=6)  # two rounds of three

    assert cost("ddp")["sent_bytes"] == 6 * 4 * whole
    assert cost("local_sgd", "keep")["sent_bytes"] == 2 * 4 * whole
    assert cost("diloco", "keep") == cost("local_sgd", "reset")
    # Each worker has one of two blocks.
    assert cost("resist", "keep")["held"] == whole - block
    assert cost("resist", "reset")["sent_bytes"] < cost("resist_outer", "keep")["sent_bytes"]
    moved = cost("resist", "keep")["sent_bytes"] - 2 * 4 * (whole - 2 * block)
    # Adam has two numbers for each parameter of a block, and a counter of steps for each tensor.
    state = cost("resist", "travel")["sent_bytes"] - cost("resist", "keep")["sent_bytes"]
    assert moved > 0
    assert 2 * moved < state < 2.1 * moved


def test_the_recipe_takes_images_and_sequences() -> None:
    scores, labels = torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.long)

    assert RECIPE.loss(scores, labels).item() == pytest.approx(math.log(4))
    assert RECIPE.loss(scores[:, 0], labels[:, 0]).item() == pytest.approx(math.log(4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["images", "data=folder"], "folder is missing"),
        (["language", "width=15"], "width=15: must be a multiple of heads=2"),
        (["language", "samples=31"], "samples=31: must be at least batch x 8 = 32"),
        (["language", "local_steps=5"], "samples=32: 2 workers never sync in so few"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(*arguments, f"out={tmp_path / 'new'}")

    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()
