"""Clips of one second, the same on every machine, and the command that writes librosa's mel spectrograms of them.

python -m tests.helpers.clips > tests/experiments/mel_of_librosa.json

needs librosa (``pip install librosa``, in a separate environment); nothing else here does.
"""

from __future__ import annotations

import json
import sys
import wave
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

RATE = 16000


def _seconds(count: int = RATE) -> np.ndarray:
    return np.arange(count) / RATE


def _sine() -> np.ndarray:
    return 10000 * np.sin(2 * np.pi * 440 * _seconds())


def _chirp() -> np.ndarray:
    return 20000 * np.sin(2 * np.pi * (50 + 3900 * _seconds()) * _seconds())


def _noise() -> np.ndarray:
    return np.random.default_rng(0).integers(-3000, 3000, RATE).astype(float)


def _word() -> np.ndarray:
    """A hum that swells and fades over faint noise: loud and quiet parts, as in speech."""
    envelope = np.exp(-(((_seconds() - 0.4) / 0.12) ** 2))
    hum = sum(np.sin(2 * np.pi * 130 * tone * _seconds()) / tone for tone in range(1, 30))
    return 6000 * envelope * hum + np.random.default_rng(1).integers(-2, 3, RATE)


def _click() -> np.ndarray:
    return np.where(np.arange(RATE) == 5000, 32767.0, 0.0)


def _ends() -> np.ndarray:
    """Noise at both ends only, where the result depends on the padding."""
    return np.where((np.arange(RATE) < 300) | (np.arange(RATE) > RATE - 200), _noise(), 0.0)


def _silence() -> np.ndarray:
    return np.zeros(RATE)


CLIPS: dict[str, Callable[[], np.ndarray]] = {
    "sine": _sine,
    "chirp": _chirp,
    "noise": _noise,
    "word": _word,
    "click": _click,
    "ends": _ends,
    "silence": _silence,
}


def clip(name: str, count: int = RATE) -> np.ndarray:
    """A clip as int16 (count,), repeated or cut if ``count`` is not 16000."""
    return np.resize(_rendered(name), count)


@cache
def _rendered(name: str) -> np.ndarray:
    return np.rint(CLIPS[name]()).astype(np.int16)


def write_wav(path: Path, samples: np.ndarray, *, rate: int = RATE, channels: int = 1, width: int = 2) -> None:
    """A PCM file; ``samples`` are int16, and each is written ``width`` bytes wide in every channel."""
    path.parent.mkdir(parents=True, exist_ok=True)
    wide = np.repeat(samples.astype({1: np.uint8, 2: np.int16, 4: np.int32}[width]), channels)
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        file.writeframes(wide.tobytes())


PLACES = {"band": range(0, 128, 9), "frame": (0, 1, 9, 13, 20, 30, 31)}


def ask_librosa() -> dict[str, object]:
    import librosa

    found = {}
    for name in CLIPS:
        mel = librosa.feature.melspectrogram(
            y=clip(name).astype(float), sr=RATE, n_mels=128, pad_mode="reflect"
        )  # reflect: librosa's default in 2020
        level = librosa.power_to_db(mel, ref=np.max)
        some = level[np.ix_(list(PLACES["band"]), list(PLACES["frame"]))]
        found[name] = {"mean": round(float(level.mean()), 6), "some": np.round(some, 6).tolist()}
    return {"librosa": librosa.__version__, "numpy": np.__version__, "clips": found}


if __name__ == "__main__":
    json.dump(ask_librosa(), sys.stdout)
    sys.stdout.write("\n")
