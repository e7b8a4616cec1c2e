"""Timing of compiled functions side by side, and the ceilings of the device that floors are computed from."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

MIN_SECONDS = 0.01  # default length of a measurement; shorter calls are repeated within it


class Timing(NamedTuple):
    """Milliseconds per call: median and quartiles."""

    median: float
    low: float
    high: float


class Ceilings(NamedTuple):
    """Peak rates of the device: bytes per second through memory, and FLOPs per second of each unit."""

    bytes: float
    matrix: float
    vector: float


def peak_bytes(compiled: Any) -> int:
    """Returns the memory that a compiled function needs at once: arguments, results that do not overwrite them, and temporaries."""
    sizes = compiled.memory_analysis()
    results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return sizes.argument_size_in_bytes + results + sizes.temp_size_in_bytes


def interleaved(
    calls: Mapping[str, Callable[[], Any]], rounds: int, seconds: float = MIN_SECONDS
) -> dict[str, Timing]:
    """Returns timings of all calls, each measured once per round, so that changes of speed affect all alike.

    A call starts work and returns arrays; each measurement waits for them.

    Args:
      seconds: length of a measurement, which repeats shorter calls, at most 50 times. It includes the time in which the
        host starts the first of them.
    """
    repeats = {name: _repeats(call, seconds) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(rounds):
        first = turn % max(1, len(names))
        for name in names[first:] + names[:first]:
            samples[name].append(_seconds(calls[name], repeats[name]))
    return {name: _summary(values) for name, values in samples.items()}


def _repeats(call: Callable[[], Any], seconds: float) -> int:
    _seconds(call, 2)  # the first call is not representative
    return max(1, min(50, int(np.ceil(seconds / max(_seconds(call, 1), 1e-6)))))


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / repeats


def _summary(seconds: Sequence[float]) -> Timing:
    low, median, high = np.percentile(1e3 * np.asarray(seconds), (25, 50, 75))
    return Timing(float(median), float(low), float(high))


def ceilings(dtype: str) -> Ceilings:
    """Returns the ceilings measured by a copy, a matrix product of this dtype, and a polynomial in float32."""
    large = jax.default_backend() != "cpu"
    elements, size, degree = (2**28, 8192, 512) if large else (2**24, 1024, 128)
    x = jax.random.normal(jax.random.key(0), (elements,), jnp.float32)
    short = x[: elements // 16]
    square = jax.random.normal(jax.random.key(1), (size, size), jnp.dtype(dtype))

    def polynomial(x):
        y = x
        for power in range(degree):
            y = y * x + (1.0 + power)
        return y

    # A sign flip rather than a copy, which the compiler may eliminate.
    copy, product, power = jax.jit(jnp.negative), jax.jit(jnp.matmul), jax.jit(polynomial)
    timings = interleaved(
        {
            "copy": lambda: copy(x),
            "product": lambda: product(square, square),
            "polynomial": lambda: power(short),
        },
        rounds=5,
    )
    seconds = {name: timing.median / 1e3 for name, timing in timings.items()}
    return Ceilings(
        bytes=2 * 4 * elements / seconds["copy"],
        matrix=2 * size**3 / seconds["product"],
        vector=2 * degree * short.size / seconds["polynomial"],
    )
