"""Speech Commands: test speakers, omitted clips, the cache on disk, refusals."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from experiments.app.build import build_data, build_module
from experiments.data import SpeechCommands, clips
from experiments.data import speech as speech_module
from experiments.data.clips import WORDS, list_clips, speaker_percent
from experiments.data.mel import decibels
from experiments.harness.settings import ConfigError
from tests.helpers.clips import CLIPS, clip, write_wav

# Speakers of the first clips in the data set's own testing_list.txt and validation_list.txt (10 % each), version 0.02.
OF_TESTING_LIST = (
    "2aa787cf", "ffa76c4a", "24ad3ebe", "d7467392", "5828dfa2", "91223b83", "f0ae7203", "95ba4996", "94de6a6a",
    "caf9fceb", "82b99576", "81dc4a94", "e41a903b", "a1533da4", "50033893", "20d3f11f", "ef2a3cfb", "37dca74f",
)  # fmt: skip
OF_VALIDATION_LIST = (
    "8b775397", "2643992f", "060cd039", "f5e5e8b0", "dbb40d24", "d57febf0", "16db1582", "171b56dc", "66cff190",
    "22aa3665", "b1426003", "67c7fecb", "d9ae8983", "826268f8", "61bcb275", "f84762e5", "27b9a84f", "aa753bb9",
)  # fmt: skip
TESTED = ("2aa787cf", "8b775397")
TRAINED = ("bobby", "greta")
SOUNDS = [name for name in CLIPS if name != "silence"]


def name_of(speaker: str, number: int = 0) -> str:
    return f"{speaker}_nohash_{number}.wav"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """All words, each by two speakers of the test and two of the training, and noise that is no word."""
    place = tmp_path / "speech"
    for label, word in enumerate(WORDS):
        for index, speaker in enumerate((*TESTED, *TRAINED)):
            write_wav(place / word / name_of(speaker), clip(SOUNDS[(label + index) % len(SOUNDS)]))
    write_wav(place / "_background_noise_" / "rain.wav", clip("noise", 50000))
    return place


def opened(folder: Path, **options: object) -> SpeechCommands:
    return SpeechCommands(str(folder), cache_dir=str(folder.parent / "cache"), **options)  # type: ignore[arg-type]


def ready(data: SpeechCommands) -> SpeechCommands:
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    return data


@pytest.fixture
def said() -> Iterator[Callable[[], str]]:
    """Lightning's messages to the user so far, as one text."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("lightning.pytorch")
    logger.addHandler(handler)
    yield lambda: "\n".join(records)
    logger.removeHandler(handler)


def test_speakers_fall_where_the_lists_of_the_data_set_have_them() -> None:
    for speaker in OF_VALIDATION_LIST:
        assert 0 <= speaker_percent(name_of(speaker)) < 10
    for speaker in OF_TESTING_LIST:
        assert 10 <= speaker_percent(name_of(speaker)) < 20
    assert speaker_percent(name_of("2aa787cf", 0)) == speaker_percent(name_of("2aa787cf", 5))


def test_the_test_has_all_clips_of_its_speakers_and_no_others(folder: Path) -> None:
    data = opened(folder)
    trained, tested = data.read(train=True), data.read(train=False)
    names = [path.stem.partition("_")[0] for path in data.listing.files]
    assert {names[row] for row in tested.rows} == set(TESTED)
    assert {names[row] for row in trained.rows} == set(TRAINED)
    assert sorted([*trained.rows.tolist(), *tested.rows.tolist()]) == list(range(4 * 35))
    assert sorted(tested.labels.tolist()) == sorted([*range(35), *range(35)])


