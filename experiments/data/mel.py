"""Mel spectrograms in decibels, as librosa made them when the paper's data were made.

The released code (December 2020) calls ``librosa.feature.melspectrogram`` with 128 bands on the clip's 16-bit values,
not divided by 32768, and ``librosa.power_to_db(ref=np.max)``, whose default cuts values more than 80 dB below the
clip's loudest value. So a clip lies in [-80, 0] dB, however loud it was recorded, and a clip of zeros is 0 dB
everywhere. librosa continued a clip at its ends by reflection then; since 0.9.0 it does so with zeros. We reflect.

Here ``torch.stft`` does the work and only the filter bank is ours. Why not librosa or torchaudio, and how close the
values are: docs/decisions/0016-speech-features.md.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

SAMPLE_RATE = 16000
SAMPLES = 16000
WINDOW = 2048
HOP = 512
BANDS = 128
FRAMES = 1 + SAMPLES // HOP
FEATURES = BANDS * FRAMES
DYNAMIC_RANGE = 80.0
LEAST_POWER = 1e-10

# Hz. Slaney's scale is linear to here, 3 mel for 200 Hz, and logarithmic above, 27 mel for a factor of 6.4.
LINEAR_UP_TO = 1000.0


def decibels(clips: Tensor) -> Tensor:
    """The features of clips.

    Args:
        clips: (clips, 16000), at 16 kHz: 16-bit values, or any multiple of them whose power is far above 1e-10.

    Returns:
        float32 (clips, 4096) in [-80, 0]: 128 bands, from low to high, of 32 frames each.
    """
    window = torch.hann_window(WINDOW, dtype=torch.float64)
    waves = torch.stft(clips.double(), WINDOW, HOP, window=window, center=True, pad_mode="reflect", return_complex=True)
    power = (filter_bank() @ waves.abs().square()).flatten(1)
    level = 10 * power.clamp_min(LEAST_POWER).log10()  # 0 has no logarithm
    loudest = level.amax(dim=1, keepdim=True)
    return (level - loudest).clamp_min(-DYNAMIC_RANGE).float()


@cache
def filter_bank() -> Tensor:
    """Triangles of equal area whose corners are evenly spaced in mel from 0 Hz to 8 kHz.

    Returns:
        float64 (128, 1025): the weight of each frequency of the transform in each band.
    """
    highest = torch.tensor(SAMPLE_RATE / 2, dtype=torch.float64)
    corners = _to_hz(torch.linspace(0, float(_to_mel(highest)), BANDS + 2, dtype=torch.float64))
    low, middle, high = (corners[start : start + BANDS, None] for start in range(3))
    frequencies = torch.linspace(0, SAMPLE_RATE / 2, 1 + WINDOW // 2, dtype=torch.float64)
    rising = (frequencies - low) / (middle - low)
    falling = (high - frequencies) / (high - middle)
    return torch.minimum(rising, falling).clamp_min(0) * 2 / (high - low)


def _to_mel(hz: Tensor) -> Tensor:
    linear = 3 * hz / 200
    above = 3 * LINEAR_UP_TO / 200 + 27 * (hz / LINEAR_UP_TO).log() / torch.tensor(6.4).double().log()
    return torch.where(hz < LINEAR_UP_TO, linear, above)


def _to_hz(mel: Tensor) -> Tensor:
    border = 3 * LINEAR_UP_TO / 200
    return torch.where(mel < border, 200 * mel / 3, LINEAR_UP_TO * 6.4 ** ((mel - border) / 27))
