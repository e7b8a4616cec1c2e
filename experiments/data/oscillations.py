"""Damped oscillations observed at irregular times, from a seed: the source of pipelines."""

from typing import NamedTuple

import numpy as np

FREQUENCY = (0.5, 2.5)  # radians per unit of time, uniform
DAMPING = (0.0, 0.1)  # per unit of time, uniform
MEAN_GAP = (0.25, 1.0)  # of each signal, log-uniform; the gaps are exponential
NOISE = 0.05  # standard deviation of uniform noise
VERSION = 1


class Oscillations(NamedTuple):
    """Signals x(s) = exp(-damping s) cos(frequency s + phase) at times s_1 < s_2 < ..., with noise.

    Attributes:
      values: float32 (n, t).
      intervals: float32 (n, t); the times between observations, the first from s = 0.
      parameters: float32 (n, 2), frequency and damping, each of mean 0 and variance 1.
      gaps: what a batch holds of the intervals: "steps", as "intervals"; "feature", as a second input; "none".
    """

    values: np.ndarray
    intervals: np.ndarray
    parameters: np.ndarray
    gaps: str

    def __len__(self) -> int:
        return len(self.values)

    @property
    def lengths(self) -> np.ndarray:
        """Number of observations of each signal."""
        return np.full(len(self.values), self.values.shape[1])

    def gather(self, indices: np.ndarray, width: int) -> dict[str, np.ndarray]:
        """Returns the signals at `indices`: inputs (b, t, 1 or 2), labels (b, 2) and, if "steps", intervals (b, t), float32.

        Raises:
          ValueError: if `width` is not the number of observations.
        """
        if width != self.values.shape[1]:
            raise ValueError(f"signals of {self.values.shape[1]} values are not padded to {width}")
        values, intervals = self.values[indices], self.intervals[indices]
        parts = [values, intervals] if self.gaps == "feature" else [values]
        more = {"intervals": intervals} if self.gaps == "steps" else {}
        return {"inputs": np.stack(parts, axis=-1), "labels": self.parameters[indices]} | more


def generate(count: int, length: int, *, seed: int, split: str, gaps: str) -> Oscillations:
    """Returns the signals of a split; each depends on the seed, the split and its number alone."""
    entropy = [VERSION, seed, *split.encode()]
    draws = np.random.Philox(np.random.SeedSequence(entropy)).random_raw(count * (2 * length + 4))
    # 53 random bits each, as NumPy's own uniform numbers; never 0.
    uniform = ((draws >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    uniform = uniform.reshape(count, -1)
    frequency, damping, phase, mean_gap = uniform[:, :4].T
    rate = MEAN_GAP[0] * (MEAN_GAP[1] / MEAN_GAP[0]) ** mean_gap
    intervals = -np.log(uniform[:, 4 : 4 + length]) * rate[:, None]
    times = np.cumsum(intervals, axis=1)
    w, g = _between(FREQUENCY, frequency), _between(DAMPING, damping)
    clean = np.exp(-g[:, None] * times) * np.cos(w[:, None] * times + 2 * np.pi * phase[:, None])
    noise = np.sqrt(12) * (uniform[:, 4 + length :] - 0.5)
    parameters = np.sqrt(12) * (np.stack([frequency, damping], axis=1) - 0.5)
    return Oscillations(
        (clean + NOISE * noise).astype(np.float32),
        intervals.astype(np.float32),
        parameters.astype(np.float32),
        gaps,
    )


def _between(bounds: tuple[float, float], share: np.ndarray) -> np.ndarray:
    return bounds[0] + (bounds[1] - bounds[0]) * share
