"""The generated task: determined by its seed everywhere, learned by a network and not by a linear classifier."""

from __future__ import annotations

import lightning as L
import pytest
import torch

from experiments.app.classifier import LitClassifier
from experiments.benchmarks.speech_shaped import of_a_linear_classifier, of_a_network
from experiments.benchmarks.tables import RESULTS
from experiments.data import SpeechShaped
from experiments.harness.record import read_record
from experiments.networks import mlp


def small(**options: int) -> SpeechShaped:
    return SpeechShaped(**{"train_size": 40, "test_size": 10, "features": 8, "classes": 3, **options})


def test_the_default_task_is_as_wide_as_speech_commands() -> None:
    data = SpeechShaped(train_size=70, test_size=60)
    data.setup("fit")
    data.setup("test")
    (inputs, labels), *_ = data.test_dataloader()
    assert inputs.shape == (60, 4096)
    assert inputs.dtype == torch.float32
    assert abs(float(inputs.std()) - 0.9) < 0.1
    assert labels.dtype == torch.int64
    assert (data.num_classes, data.in_features) == (35, 4096)
    assert (len(data.parts["train"].labels), len(data.parts["val"].labels)) == (63, 7)


def test_examples_depend_on_the_seed_alone_and_leave_the_global_generator() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = small().read(train=True)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = small().read(train=True)
    assert torch.equal(first.values, again.values)
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.values, small(seed=1).read(train=True).values)


def test_the_test_is_not_in_the_training_and_does_not_depend_on_its_size() -> None:
    trained, tested = small(train_size=10).read(train=True), small().read(train=False)
    assert not any(torch.equal(one, other) for one in trained.values for other in tested.values)
    assert torch.equal(small(train_size=1000).read(train=False).values, tested.values)


def test_no_two_seeds_share_draws_in_training_or_test() -> None:
    """With streams numbered seed + part, the test data of seed 0 would be drawn like the training data of seed 1."""
    parts = [small(seed=seed, test_size=40).read(train=train) for seed in range(4) for train in (True, False)]
    assert len({tuple(part.labels.tolist()) for part in parts}) == 8


def test_every_class_comes_about_as_often_as_the_others() -> None:
    labels = SpeechShaped(train_size=7000, features=1).read(train=True).labels
    assert 140 < labels.bincount(minlength=35).min() <= labels.bincount().max() < 260


def test_a_network_learns_it_and_a_linear_classifier_does_not() -> None:
    data = SpeechShaped(train_size=4096, test_size=1024, features=256, classes=20)
    trained, tested = data.read(train=True), data.read(train=False)
    deep = of_a_network(trained, tested, 256, 20)
    assert deep > 0.65
    assert of_a_linear_classifier(trained, tested) < 0.45


def test_the_numbers_in_the_docstring_are_those_of_the_result_file() -> None:
    rows = read_record(RESULTS / "speech_shaped.jsonl")["rows"]
    text = " ".join((SpeechShaped.__doc__ or "").split())
    assert [row["seed"] for row in rows] == [0, 1, 2]
    for column in ("width_512", "width_128", "linear"):
        found = [row[column] for row in rows]
        assert f"{min(found):.2f} to {max(found):.2f}" in text


@pytest.mark.filterwarnings("ignore:.*ModelCheckpoint")
def test_it_trains_under_lightning() -> None:
    data = SpeechShaped(train_size=1000, test_size=200, features=64, classes=4, batch_size=50)
    torch.manual_seed(0)
    module = LitClassifier(
        mlp(in_features=64, num_classes=4, width=64, output_norm=True), 4, lr=0.1, schedule="constant"
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=5,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(module, datamodule=data)
    (tested,) = trainer.test(module, datamodule=data, verbose=False)
    assert tested["test/acc"] > 0.7
