"""Parts shared by linear state space models: initial values, parameters, and the recurrence of diagonal modes."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers.kernels.linear_recurrence import linear_recurrence
from layers.parameters import Axes, Initializer, declared, parameter
from layers.parts.blocks import in_blocks
from layers.segments import SegmentIds, Segments, keep_where
from layers.typing import Array, Complex, Float, Num

# Chunk length; bounds the memory for intermediate states.
CHUNK = 64


def log_uniform(low: float, high: float) -> Initializer:
    """Initializer: logarithms of log-uniform numbers between low and high."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, np.log(low), np.log(high))


def check_steps(low: float, high: float) -> None:
    """Raises ValueError unless 0 < dt_min <= dt_max."""
    if not 0 < low <= high:
        raise ValueError(f"dt_min={low}, dt_max={high}; expected 0 < dt_min <= dt_max")


class SelectiveSizes:
    """Base class of configs of Mamba's selective state spaces, with `width`, `expand` and `dt_rank`."""

    @property
    def channels(self) -> int:
        """Number of channels of the state spaces."""
        return self.expand * self.width

    @property
    def rank(self) -> int:
        """Rank of the maps to step sizes."""
        return self.dt_rank or math.ceil(self.width / 16)


def check_systems(config: Any) -> None:
    """Raises ValueError unless width, state_size, systems and step sizes of a config fit."""
    if config.state_size < 2 or config.state_size % 2:
        raise ValueError(f"state_size={config.state_size}; expected an even number, for conjugate pairs")
    if config.width % config.systems:
        raise ValueError(f"systems={config.systems} does not divide width={config.width}")
    check_steps(config.dt_min, config.dt_max)


def complex_parameter(value: np.ndarray, *, group: str, axes: Axes) -> nnx.Param:
    """Returns a complex array as a float32 parameter with a leading axis for real and imaginary part."""
    pair = jnp.asarray(np.stack([np.real(value), np.imag(value)]), jnp.float32)
    return declared(pair, group=group, axes=(None, *axes))


def complex_normal(
    rngs: nnx.Rngs, shape: tuple[int, ...], *, variance: float = 1.0, group: str, axes: Axes
) -> nnx.Param:
    """Returns complex normal numbers as `complex_parameter` stores them; `variance` is that of both parts together."""
    normal = nnx.initializers.normal(np.sqrt(variance / 2))
    return parameter(rngs, normal, (2, *shape), group=group, axes=(None, *axes))


def as_complex(pair: nnx.Param) -> Complex[Array, "..."]:
    """Returns the complex array of a `complex_parameter`."""
    return jax.lax.complex(pair[0], pair[1])


class Modes(nnx.Module):
    """Eigenvalues A and inputs B of systems in conjugate pairs, assigned to the channels cyclically: (m, n) each.

    Real parts are stored as log(-Re A), so that they stay negative.
    """

    def __init__(self, a: np.ndarray, b: np.ndarray, systems: int):
        log_rate, frequency, b = (np.broadcast_to(v, (systems, len(a))) for v in (np.log(-a.real), a.imag, b))
        axes = (None, "state")
        self.log_rate = declared(jnp.asarray(log_rate, jnp.float32), group="ssm", axes=axes)
        self.frequency = declared(jnp.asarray(frequency, jnp.float32), group="ssm", axes=axes)
        self.b = complex_parameter(b, group="ssm/b", axes=axes)

    def __call__(self, width: int) -> tuple[Complex[Array, "#d n"], Complex[Array, "#d n"]]:
        """Returns A and B per channel."""
        a = jax.lax.complex(-jnp.exp(self.log_rate[...]), self.frequency[...])
        return to_channels(a, width), to_channels(as_complex(self.b), width)


def to_channels(v: Complex[Array, "m n"], width: int) -> Complex[Array, "#d n"]:
    """Returns set i modulo m for each channel i; a single set is returned unchanged."""
    return v if v.shape[0] == 1 else jnp.tile(v, (width // v.shape[0], 1))


def run_modes(
    a: Num[Array, "#d n"] | Callable[[Float[Array, "b t"]], tuple[Array, Array]],
    b: Num[Array, "#d n"] | None,
    c: Num[Array, "d n"],
    x: Float[Array, "b t d"],
    h: Complex[Array, "b d n"],
    *,
    segment_ids: SegmentIds = None,
) -> tuple[Float[Array, "b t d"], Complex[Array, "b d n"]]:
    """Returns y_t = Re sum_n c_n h_tn with h_t = a h_{t-1} + b x_t per channel, and the last state.

    Args:
      a: discretized eigenvalues; or, where `segment_ids` has intervals between tokens, a function from intervals (b, t) to a
        and b at each token, (b, t, d, n).
      b: discretized inputs; None beside a function.
      c: outputs; twice as large where a mode stands for a conjugate pair.
      x: input.
      h: the state of the segment of the first real token.
      segment_ids: see `layers.kernels.segments`.

    Returns:
      y in float32, and the last state.
    """
    rows, time, width = x.shape
    shape, size = (width, c.shape[-1]), width * c.shape[-1]
    if not callable(a):
        a, b = (jnp.broadcast_to(v, shape).astype(jnp.complex64) for v in (a, b))
    x, h = x.astype(jnp.float32), h.astype(jnp.complex64)

    def run(h, x, segments):
        decay, weight = a(segments.intervals) if callable(a) else (a[None, None], b[None, None])
        inputs = (x[..., None].astype(jnp.complex64) * weight).reshape(*x.shape[:2], size)
        states, h = linear_recurrence(
            decay.reshape(*decay.shape[:2], size),
            inputs,
            initial_state=h.reshape(rows, size),
            segment_ids=segments,
        )
        y = jnp.einsum("btdn,dn->btd", states.reshape(*x.shape[:2], *shape), c.astype(jnp.complex64)).real
        return h.reshape(rows, *shape), y

    segments = Segments.of(segment_ids)
    if time <= CHUNK:
        h, y = run(h, x, segments)
        return y, h
    if segments is None:
        # The last chunk is padded.
        segments = Segments.of(jnp.ones((rows, time), jnp.int32), padding="end", packed=False)

    def run_chunk(carried, chunk):
        (h, number), (x, numbers, *gaps) = carried, chunk
        if segments.packed:
            continues = (numbers == number[:, None]).any(1) | (numbers == 0).all(1)
            h, number = keep_where(continues, h, jnp.zeros_like(h)), jnp.maximum(number, numbers.max(1))
        gap = gaps[0] if gaps else None
        here = Segments.of(numbers, padding=segments.padding, packed=segments.packed, intervals=gap)
        h, y = run(h, x, here)
        return (h, number), y

    given = (x, segments.numbers, *([] if segments.intervals is None else [segments.intervals]))
    chunks = tuple(jnp.swapaxes(in_blocks(v, CHUNK), 0, 1) for v in given)
    (h, _), y = jax.lax.scan(run_chunk, (h, jnp.ones(rows, jnp.int32)), chunks)
    return jnp.swapaxes(y, 0, 1).reshape(rows, y.shape[0] * CHUNK, width)[:, :time], h
