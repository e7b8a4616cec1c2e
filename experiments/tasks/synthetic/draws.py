"""Random numbers for examples, by integer arithmetic: the same on every machine, Python and NumPy.

Each example has its own stream, which depends only on a key and the number of the example. Any example can therefore be
made without the earlier ones, and does not depend on the rest of its batch.
"""

import math
import zlib
from collections.abc import Iterable

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(x: np.ndarray) -> np.ndarray:
    """Returns the output function of SplitMix64 (Steele et al. 2014), a bijection of uint64 that scatters nearby numbers."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Draws:
    """The streams of some examples; each method returns one row per example."""

    def __init__(self, key: Iterable[int | str], examples: np.ndarray):
        """Creates streams at their start.

        Args:
          key: names and numbers that identify this set of streams.
          examples: numbers of the examples, int (b,).
        """
        start = np.zeros(1, np.uint64)
        for part in key:
            number = zlib.crc32(part.encode()) + 2**63 if isinstance(part, str) else part % 2**63
            start = mix(start + GOLDEN ^ mix(np.uint64([number]) + GOLDEN))
        self._starts = mix(mix(np.asarray(examples).astype(np.uint64) + GOLDEN) ^ start)
        self._used = 0

    def __len__(self) -> int:
        return len(self._starts)

    def child(self, number: int) -> "Draws":
        """Returns other streams of the same examples, at their start regardless of earlier draws."""
        child = Draws((), np.zeros(0, np.int64))
        child._starts = mix(self._starts ^ mix(np.uint64([number]) + GOLDEN))
        return child

    def bits(self, *shape: int) -> np.ndarray:
        """Returns uniform uint64 (b, *shape)."""
        count = math.prod(shape)
        counters = np.arange(self._used + 1, self._used + count + 1, dtype=np.uint64) * GOLDEN
        self._used += count
        return mix(self._starts[:, None] + counters).reshape(len(self), *shape)

    def uniform(self, *shape: int) -> np.ndarray:
        """Returns uniform float64 (b, *shape) in [0, 1)."""
        return (self.bits(*shape) >> np.uint64(11)) * 2.0**-53

    def normal(self, *shape: int) -> np.ndarray:
        """Returns standard normal float64 (b, *shape), by Box and Muller's transform; equal elsewhere but for rounding."""
        radius, angle = np.moveaxis(self.uniform(2, *shape), 1, 0)
        return np.sqrt(-2 * np.log1p(-radius)) * np.cos(2 * np.pi * angle)

    def integers(self, low: int, high: int | np.ndarray, *shape: int) -> np.ndarray:
        """Returns uniform int64 (b, *shape) from low to high - 1; `high` may be an array that broadcasts to the shape."""
        span = np.asarray(high - low).astype(np.uint64)
        return ((self.bits(*shape) >> np.uint64(32)) * span >> np.uint64(32)).astype(np.int64) + low

    def order(self, count: int, *shape: int) -> np.ndarray:
        """Returns random permutations of 0 .. count - 1: int64 (b, *shape, count)."""
        return np.argsort(self.bits(*shape, count), axis=-1, kind="stable")

    def distinct(self, population: int | np.ndarray, count: int, *shape: int) -> np.ndarray:
        """Returns `count` distinct integers below `population` in random order: int64 (b, *shape, count).

        Floyd's sampling: the j-th is drawn below population - count + j + 1, and replaced by that bound minus 1 if it
        was drawn before.
        """
        population = np.broadcast_to(population, (len(self), *shape))
        chosen = np.zeros((len(self), *shape, count), np.int64)
        for j in range(count):
            last = population - count + j
            drawn = self.integers(0, last + 1, *shape)
            repeated = np.any(chosen[..., :j] == drawn[..., None], axis=-1)
            chosen[..., j] = np.where(repeated, last, drawn)
        return np.take_along_axis(chosen, self.order(count, *shape), axis=-1)

    def weighted(self, weights: np.ndarray, count: int) -> np.ndarray:
        """Returns `count` distinct indices, drawn in sequence in proportion to `weights` (n,): int64 (b, count).

        Uses the race of n exponential clocks with these rates (Efraimidis and Spirakis 2006).
        """
        times = -np.log1p(-self.uniform(len(weights))) / weights
        return np.argsort(times, axis=-1, kind="stable")[:, :count]
