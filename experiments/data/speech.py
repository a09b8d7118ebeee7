"""Google Speech Commands as the paper's fully connected networks see it."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info

from experiments.data import mel
from experiments.data.arrays import Features
from experiments.data.cache import Listing, kept
from experiments.data.clips import WORDS, download, features_of, is_there, list_clips, speaker_percent
from experiments.data.module import FeatureData

TEST_PERCENT = 20.0
FORMAT = 1  # to be raised when the same files give other features, so that old caches are not taken


class SpeechCommands(FeatureData):
    """35 words, clips of 16000 samples, as mel spectrograms in decibels (`experiments.data.mel`): 4096 inputs.

    The test set has the 20 % of the speakers that the data set's README would take for it, by a hash of their names;
    none of them is heard in training. (They are those of its validation and testing lists together.) The hold-out for
    validation is drawn from the other speakers' clips: a voice may be in training and in validation, so that
    validation may show a higher accuracy than the test. Clips of another length are left out, as in the released code.

    All features are standardised with the one mean and the one deviation of all training clips' features together. The
    paper's network does not notice: after a linear layer without bias and batch norm, neither the loss nor a gradient
    depends on a shift or a scale that all inputs share (a test shows it). Networks with other norms or none do.

    The features are kept in ``cache_dir`` (up to 1.7 GB, and that much memory while they are made: some minutes); the
    cache is made again when a file changes. Workers of one host share the mapped file; looking whether a file changed
    takes each of them about a second at the start.

    Not run: the download itself, and training on the real clips, which were not at hand. The tests make clips, and
    extract an archive from a local address.

    Args:
        folder: has a sub-folder with wav files for each word.
        cache_dir: where the features are kept.
        download: fetch and extract the archive where ``folder`` is missing or empty.
        loading: keyword arguments of `Loading`.

    Raises:
        ValueError: on first use, if the folder is missing or lacks words, or a file is not 16-bit mono at 16 kHz.
    """

    num_classes = len(WORDS)
    in_features = mel.FEATURES

    def __init__(self, folder: str, *, cache_dir: str, download: bool = False, **loading: Any) -> None:
        super().__init__(loading)
        self.folder = Path(folder)
        self.cache_dir = Path(cache_dir)
        self.download = download

    def check(self) -> None:
        if not self.download or is_there(self.folder):
            _ = self.listing

    @cached_property
    def listing(self) -> Listing:
        """All clips of the folder, of any length."""
        return list_clips(self.folder)

    def prepare_data(self) -> None:
        """Download, compute the features; Lightning calls it in one process per host."""
        if self.download:
            download(self.folder)
        left_out = self._cached()["left_out"]
        if left_out:
            rank_zero_info(
                f"{left_out} of {len(self.listing.files)} clips of {self.folder} are skipped: they do not have "
                f"{mel.SAMPLES} samples"
            )

    def read(self, *, train: bool) -> Features:
        stored = self._cached()
        rows = torch.nonzero(stored["tested"] != train).flatten()
        return Features(stored["table"], rows, stored["labels"][rows])

    def _cached(self) -> dict[str, Any]:
        path = self.cache_dir / f"{self.folder.name}-{self.listing.fingerprint(FORMAT)}.pt"

        def make() -> dict[str, Any]:
            rank_zero_info(f"Computing features of {len(self.listing.files)} clips once, into {path}")
            return standardised(self.listing)

        return kept(path, make)


def standardised(listing: Listing) -> dict[str, Any]:
    """The content of the cache.

    Returns:
        ``table``, float32 (clips, 4096), of which ``mean`` has been subtracted and which was divided by ``std`` (in
        decibels); ``labels``, int64 (clips,); ``tested``, bool (clips,): the test's; ``left_out``, the number of clips
        of another length.

    Raises:
        ValueError: training or test would be empty.
    """
    table, found = features_of(listing.files)
    labels = torch.tensor(listing.labels)[found]
    percents = [speaker_percent(listing.files[index].name) for index in found.tolist()]
    tested = torch.tensor(percents) < TEST_PERCENT
    if not len(found) or tested.all() or not tested.any():
        raise ValueError(
            f"{listing.folder}: {len(found)} of {len(listing.files)} clips have {mel.SAMPLES} samples, and "
            f"{int(tested.sum())} of them are of test speakers; neither training nor test set can be empty"
        )
    # Per clip first: `table[~tested]` would be a copy of most of it.
    variance, mean = torch.var_mean(table, dim=1, correction=0)
    average = mean[~tested].double().mean()
    deviation = (variance + (mean - average) ** 2)[~tested].double().mean().sqrt()
    scale = deviation if deviation > 0 else torch.ones(())
    table.sub_(average).div_(scale)
    return {
        "table": table,
        "labels": labels,
        "tested": tested,
        "mean": float(average),
        "std": float(scale),
        "left_out": len(listing.files) - len(found),
    }
