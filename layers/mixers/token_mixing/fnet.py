"""FNet: Fourier transforms over time and features in place of attention (Lee-Thorp et al. 2021, arXiv:2105.03824)."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from layers.mixer import Mixer
from layers.options import ActivationDtype, checked_dataclass
from layers.parts.each_segment import is_within, mix_each_segment
from layers.segments import Segments
from layers.typing import Array, Complex, Float, Int


@checked_dataclass
class FNetConfig:
    """Options of `FNet`.

    Attributes:
      width: d, number of input and output features.
      orthonormal: whether outputs are divided by sqrt(t d), which keeps the norm of the inputs. The paper does not, and
        normalizes after the residual connection.
      dtype: dtype of the output; the transforms are computed in float32.
    """

    width: int
    orthonormal: bool = False
    dtype: ActivationDtype = jnp.float32


class FNet(Mixer):
    """FNet: real part of the Fourier transform over time and features (Lee-Thorp et al. 2021, arXiv:2105.03824).

        y_{k,j} = Re sum_{s<t} sum_{c<d} x_{s,c} exp(-2 pi i (k s / t + j c / d))

    with t the length of the sequence, or of its segment in packed or padded rows. Not causal, and without parameters.
    """

    patterns = ("noncausal_self",)
    causal = False

    def __init__(self, config: FNetConfig, *, rngs: nnx.Rngs):
        self.config = config

    def mix(
        self, x: Float[Array, "b t d"], carried: None, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], None]:
        if x.shape[1] == 0:
            return x.astype(self.config.dtype), None
        wide = x.astype(jnp.float32)
        orthonormal = self.config.orthonormal
        if segments is None:
            y = jnp.fft.fft2(wide, axes=(1, 2), norm="ortho" if orthonormal else "backward").real
        else:
            y = mix_each_segment(partial(_transform, orthonormal), (), wide, segment_ids=segments)
        return y.astype(self.config.dtype), None


def _transform(orthonormal, _, x, lengths):
    """Returns the transform of sequences by Bluestein's algorithm: k s = (k^2 + s^2 - (k - s)^2) / 2.

    X_k = c_k sum_s (x_s c_s) conj(c_{k-s}) with c_n = exp(-i pi n^2 / t), a convolution per row, computed by transforms
    of one length for all rows.
    """
    time = x.shape[1]
    size = 1 << (2 * time - 1).bit_length()
    chirp = jnp.where(is_within(lengths, time), _chirp(lengths, time), 0)
    kernel = jnp.zeros((x.shape[0], size), chirp.dtype).at[:, :time].set(chirp.conj())
    kernel = kernel.at[:, size - time + 1 :].set(chirp[:, :0:-1].conj())
    spectrum = jnp.fft.fft(x, axis=2) * chirp[..., None]
    spectrum = jnp.fft.fft(spectrum, size, axis=1) * jnp.fft.fft(kernel, axis=1)[..., None]
    y = (jnp.fft.ifft(spectrum, axis=1)[:, :time] * chirp[..., None]).real
    if orthonormal:
        y = y / jnp.sqrt((lengths * x.shape[2]).astype(y.dtype))[:, None, None]
    return y


def _chirp(lengths: Int[Array, "b"], time: int) -> Complex[Array, "b t"]:
    """Returns exp(-i pi n^2 / length) for n < time; the phase is reduced in integers, exactly below 2^20 tokens."""
    period = 2 * lengths.astype(jnp.uint32)[:, None]
    n = jnp.arange(time, dtype=jnp.uint32)[None]
    n = jnp.where(n < period // 2, n, 0)
    high = (n * (n >> 10)) % period
    square = (high * 1024 + n * (n & 1023)) % period
    angle = (-2 * jnp.pi) * (square.astype(jnp.float32) / period.astype(jnp.float32))
    return jax.lax.complex(jnp.cos(angle), jnp.sin(angle))
