"""Fourier transforms by matrix products inside kernels, of two rows at a time.

Rows a and b are one complex row a + ib. A transform of size n = n1 n2 is that of Monarch matrices (Fu et al. 2023, arXiv:2311.05908):
at frequency k + n1 l, for rows of n / 2 numbers with zeros after them,

    U[k, l] = sum_q exp(-2 pi i q l / n2) (exp(-2 pi i k q / n) sum_{p < n1/2} exp(-2 pi i k p / n1) u[n2 p + q]),

two products of matrices in float16 with sums in float32: 2 (n1 + 2 n2) multiplications per number of a row, and as many for the inverse.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from layers.kernels.pallas_triton import pl


class Plan(NamedTuple):
    """The transforms of a call.

    Attributes:
      outer, inner: n1 and n2.
      warps: number of warps per program; n1 is 16 per warp or a multiple.
      blocks: number of blocks of tokens.
      lags: number of blocks that outputs of a block see, for which some H_m is not 0.
    """

    outer: int
    inner: int
    warps: int
    blocks: int = 1
    lags: int = 1

    @property
    def block(self) -> int:
        """T, tokens per block."""
        return self.outer * self.inner // 2

    @property
    def tokens(self) -> int:
        """Tokens of all blocks."""
        return self.blocks * self.block

    @property
    def halves(self) -> tuple[int, int]:
        """The shape of a block of tokens."""
        return self.outer // 2, self.inner

    @property
    def whole(self) -> tuple[int, int]:
        """The shape of a spectrum."""
        return self.outer, self.inner


# n1, n2 and warps, by size: the fastest of each pass.
FORWARD = (64, 16, 4), (64, 32, 4), (64, 64, 4)
BACKWARD = (*FORWARD, (128, 64, 8))


def plan_of(time: int, taps: int, *, backward: bool = False) -> Plan:
    """Returns the smallest transform that holds all taps that count in one block, or else the largest."""
    taps = min(time, taps)
    plans = [Plan(*shape) for shape in (BACKWARD if backward else FORWARD)]
    plan = next((plan for plan in plans if taps <= plan.block), plans[-1])
    blocks = pl.cdiv(time, plan.block)
    return plan._replace(blocks=blocks, lags=min(blocks, pl.cdiv(taps - 1, plan.block) + 1))


@functools.cache
def tables(plan: Plan) -> dict[str, np.ndarray]:
    """The constant factors of the transforms, float16.

    Two rows are the halves of a tile (n1, n2), so that "enter" and "leave" are matrices (n1, n1) of real and imaginary parts side by
    side: two that give the parts of a spectrum, and two for the parts whose sum gives both rows.
    """

    def wave(rows, columns, period):
        angle = 2 * np.pi * (np.outer(np.arange(rows), np.arange(columns)) % period) / period
        return np.cos(angle), -np.sin(angle)

    outer, inner = plan.whole
    real, imag = wave(outer, outer // 2, outer)
    within = wave(inner, inner, inner)
    tables = {
        "enter": (np.hstack([real, -imag]), np.hstack([imag, real])),
        "leave": (np.hstack([real, -imag]).T, np.hstack([imag, real]).T),
        "within": (*within, -within[1]),
        "twiddles": wave(outer, inner, outer * inner),
    }
    return {name: np.stack(parts).astype(np.float16) for name, parts in tables.items()}


def spectra_of_taps(taps: jax.Array, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """Returns H_m, (d, lags, 2, n1, n2), float16, real and imaginary parts, and the powers of two (d,) that they carry.

    Args:
      taps: (d, l), float32, of which those of the first lags - 1 blocks and one more count.
    """
    width, block = taps.shape[0], plan.block
    ahead = jnp.pad(taps, ((0, 0), (block, plan.lags * block - taps.shape[1])))
    earlier, later = (v.reshape(width, plan.lags, block) for v in (ahead[:, :-block], ahead[:, block:]))
    half = jnp.fft.rfft(jnp.concatenate([later, earlier], axis=2))
    spectra = jnp.concatenate([half, jnp.flip(half[..., 1:-1], axis=2).conj()], axis=2)
    spectra = spectra.reshape(width, plan.lags, plan.inner, plan.outer).swapaxes(2, 3)
    parts = jnp.stack([spectra.real, spectra.imag], axis=2)
    scale = scale_to(jnp.abs(parts).max((1, 2, 3, 4)))
    return (parts * scale[:, None, None, None, None]).astype(jnp.float16), scale


def taps_of_spectra(parts: jax.Array, length: int, plan: Plan) -> jax.Array:
    """The transpose of the linear part of `spectra_of_taps`: (d, l), float32, from gradients (d, lags, 2, n1, n2)."""
    width, block = parts.shape[0], plan.block
    spectra = jax.lax.complex(parts[:, :, 0], parts[:, :, 1]).swapaxes(2, 3)
    spectra = spectra.reshape(width, plan.lags, 2 * block)
    # Of the signal, the real part counts, whose spectrum is the mean of D_f and conj(D_{n-f}).
    opposite = jnp.roll(jnp.flip(spectra, axis=2), 1, axis=2).conj()
    signals = jnp.fft.irfft((spectra + opposite)[..., : block + 1] / 2, 2 * block)
    later, earlier = signals[..., :block].reshape(width, -1), signals[..., block:].reshape(width, -1)
    return (later + jnp.pad(earlier[:, block:], ((0, 0), (0, block))))[:, :length]


def scale_to(peak: jax.Array) -> jax.Array:
    """The power of two that brings numbers of this size to between 1/16 and 1/8; 1/8 for zeros."""
    exponent = jnp.clip(jnp.frexp(peak)[1], -60, 60)
    return jnp.ldexp(jnp.float32(1 / 8), -exponent)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def halved(*parts: jax.Array) -> list[jax.Array]:
    """The parts of a spectrum in float16."""
    return [part.astype(jnp.float16) for part in parts]


def times(a: Any, b: Any) -> tuple[jax.Array, jax.Array]:
    """The product of complex numbers."""
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def conjugate_times(a: Any, b: Any) -> tuple[jax.Array, jax.Array]:
    """The product of complex numbers, the first of them conjugated."""
    return a[0] * b[0] + a[1] * b[1], a[0] * b[1] - a[1] * b[0]


def load_parts(x: Any, *index: Any) -> list[jax.Array]:
    """The real and the imaginary part of a spectrum, float32."""
    return [x[*index, part].astype(jnp.float32) for part in range(2)]


class Transforms(NamedTuple):
    """The factors of the transforms as in `tables`: matrices, and a ref of factors that do not stay in registers."""

    enter: list[jax.Array]
    leave: list[jax.Array]
    within: list[jax.Array]
    twiddles: Any

    @classmethod
    def load(cls, enter: Any, leave: Any, within: Any, twiddles: Any) -> "Transforms":
        """Loads the matrices."""
        return cls(*([ref[part] for part in range(ref.shape[0])] for ref in (enter, leave, within)), twiddles)

    def forward(self, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the spectrum (n1, n2) of a + ib, zeros following, from the halves a and b of a tile (n1, n2), float16."""
        half = [_product(part, rows) for part in self.enter]
        x, y = halved(*times(half, load_parts(self.twiddles)))
        real, imag, minus = self.within
        return _product(x, real) + _product(y, minus), _product(x, imag) + _product(y, real)

    def backward(self, spectrum: Any) -> jax.Array:
        """Returns n times the first half of the inverse transform of a spectrum, both rows as halves of a tile."""
        x, y = halved(*spectrum)
        real, imag, minus = self.within
        half = _product(x, real) + _product(y, imag), _product(x, minus) + _product(y, real)
        x, y = halved(*conjugate_times(load_parts(self.twiddles), half))
        first, second = self.leave
        return _product(first, x) + _product(second, y)
