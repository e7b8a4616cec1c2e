"""Rotary positions, and their scalings to sequences longer than those of training."""

import math
from typing import Literal

import jax.numpy as jnp
import numpy as np

from layers.options import Fraction, Positive, checked_dataclass
from layers.positions.angles import cos_sin
from layers.typing import Array, Float, Int


@checked_dataclass
class Rotary:
    """Options of `rotary`.

    Attributes:
      base: base of the frequencies; the slowest pair turns once in about 2 pi base tokens.
      fraction: fraction of the features per head that are rotated, from the first on; the others carry no position.
      scaling: change of the frequencies for sequences `factor` times as long as those of training: "linear" divides all
        (Chen et al. 2023, arXiv:2306.15595), "ntk" raises the base to base * factor^(k/(k-2)), "yarn" divides only
        those that turn a few times within `length` (Peng et al. 2023, arXiv:2309.00071), "llama3" does so with another
        interpolation (Llama 3.1), and "longrope" divides each pair by its own of `divisors` (Ding et al. 2024,
        arXiv:2402.13753). "power" and "truncated" are Giraffe's bases (Pal et al. 2023, arXiv:2308.10882): "power" multiplies
        the i-th of n frequencies by (1 - i/n)^power; "truncated" makes those below 2 pi / length equal to 2 pi / (16 length),
        and those below an eighth of it zero.
      factor: ratio of the lengths, see `scaling`; at least 1, and 1 where the scaling has none.
      length: length of training sequences, for "yarn", "llama3" and "truncated".
      fast, slow: turns within `length`, for "yarn" and "llama3". Pairs that turn more than `fast` times keep their frequency,
        those that turn fewer than `slow` times have it divided, and those between are interpolated linearly: in their index
        for "yarn", in their number of turns for "llama3", whose bounds are 4 and 1 in its release.
      divisors: divisor of the frequency of each pair, for "longrope".
      power: exponent of "power".
      still: fraction of the pairs, the slowest ones, that are not turned, whatever the scaling. HoPE has 1/4 (Li et al. 2025,
        arXiv:2505.20444). On text its positions are these; its coordinates of video frames are not read here.
      rounded: whether "yarn" rounds the bounds of the pairs between; gpt-oss does not.
      amplitude: factor on rotated queries and keys, hence squared on logits. If None, 0.1 log(factor) + 1 for "yarn" and
        1 otherwise.
    """

    base: float = 10_000.0
    fraction: float = 1.0
    scaling: Literal["none", "linear", "ntk", "yarn", "llama3", "longrope", "power", "truncated"] = "none"
    factor: float = 1.0
    length: int | None = None
    fast: float = 32.0
    slow: float = 1.0
    divisors: tuple[float, ...] | None = None
    power: Positive | None = None
    still: Fraction = 0.0
    rounded: bool = True
    amplitude: float | None = None

    def __post_init__(self) -> None:
        if self.base <= 1:
            raise ValueError(f"base={self.base}; expected more than 1")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction={self.fraction}; expected 0 < fraction <= 1")
        if self.factor < 1 or (self.factor > 1 and self.scaling in ("none", "power", "truncated")):
            raise ValueError(
                f"factor={self.factor} with scaling={self.scaling!r}; expected at least 1, and 1 without scaling and with "
                "power and truncated"
            )
        if (self.length is None) == (self.scaling in ("yarn", "llama3", "truncated")):
            raise ValueError(
                f"length={self.length} with scaling={self.scaling!r}; yarn needs the length trained on, and so do "
                "llama3 and truncated; others take none"
            )
        if (self.power is None) == (self.scaling == "power"):
            raise ValueError(
                f"power={self.power} with scaling={self.scaling!r}; power needs an exponent, others take none"
            )
        if (self.divisors is None) == (self.scaling == "longrope"):
            raise ValueError(
                f"divisors={self.divisors} with scaling={self.scaling!r}; longrope needs one per pair, others take none"
            )
        if self.divisors is not None and not all(divisor > 0 for divisor in self.divisors):
            raise ValueError(f"divisors={self.divisors}; expected numbers above 0")
        if not self.rounded and self.scaling != "yarn":
            raise ValueError(f"rounded=False with scaling={self.scaling!r}; only yarn has bounds to round")
        if self.fast <= self.slow:
            raise ValueError(f"fast={self.fast} and slow={self.slow}; expected fast > slow")

    def size(self, features: int) -> int:
        """Returns the number of features per head that are rotated.

        Raises:
          ValueError: not an even, positive number.
        """
        size = int(features * self.fraction)
        if size % 2 or size == 0:
            raise ValueError(
                f"rotary positions need an even head size, got {size} ({self.fraction} of {features})"
            )
        if self.divisors is not None and len(self.divisors) != size // 2:
            raise ValueError(f"divisors has {len(self.divisors)} numbers; expected {size // 2}, one per pair")
        return size

    @property
    def gain(self) -> float:
        """The amplitude, or its default."""
        if self.amplitude is not None:
            return self.amplitude
        return 0.1 * math.log(self.factor) + 1 if self.scaling == "yarn" else 1.0


