"""Folders of images: discovery, images decoded once, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from experiments.app.build import build_data, make
from experiments.data import ImageFolder, folder
from experiments.harness.settings import ConfigError

COLOURS = {"blue": (0, 0, 200), "green": (0, 200, 0), "red": (200, 0, 0)}
Write = Callable[..., None]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """``write("train/red", 3)``: three images of that colour, in files below ``tmp_path / "images"``."""

    def images(name: str, count: int, size: tuple[int, int] = (12, 10)) -> None:
        place = tmp_path / "images" / name
        place.mkdir(parents=True)
        colour = COLOURS.get(place.name, (9, 9, 9))
        for index in range(count):
            Image.new("RGB", size, colour).save(place / f"{index:02}.png")

    return images


def opened(tmp_path: Path, **options: object) -> ImageFolder:
    return ImageFolder(str(tmp_path / "images"), cache_dir=str(tmp_path / "cache"), image_size=8, **options)  # type: ignore[arg-type]


def ready(data: ImageFolder) -> ImageFolder:
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    return data


def all_three(write: Write, part: str, count: int) -> None:
    for name in COLOURS:
        write(f"{part}/{name}" if part else name, count)


def test_train_and_test_are_read_with_the_label_of_their_folder(write: Write, tmp_path: Path) -> None:
    all_three(write, "train", 10)
    all_three(write, "test", 2)
    data = ready(opened(tmp_path))
    assert data.num_classes == 3
    assert (len(data.parts["train"].labels), len(data.parts["val"].labels)) == (27, 3)
    assert data.parts["test"].labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.parts["test"].pixels.shape == (6, 3, 8, 8)
    for image, label in zip(*data.parts["test"], strict=True):
        assert tuple(image[:, 4, 4].tolist()) == list(COLOURS.values())[label]


def test_a_folder_of_classes_is_split_without_overlap(write: Write, tmp_path: Path) -> None:
    for index, name in enumerate(COLOURS):
        write(name, 5, size=(8 + index, 8))
    data = opened(tmp_path, test_fraction=0.4)
    everything = data._cached(data.listings["all"])
    trained, tested = data.read(train=True), data.read(train=False)
    assert (len(trained.labels), len(tested.labels)) == (9, 6)
    assert sorted([*trained.labels.tolist(), *tested.labels.tolist()]) == everything.labels.tolist()
    assert torch.equal(opened(tmp_path, test_fraction=0.4).read(train=False).labels, tested.labels)


def test_images_are_decoded_once(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    all_three(write, "", 4)
    first = opened(tmp_path).read(train=True)
    calls = []
    monkeypatch.setattr(folder, "decode", lambda *given: calls.append(given))
    again = opened(tmp_path).read(train=True)
    assert calls == []
    assert torch.equal(first.pixels, again.pixels)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_changed_file_is_decoded_again(write: Write, tmp_path: Path) -> None:
    all_three(write, "", 4)
    before = opened(tmp_path)
    old = before._cached(before.listings["all"]).pixels[0].clone()
    Image.new("RGB", (12, 10), (1, 2, 3)).save(tmp_path / "images" / "blue" / "00.png")
    after = opened(tmp_path)
    new = after._cached(after.listings["all"]).pixels[0]
    assert not torch.equal(old, new)
    assert new[:, 0, 0].tolist() == [1, 2, 3]


def test_grey_images_and_other_shapes_become_colour_of_one_size(tmp_path: Path) -> None:
    for name, mode, size in (("a", "L", (30, 8)), ("b", "RGBA", (8, 30)), ("c", "P", (8, 8))):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new(mode, size).save(tmp_path / "images" / name / "x.png")
    data = opened(tmp_path)
    assert data._cached(data.listings["all"]).pixels.shape == (3, 3, 8, 8)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ({}, r"images' is not a folder; give one with train/<class>"),
        ({"": 0}, "no sub-folders"),
        ({"red": 2, "void": 0}, r"no images in .*void; .*\.jpg"),
        (
            {"train/blue": 2, "train/green": 2, "train/red": 2, "test/red": 2, "test/violet": 2},
            r"different classes; in one of them only: blue, green, violet",
        ),
        ({"train/red": 2}, r"has train/ only; .* itself, which will be split"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused(
    images: dict[str, int], message: str, write: Write, tmp_path: Path
) -> None:
    for name, count in images.items():
        write(name, count)
        (tmp_path / "images" / name / "notes.txt").touch()  # not an image
    with pytest.raises(ValueError, match=message):
        _ = opened(tmp_path).num_classes


def test_a_file_that_is_no_image_is_named(write: Write, tmp_path: Path) -> None:
    write("red", 2)
    (tmp_path / "images" / "red" / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"broken\.png cannot be read as an image"):
        opened(tmp_path).prepare_data()


def test_train_py_refuses_a_wrong_folder_before_anything_is_decoded(tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    section = OmegaConf.create(
        {
            "_target_": "experiments.data.ImageFolder",
            "folder": str(tmp_path / "none"),
            "cache_dir": str(tmp_path),
        }
    )
    assert make(section, "data")
    with pytest.raises(ConfigError, match=r"data: folder=.*is not a folder"):
        build_data(section)
