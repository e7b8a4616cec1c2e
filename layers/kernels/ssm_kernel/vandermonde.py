"""The kernel of a diagonal system, K_l = sum_n w_n a_bar_n^l, as one matrix product per channel.

With l = j m + i the power splits, a_bar^l = (a_bar^m)^j a_bar^i, so the sum over n is a product of a matrix of about sqrt(l)
rows by one of about sqrt(l) columns: n sqrt(l) exponentials, n l multiply-adds on matrix units, and no array larger than
n sqrt(l) besides the kernel. Only real numbers are multiplied: Re(X Y) = [Re X, -Im X] [Re Y; Im Y]. Bytes moved per
channel: about 32 n sqrt(l) for the two factors and 4 l for the kernel.
"""

import math

import jax
import jax.numpy as jnp

from layers.kernels.sizes import known
from layers.kernels.ssm_kernel import discretize, phase

# DSS adds this to |x|^2 in 1 / x = conj(x) / |x|^2.
SOFTMAX_EPSILON = 1e-7
# The least |1 + z|^2 of the bilinear rule, so that a mode that vanishes after one step has a logarithm.
TINY = 1e-30


def diagonal_kernel(a, b, c, dt, length, discretization, conjugate_pairs):
    """Returns the kernel (k, d, length) of a (1|d, n), b the same or None, c (k, d, n) and dt (d)."""
    weights = c if b is None else c * b[None]
    if discretization == "softmax":
        kernel = _softmax_kernel(a, weights, dt, length)
    else:
        rule = {"zoh": discretize.zoh, "bilinear": discretize.bilinear}[discretization]
        weights = weights * rule(a, dt[:, None])[1][None]
        kernel = _sum_of_powers(weights, _log_step(a, dt, discretization), length)
    return 2 * kernel if conjugate_pairs else kernel


def _log_step(a, dt, discretization):
    """The logarithm of a_bar: rate (d, n) and, unless a_bar is real and positive, the parts of the angle per step."""
    real, step = a.real, dt[:, None]
    if discretization == "zoh":
        angle = phase.split_product(*jnp.broadcast_arrays(a.imag, step)) if jnp.iscomplexobj(a) else None
        return real * step, angle
    # a_bar = (1 + z) / (1 - z) with z = a dt / 2. Its size comes from |1 + z|^2 = |1 - z|^2 + 4 Re z, whichever side is not
    # lost to rounding, and its angle from (1 + z) (1 - conj z).
    z_real, z_imag = real * step / 2, a.imag * step / 2
    numerator, denominator = ((1 + z_real) ** 2 + z_imag**2, (1 - z_real) ** 2 + z_imag**2)
    ratio, gone = 4 * z_real / denominator, numerator < TINY
    log_ratio = jnp.log(jnp.maximum(numerator, TINY) / denominator)
    rate = jnp.where(jnp.abs(ratio) < 0.5, jnp.log1p(jnp.maximum(ratio, -0.5)), log_ratio) / 2
    angle = jnp.arctan2(jnp.where(gone, 0, 2 * z_imag), jnp.where(gone, 1, 1 - z_real**2 - z_imag**2))
    return rate, phase.split(angle)


def _powers(log_step, steps):
    """Real and imaginary part of a_bar^steps, (d, n, steps); the imaginary part is None if it is zero."""
    rate, angle = log_step
    steps = steps.astype(rate.dtype)[None, None]
    magnitude = jnp.exp(rate[..., None] * steps)
    if angle is None:
        return magnitude, None
    cos, sin = phase.turn(tuple(part[..., None] for part in angle), steps)
    return magnitude * cos, magnitude * sin


def _sum_of_powers(weights, log_step, length):
    """Re sum_n weights_n a_bar_n^l for l < length, (k, d, length)."""
    shape = weights.shape[:2]
    outputs = max(1, shape[0]) if known(shape[0]) else 1
    block = 1 << math.ceil(math.log2(length * outputs) / 2)
    block = min(block, 1 << (length - 1).bit_length())
    rows = _powers(log_step, block * jnp.arange(-(-length // block)))
    columns = _powers(log_step, jnp.arange(block))
    rows = _times(weights, rows)
    if rows[1] is None or columns[1] is None:
        rows, columns = rows[0], columns[0]
    else:
        rows = jnp.concatenate([rows[0], -rows[1]], axis=2)
        columns = jnp.concatenate(columns, axis=1)
    kernel = jnp.einsum("kdnj,dni->kdji", rows, columns, precision=jax.lax.Precision.HIGHEST)
    return kernel.reshape(*shape, -1)[..., :length]


def _times(weights, powers):
    """Real and imaginary part of weights (k, d, n) times powers (d, n, j)."""
    w_real, w_imag = weights.real[..., None], weights.imag[..., None]
    real, imag = (None if part is None else part[None] for part in powers)
    if not jnp.iscomplexobj(weights):
        return w_real * real, None if imag is None else w_real * imag
    if imag is None:
        return w_real * real, w_imag * real
    return w_real * real - w_imag * imag, w_real * imag + w_imag * real


def _softmax_kernel(a, weights, dt, length):
    """Re sum_n weights_n / a_n softmax_l(a_n dt l); growing modes run backwards in time, as decaying modes."""
    rate, angle = _log_step(a, dt, "zoh")
    growing = rate > 0
    sign = jnp.where(growing, -1.0, 1.0).astype(rate.dtype)
    log_step = sign * rate, None if angle is None else tuple(sign * part for part in angle)
    sum_times_a = _expm1(log_step, length) * a
    normaliser = sum_times_a.conj() / (jnp.abs(sum_times_a) ** 2 + SOFTMAX_EPSILON)
    weights = weights * (_expm1(log_step, 1) * normaliser)[None]
    both = jnp.concatenate([jnp.where(growing[None], 0, weights), jnp.where(growing[None], weights, 0)])
    forwards, backwards = jnp.split(_sum_of_powers(both, log_step, length), 2)
    return forwards + backwards[..., ::-1]


def _expm1(log_step, steps):
    """a_bar^steps - 1, (d, n)."""
    rate, angle = log_step
    if angle is None:
        return jnp.expm1(steps * rate)
    cos, sin = phase.turn(angle, jnp.full((1, 1), steps / 2, rate.dtype))
    shrink, decay = jnp.expm1(steps * rate), jnp.exp(steps * rate)
    return jax.lax.complex(shrink * (1 - 2 * sin**2) - 2 * sin**2, 2 * decay * sin * cos)
