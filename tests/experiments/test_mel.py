"""Mel spectrograms: librosa's values, and properties that follow from the definition."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.data.mel import FEATURES, decibels, filter_bank
from tests.helpers.clips import CLIPS, PLACES, clip

LIBROSA = json.loads((Path(__file__).parent / "mel_of_librosa.json").read_text())


def spectrogram(samples: np.ndarray) -> np.ndarray:
    """A spectrogram of 128 bands and 32 frames."""
    found = decibels(torch.from_numpy(samples.astype(float))[None])
    assert found.shape == (1, FEATURES)
    assert found.dtype == torch.float32
    return found[0].view(128, 32).numpy()


@pytest.mark.parametrize("name", CLIPS)
def test_the_values_are_librosas(name: str) -> None:
    """mel_of_librosa.json was written by ``python -m tests.helpers.clips`` with the librosa and numpy that it names.

    On all 4096 values of each clip the largest difference was 4e-5 dB (librosa's filter bank is in float32); padding
    with zeros instead of reflection is 0.03 to 11 dB away on the five clips that are not zero at their ends.
    """
    found, expected = spectrogram(clip(name)), LIBROSA["clips"][name]
    some = found[np.ix_(list(PLACES["band"]), list(PLACES["frame"]))]
    np.testing.assert_allclose(some, expected["some"], rtol=0, atol=2e-4)
    assert found.mean(dtype=float) == pytest.approx(expected["mean"], abs=2e-4)


def test_librosa_was_asked_about_every_clip() -> None:
    assert list(LIBROSA["clips"]) == list(CLIPS)
    assert len(LIBROSA["clips"]) == 7


def test_a_click_is_heard_in_the_frames_around_it_and_in_all_bands() -> None:
    """A frame sees 1024 samples to each side of its middle, which is at 512 times its number."""
    loud = spectrogram(clip("click")) > -80
    near = [frame for frame in range(32) if abs(512 * frame - 5000) < 1024]
    assert near == [8, 9, 10, 11]
    assert [frame for frame in range(32) if loud[:, frame].any()] == near
    assert loud[:, 10].all()


def test_the_loudness_of_a_clip_does_not_matter_and_its_loudest_place_is_0_db() -> None:
    quiet, loud = spectrogram(clip("word") / 32768), spectrogram(clip("word"))
    np.testing.assert_allclose(quiet, loud, rtol=0, atol=1e-4)
    assert loud.max() == 0
    assert loud.min() == -80


def test_silence_is_0_db_everywhere() -> None:
    assert (spectrogram(clip("silence")) == 0).all()


def test_clips_of_a_batch_do_not_meet() -> None:
    together = decibels(torch.from_numpy(np.stack([clip("click"), clip("noise")])))
    torch.testing.assert_close(together[0], torch.from_numpy(spectrogram(clip("click")).reshape(-1)))
    torch.testing.assert_close(together[1], torch.from_numpy(spectrogram(clip("noise")).reshape(-1)))


def test_every_band_hears_something_and_every_inner_frequency_is_heard() -> None:
    bank = filter_bank()
    assert bank.shape == (128, 1025)
    assert (bank >= 0).all()
    assert (bank.sum(dim=1) > 0).all()
    assert (bank.sum(dim=0)[1:-1] > 0).all()
    middles = bank.argmax(dim=1)
    assert (middles.diff() > 0).all()