def test_an_example_is_the_clip_of_its_word_standardised_by_the_training(folder: Path) -> None:
    expected, trained = {}, []
    for label, word in enumerate(WORDS):
        for index, speaker in enumerate((*TESTED, *TRAINED)):
            samples = clip(SOUNDS[(label + index) % len(SOUNDS)])
            expected[word, speaker] = decibels(torch.from_numpy(samples)[None])[0]
            trained += [expected[word, speaker]] if speaker in TRAINED else []
    mean, std = torch.stack(trained).mean(), torch.stack(trained).std(correction=0)
    data = opened(folder)
    for part in (data.read(train=True), data.read(train=False)):
        assert part.values.shape == (70, 4096)
        assert part.values.dtype == torch.float32
        for row, values, label in zip(part.rows.tolist(), part.values, part.labels.tolist(), strict=True):
            path = data.listing.files[row]
            assert path.parent.name == WORDS[label]
            wanted = (expected[WORDS[label], path.stem.partition("_")[0]] - mean) / std
            torch.testing.assert_close(values, wanted, rtol=0, atol=1e-4)


def test_batches_are_rows_and_labels(folder: Path) -> None:
    data = ready(opened(folder, batch_size=20, eval_batch_size=30))
    assert [tuple(inputs.shape) for inputs, _ in data.train_dataloader()] == [(20, 4096)] * 3 + [(3, 4096)]
    assert [len(labels) for _, labels in data.val_dataloader()] == [7]
    assert [len(labels) for _, labels in data.test_dataloader()] == [30, 30, 10]
    assert (data.num_classes, data.in_features) == (35, 4096)


def test_clips_of_another_length_are_left_out_and_counted(folder: Path, said: Callable[[], str]) -> None:
    write_wav(folder / "cat" / name_of(TRAINED[0], 1), clip("noise", 15999))
    write_wav(folder / "dog" / name_of(TESTED[0], 1), clip("noise", 16001))
    write_wav(folder / "dog" / name_of(TRAINED[0], 0), clip("noise", 100))
    data = opened(folder)
    data.prepare_data()
    assert "3 of 142 clips" in said()
    assert "do not have 16000 samples" in said()
    trained, tested = data.read(train=True), data.read(train=False)
    assert (len(trained.labels), len(tested.labels)) == (69, 70)
    assert trained.labels.bincount().tolist() == [1 if word == "dog" else 2 for word in WORDS]
    assert torch.isfinite(trained.values).all()


def test_features_are_computed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened(folder).read(train=True)
    calls = []
    monkeypatch.setattr(speech_module, "features_of", lambda *given: calls.append(given))
    again = opened(folder).read(train=True)
    assert calls == []
    assert torch.equal(first.values, again.values)
    assert len(list((folder.parent / "cache").iterdir())) == 1


def test_a_changed_clip_is_computed_again(folder: Path) -> None:
    before = opened(folder).read(train=True).values
    write_wav(folder / "cat" / name_of(TRAINED[0]), clip("ends")[::-1].copy())
    after = opened(folder).read(train=True).values
    assert not torch.equal(before, after)


def test_the_file_of_features_holds_no_clip_that_was_left_out(folder: Path) -> None:
    for word in WORDS:
        write_wav(folder / word / name_of(TRAINED[0], 1), clip("noise", 500))
    opened(folder).prepare_data()
    (kept,) = (folder.parent / "cache").iterdir()
    assert 140 * 4096 * 4 < kept.stat().st_size < 142 * 4096 * 4


def test_many_clips_are_computed_in_order(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = opened(folder)._cached()["table"]
    monkeypatch.setattr(clips, "CLIPS_AT_ONCE", 9)
    found, indices = clips.features_of(list_clips(folder).files)
    assert indices.tolist() == list(range(140))
    torch.testing.assert_close((found - found.mean()) / found.std(), (whole - whole.mean()) / whole.std())


def test_a_missing_or_empty_folder_is_refused_with_the_way_to_the_data(tmp_path: Path) -> None:
    for place in (tmp_path / "none", tmp_path):
        with pytest.raises(ValueError, match=r"is missing or empty; download=true fetches .*v0\.02\.tar\.gz"):
            opened(place).check()


def test_a_folder_without_the_words_is_refused(tmp_path: Path) -> None:
    write_wav(tmp_path / "speech" / "yes" / "a_nohash_0.wav", clip("sine"))
    with pytest.raises(ValueError, match=r"lacks 34 of the 35 words: backward, bed, bird, cat, dog \.\.\.; give the"):
        opened(tmp_path / "speech", download=True).check()


def test_a_word_without_clips_is_refused(folder: Path) -> None:
    for path in (folder / "wow").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"no \*\.wav in .*wow"):
        opened(folder).check()


