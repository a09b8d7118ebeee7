"""The data modules: sizes, splits, loaders, and the effect of the strategies' data policies."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torch.utils.data import DistributedSampler

from experiments.data import CIFAR10, CIFAR100, Digits, Fake
from experiments.data.module import ImageData
from experiments.harness.settings import ConfigError
from resist_lightning import ResISTStrategy
from resist_lightning.strategies import base


def ready(data: ImageData) -> ImageData:
    data.setup("fit")
    data.setup("test")
    return data


def sizes(data: ImageData) -> tuple[int, int, int]:
    return tuple(len(data.parts[part].labels) for part in ("train", "val", "test"))  # type: ignore[return-value]


def test_digits_are_all_there_once() -> None:
    data = ready(Digits())
    assert sizes(data) == (1293, 144, 360)
    parts = [data.parts["train"], data.parts["val"], data.parts["test"]]
    pixels = torch.cat([part.pixels for part in parts])
    assert pixels.shape == (1797, 1, 8, 8)
    assert pixels.dtype == torch.uint8
    from sklearn.datasets import load_digits

    expected = torch.from_numpy(load_digits().images).mul(255 / 16).round().to(torch.uint8)

    def row(images: torch.Tensor) -> list[tuple[int, ...]]:
        return sorted(tuple(image.flatten().tolist()) for image in images)

    assert row(pixels) == row(expected)
    assert set(torch.cat([part.labels for part in parts]).tolist()) == set(range(10))


def test_digits_are_split_alike_in_every_process_and_normalised() -> None:
    torch.manual_seed(1)
    first = ready(Digits())
    torch.manual_seed(2)
    second = ready(Digits())
    assert torch.equal(first.parts["test"].pixels, second.parts["test"].pixels)
    pixels = torch.cat([images for images, _ in first.test_dataloader()])
    assert abs(float(pixels.mean())) < 0.05
    assert abs(float(pixels.std()) - 1) < 0.05


def test_batches_have_the_sizes_asked_for_and_the_last_is_kept_or_dropped() -> None:
    kept = ready(Fake(train_size=50, test_size=9, batch_size=20, eval_batch_size=4, image_size=8))
    shapes = [tuple(images.shape) for images, _ in kept.train_dataloader()]
    assert shapes == [(20, 3, 8, 8), (20, 3, 8, 8), (5, 3, 8, 8)]
    assert [len(labels) for _, labels in kept.val_dataloader()] == [4, 1]
    assert [len(labels) for _, labels in kept.test_dataloader()] == [4, 4, 1]
    dropped = ready(Fake(train_size=50, batch_size=20, drop_last=True))
    assert [len(labels) for _, labels in dropped.train_dataloader()] == [20, 20]


def test_only_training_images_are_augmented() -> None:
    data = ready(Fake(train_size=20, test_size=10, image_size=8, batch_size=100, eval_batch_size=100))
    again = [torch.cat([images for images, _ in data.test_dataloader()]) for _ in range(2)]
    assert torch.equal(*again)
    plain = ready(Fake(train_size=20, image_size=8, batch_size=100, augment=False))
    (augmented, labels), (original, plain_labels) = (
        next(iter(data.train_dataloader())),
        next(iter(plain.train_dataloader())),
    )
    lost = [not any(torch.equal(image, other) for other in original) for image in augmented]
    assert sum(lost) > 10
    assert sorted(labels.tolist()) == sorted(plain_labels.tolist())


def test_validating_does_not_move_the_global_generator() -> None:
    data = ready(Fake(train_size=20, test_size=10))
    before = torch.get_rng_state()
    assert len(list(data.val_dataloader())) > 0
    assert len(list(data.test_dataloader())) > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_limits_take_the_first_of_each_class() -> None:
    data = ready(Fake(train_size=300, test_size=100, classes=4, limit=10, limit_test=3))
    assert sizes(data) == (36, 4, 12)
    everything = ready(Fake(train_size=300, test_size=100, classes=4)).parts["test"]
    first = [everything.pixels[everything.labels == label][:3] for label in range(4)]
    for label in range(4):
        assert torch.equal(data.parts["test"].pixels[data.parts["test"].labels == label], first[label])


def test_a_loader_before_setup_is_refused() -> None:
    with pytest.raises(RuntimeError, match="setup"):
        Fake().train_dataloader()


@pytest.mark.parametrize(("module", "classes"), [(CIFAR10, 10), (CIFAR100, 100)])
def test_cifar_turns_torchvisions_arrays_into_channels_first(
    module: type[ImageData], classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def source(root: str, **options: Any) -> Any:
        asked.append({"root": root, **options})
        pixels = np.arange(20 * 4 * 5 * 3, dtype=np.uint32).astype(np.uint8).reshape(20, 4, 5, 3)
        return SimpleNamespace(data=pixels, targets=list(range(20)))

    monkeypatch.setattr(module, "source", staticmethod(source))
    data = module("somewhere", batch_size=3)  # type: ignore[call-arg]
    data.prepare_data()
    assert asked == [{"root": "somewhere", "train": train, "download": True} for train in (True, False)]
    images = data.read(train=False)
    assert asked[-1] == {"root": "somewhere", "train": False}
    assert images.pixels.shape == (20, 3, 4, 5)
    assert images.pixels[7, 2, 1, 3] == source("").data[7, 1, 3, 2]
    assert data.num_classes == classes


@pytest.mark.parametrize("module", [CIFAR10, CIFAR100])
def test_a_host_without_internet_is_told_where_to_put_the_files(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_internet(*_: Any, **__: Any) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", no_internet)
    archive = f"{module.source.__name__} is not in folder='{tmp_path}' .* put {re.escape(module.source.url)} there"
    with pytest.raises(ConfigError, match=archive):
        module(str(tmp_path)).prepare_data()


POLICIES = {"shard": 1.0, "copy": 2.0}


@pytest.mark.parametrize("policy", POLICIES)
def test_workers_get_shards_or_copies_of_the_training_images(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ready(Fake(train_size=80, image_size=8, batch_size=8))
    orders = [order_of(worker, policy, data, monkeypatch) for worker in range(2)]
    count = len(data.parts["train"].labels)
    assert [len(order) for order in orders] == [count * POLICIES[policy] / 2] * 2
    assert orders[0] != orders[1]
    seen = sorted([*orders[0], *orders[1]])
    assert seen == sorted([*range(count)] * int(POLICIES[policy]))


def order_of(worker: int, policy: Any, data: ImageData, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The training images of a worker, in the order of the sampler that the strategy requests from Lightning."""
    strategy = ResISTStrategy(data=policy, parallel_devices=[torch.device("cpu")] * 2)
    strategy._local_rank = worker
    monkeypatch.setattr(base, "making_training_loaders", lambda session: True)
    environment = SimpleNamespace(global_rank=lambda: worker, local_rank=lambda: worker)
    strategy.cluster_environment = environment  # type: ignore[assignment]
    arguments = {"seed": 0, **strategy.distributed_sampler_kwargs}
    return list(DistributedSampler(data.train_dataloader().dataset, shuffle=True, **arguments))
