"""Log-mel spectrograms of recordings at 16 kHz, as in Whisper's front end (Radford et al. 2022, arXiv:2212.04356)."""

import functools

import numpy as np

RATE, WINDOW, HOP, BANDS = 16_000, 400, 160, 80
# The scale of Slaney's Auditory Toolbox: linear up to 1000 Hz, then 27 mels for each factor of 6.4.
LINEAR, BEND, STEP = 200 / 3, 1000.0, np.log(6.4) / 27
FLOOR = 1e-10
# Recordings whose frames are in memory at once.
AT_ONCE = 64


def log_mel(samples: np.ndarray) -> np.ndarray:
    """Returns spectrograms (b, t // 160, 80) of recordings (b, t) in [-1, 1], float32.

        p_kj = |sum_n w_n x_{160 k + n - 200} exp(-2 pi i j n / 400)|^2,     w_n = (1 - cos(2 pi n / 400)) / 2,  0 <= n < 400
        m_kb = log10 max(sum_j F_jb p_kj, 1e-10),     y_kb = (max(m_kb, max m - 8) + 4) / 4

    Windows have 25 ms and begin every 10 ms; at the ends, x is mirrored without its first and last sample. F are triangles of unit area
    on Slaney's mel scale between 0 and 8 kHz. The largest m is that of the recording.

    Raises:
      ValueError: a recording has fewer than 201 samples, which leave nothing to mirror.
    """
    if samples.ndim != 2 or samples.shape[1] <= WINDOW // 2:
        raise ValueError(
            f"samples have shape {samples.shape}; expected (b, t) with t of at least {WINDOW // 2 + 1}"
        )
    parts = [_log_mel(samples[start : start + AT_ONCE]) for start in range(0, len(samples), AT_ONCE)]
    return np.concatenate(parts) if parts else np.zeros((0, samples.shape[1] // HOP, BANDS), np.float32)


def _log_mel(samples):
    padded = np.pad(samples.astype(np.float64), ((0, 0), (WINDOW // 2,) * 2), mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW, axis=1)[:, ::HOP]
    frames = frames[:, : samples.shape[1] // HOP]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    power = np.abs(np.fft.rfft(frames * window, axis=-1)) ** 2
    levels = np.log10(np.maximum(power @ mel_filters(), FLOOR))
    levels = np.maximum(levels, levels.max((1, 2), keepdims=True) - 8)
    return ((levels + 4) / 4).astype(np.float32)


@functools.cache
def mel_filters() -> np.ndarray:
    """Returns F (201, 80): what each frequency of a window adds to each band."""
    frequency = np.linspace(0, RATE / 2, WINDOW // 2 + 1)
    edges = _hertz(np.linspace(0, _mel(RATE / 2), BANDS + 2))
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    rising = (frequency[:, None] - low) / (centre - low)
    falling = (high - frequency[:, None]) / (high - centre)
    return np.maximum(np.minimum(rising, falling), 0) * 2 / (high - low)


def _mel(hertz: float) -> float:
    """Returns the place on the mel scale of a frequency of at least 1000 Hz."""
    return BEND / LINEAR + np.log(hertz / BEND) / STEP


def _hertz(mel: np.ndarray) -> np.ndarray:
    bend = BEND / LINEAR
    return np.where(mel < bend, LINEAR * mel, BEND * np.exp(STEP * (np.maximum(mel, bend) - bend)))