def test_files_that_are_not_16_bit_mono_at_16_khz_are_named(folder: Path) -> None:
    path = folder / "zero" / name_of(TRAINED[0])
    write_wav(path, clip("sine"), rate=8000)
    with pytest.raises(ValueError, match=r"zero.*wav has 8000 samples a second; it needs 16000"):
        opened(folder).prepare_data()
    write_wav(path, clip("sine"), channels=2)
    with pytest.raises(ValueError, match=r"wav has 2 channel\(s\) of 16 bits; it needs 1 of 16 bits"):
        opened(folder).prepare_data()
    write_wav(path, clip("sine"), width=4)
    with pytest.raises(ValueError, match=r"wav has 1 channel\(s\) of 32 bits"):
        opened(folder).prepare_data()
    path.write_bytes(b"no sound")
    with pytest.raises(ValueError, match=r"wav cannot be read as a wav file"):
        opened(folder).prepare_data()
    assert not (folder.parent / "cache").exists()


@pytest.mark.parametrize("only", [TESTED, TRAINED])
def test_clips_of_one_part_only_are_refused(only: tuple[str, ...], folder: Path) -> None:
    for path in folder.glob("*/*_nohash_*.wav"):
        if path.stem.partition("_")[0] not in only:
            path.unlink()
    with pytest.raises(ValueError, match=r"70 of 70 clips have 16000 samples, and (0|70) of them are of test speakers"):
        opened(folder).prepare_data()


def test_train_py_refuses_a_wrong_folder_before_any_work_unless_it_is_to_be_fetched(tmp_path: Path) -> None:
    section = OmegaConf.create(
        {
            "_target_": "experiments.data.SpeechCommands",
            "folder": str(tmp_path / "none"),
            "cache_dir": str(tmp_path / "cache"),
        }
    )
    with pytest.raises(ConfigError, match=r"data: folder=.*is missing or empty"):
        build_data(section)
    assert build_data(OmegaConf.merge(section, {"download": True})).num_classes == 35
    assert list(tmp_path.iterdir()) == []


def test_augmentation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"augment=True: .* set augment=false"):
        opened(tmp_path, augment=True)


def flat_network(*, num_classes: int, in_features: int) -> nn.Module:
    return nn.Linear(in_features, num_classes)


def test_a_network_for_images_is_refused_and_another_is_told_the_width(tmp_path: Path) -> None:
    data = opened(tmp_path)
    optimizer = {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant"}
    for target in ("resist_lightning.models.preact_resnet", "experiments.networks.torchvision_resnet"):
        cfg = OmegaConf.create({"model": {"_target_": target}, "optimizer": optimizer})
        with pytest.raises(ConfigError, match=r"is for images, and SpeechCommands gives rows of 4096 features"):
            build_module(cfg, data)
    cfg = OmegaConf.create({"model": {"_target_": f"{__name__}.flat_network"}, "optimizer": optimizer})
    assert build_module(cfg, data)(torch.zeros(2, 4096)).shape == (2, 35)


def test_the_papers_network_does_not_notice_a_shift_or_a_scale_of_all_inputs() -> None:
    """So standardising by one mean and one deviation changes nothing in the paper's experiments."""
    torch.manual_seed(0)
    raw = -80 * torch.rand(16, 50, dtype=torch.float64)
    labels = torch.arange(16) % 3
    layers = [nn.Linear(50, 20, bias=False), nn.BatchNorm1d(20, eps=1e-30), nn.ReLU(), nn.Linear(20, 3, bias=False)]
    net = nn.Sequential(*layers, nn.BatchNorm1d(3, affine=False)).double()
    found = []
    for inputs in (raw, (raw + 60.0) / 20.0):
        loss = nn.functional.cross_entropy(net(inputs), labels)
        found.append((loss, *torch.autograd.grad(loss, list(net.parameters()))))
    for before, after in zip(*found, strict=True):
        torch.testing.assert_close(before, after, rtol=1e-9, atol=1e-12)
    assert found[0][1].abs().max() > 1e-3
