"""Downloads, lists and reads the clips of Speech Commands, and tells their speakers apart."""

from __future__ import annotations

import hashlib
import shutil
import wave
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets.utils import download_and_extract_archive

from experiments.data.cache import Listing, list_files
from experiments.data.mel import FEATURES, SAMPLE_RATE, SAMPLES, decibels

WORDS = (
    "backward", "bed", "bird", "cat", "dog", "down", "eight", "five", "follow", "forward", "four", "go", "happy",
    "house", "learn", "left", "marvin", "nine", "no", "off", "on", "one", "right", "seven", "sheila", "six", "stop",
    "three", "tree", "two", "up", "visual", "wow", "yes", "zero",
)  # fmt: skip
SAMPLE_BYTES = 2
CLIPS_AT_ONCE = 256
MOST = 2**27 - 1  # the README of the data set takes a hash modulo 2**27


class Archive(NamedTuple):
    """A tar file of the words' folders, with its MD5 sum."""

    url: str
    md5: str


# Address and sum as torchaudio 0.9 published them.
VERSION_2 = Archive(
    "https://storage.googleapis.com/download.tensorflow.org/data/speech_commands_v0.02.tar.gz",
    "6b74f3901214cb2c2934e98196829835",
)


def is_there(folder: Path) -> bool:
    """Whether the folder exists and is not empty."""
    return folder.is_dir() and any(folder.iterdir())


def download(folder: Path, archive: Archive = VERSION_2) -> None:
    """Fetch the archive to beside ``folder`` and extract it there, unless something is there already.

    The folder appears whole or not at all; an archive that came whole is not fetched again.

    Raises:
        RuntimeError: the downloaded file is not the archive, by its sum.
        OSError: it cannot be fetched or written.
    """
    if is_there(folder):
        return
    draft = folder.with_name(f"{folder.name}.extracting")
    shutil.rmtree(draft, ignore_errors=True)  # of an interrupted run
    download_and_extract_archive(archive.url, str(folder.parent), str(draft), md5=archive.md5)
    draft.replace(folder)


def list_clips(folder: Path) -> Listing:
    """All wav files of the 35 words; other sub-folders (``_background_noise_``) are left alone.

    Raises:
        ValueError: the folder is missing, or words of it, or a word has no clips.
    """
    if not is_there(folder):
        raise ValueError(
            f"folder={str(folder)!r} is missing or empty; download=true fetches Speech Commands to it (2.3 GB), or "
            f"extract {VERSION_2.url} there yourself"
        )
    missing = [word for word in WORDS if not (folder / word).is_dir()]
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of the {len(WORDS)} words: {', '.join(missing[:5])}"
            f"{' ...' if len(missing) > 5 else ''}; give the folder that has backward/*.wav to zero/*.wav, of version "
            "0.02 of the data set (0.01 has 30 words)"
        )
    return list_files(folder, WORDS, {".wav"}, "no *.wav in {}; extract the archive again")


def speaker_percent(file_name: str) -> float:
    """The place in [0, 100] of a speaker by the data set's README: SHA-1 of the name before ``_nohash_``.

    All clips of a speaker, of all words, have the same value; a part of the data is an interval of it.
    """
    speaker = file_name.partition("_nohash_")[0]
    digest = hashlib.sha1(speaker.encode(), usedforsecurity=False).hexdigest()
    return int(digest, 16) % (MOST + 1) * 100 / MOST


def features_of(files: Sequence[Path]) -> tuple[Tensor, Tensor]:
    """The features of the clips that have 16000 samples.

    Returns:
        float32 (clips, 4096), in decibels, and int64 (clips,): their places in ``files``.

    Raises:
        ValueError: a file that is no wav file, or one of another rate, width or number of channels.
    """
    table = np.empty((len(files), FEATURES), dtype=np.float32)  # pages that are not written take no memory
    found: list[int] = []
    with ThreadPoolExecutor() as threads:
        for start in range(0, len(files), CLIPS_AT_ONCE):
            batch = list(threads.map(read_clip, files[start : start + CLIPS_AT_ONCE]))
            whole = [clip for clip in batch if clip is not None]
            if whole:
                rows = slice(len(found), len(found) + len(whole))
                table[rows] = decibels(torch.from_numpy(np.stack(whole).astype(np.float64))).numpy()
            found += [index for index, clip in enumerate(batch, start) if clip is not None]
    return torch.from_numpy(table[: len(found)]), torch.tensor(found, dtype=torch.int64)


def read_clip(path: Path) -> np.ndarray | None:
    """int16 (16000,), or None where the clip is longer or shorter.

    Raises:
        ValueError: not a wav file, or one of another rate, width or number of channels.
    """
    try:
        with wave.open(str(path), "rb") as file:
            rate = file.getframerate()
            channels = file.getnchannels()
            width = file.getsampwidth()
            content = file.readframes(SAMPLES + 1)  # one more, to see that the clip is longer
    except (wave.Error, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a wav file ({error}); repair or remove it") from error
    if rate != SAMPLE_RATE:
        raise ValueError(
            f"{path} has {rate} samples a second; it needs {SAMPLE_RATE}, as in the original data set: resample it"
        )
    if (channels, width) != (1, SAMPLE_BYTES):
        raise ValueError(
            f"{path} has {channels} channel(s) of {8 * width} bits; it needs 1 of {8 * SAMPLE_BYTES} bits: convert it"
        )
    return np.frombuffer(content, "<i2") if len(content) == SAMPLES * SAMPLE_BYTES else None