def rotary_frequencies(size: int, rope: Rotary) -> np.ndarray:
    """Returns the angle per token of each of the size/2 pairs, float64."""
    turned = size // 2 - int(rope.still * (size // 2))
    return np.where(np.arange(size // 2) < turned, _scaled(size, rope), 0)


def _scaled(size, rope):
    """Returns the frequencies as `scaling` changes them."""
    exponent = np.arange(0, size, 2) / size
    base = rope.base
    if rope.scaling == "ntk":
        if size == 2:
            raise ValueError("scaling='ntk' needs at least two pairs of features to turn, got one")
        base *= rope.factor ** (size / (size - 2))
    frequency = base**-exponent
    if rope.scaling == "linear":
        return frequency / rope.factor
    if rope.scaling == "longrope":
        return frequency / np.asarray(rope.divisors)
    if rope.scaling == "power":
        return frequency * (1 - np.arange(size // 2) / (size // 2)) ** rope.power
    if rope.scaling == "truncated":
        once = 2 * math.pi / rope.length
        return np.where(frequency < once / 8, 0, np.where(frequency < once, once / 16, frequency))
    if rope.scaling == "llama3":
        turns = rope.length * frequency / (2 * math.pi)
        kept = np.clip((turns - rope.slow) / (rope.fast - rope.slow), 0, 1)
        return frequency * kept + frequency / rope.factor * (1 - kept)
    if rope.scaling != "yarn":
        return frequency

    def pair_that_turns(times: float) -> float:
        return size * math.log(rope.length / (2 * math.pi * times)) / (2 * math.log(rope.base))

    low, high = pair_that_turns(rope.fast), pair_that_turns(rope.slow)
    if rope.rounded:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    # At least one pair lies between, as in the authors' code.
    divided = np.clip((np.arange(size // 2) - low) / max(high - low, 1e-3), 0, 1)
    return frequency * (1 - divided) + frequency / rope.factor * divided


def rotary(
    x: Float[Array, "b t h k"], positions: Int[Array, "#b t"], rope: Rotary | float = 10_000.0
) -> Float[Array, "b t h k"]:
    """Returns x with each pair (x_i, x_{i + k/2}) rotated by position * base^(-2i/k).

    This is RoPE (Su et al. 2021, arXiv:2104.09864).

    Args:
      x: queries or keys; the number of rotated features is even.
      positions: positions of the tokens, from 0; an axis of size 1 stands for all rows.
      rope: options; a number is the base of plain RoPE.

    Raises:
      ValueError: the number of rotated features is odd.
    """
    rope = rope if isinstance(rope, Rotary) else Rotary(base=rope)
    size = rope.size(x.shape[-1])
    cos, sin = (rope.gain * part[:, :, None] for part in cos_sin(positions, rotary_frequencies(size, rope)))
    first, second = jnp.split(x[..., :size].astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    turned = turned.astype(x.dtype)
    return turned if size == x.shape[-1] else jnp.concatenate([turned, x[..., size:]], axis=-1)
