"""The S4 kernel from its generating function at the roots of unity: Cauchy sums and the Woodbury identity.

At w = exp(-2 pi i f / L) = exp(-2 i t) the bilinear rule is z = 2 (1 - w) / (1 + w) = 2 i tan(t). With C~ = C (I - A_bar^L)

    sum_{l<L} K_l w^l = 2 / (1 + w) (r_CB - r_CP (I + r_PP)^{-1} r_PB),    r_xy = dt sum_n x_n y_n / (z - dt a_n),

with the sum over both of each conjugate pair. Everything is multiplied by cos(t), so that nothing is infinite at w = -1:
2 / (1 + w) = exp(i t) / cos(t), and cos(t) / (z - dt a) = 1 / (-dt Re(a) cos(t) + i (2 sin(t) - dt Im(a) cos(t))).

Frequencies are processed CHUNK at a time, so that n x L numbers never exist at once; the backward pass recomputes them.
"""

import jax
import jax.numpy as jnp
import numpy as np

# Frequencies per step of the loop.
CHUNK = 256


def dplr_kernel(a, b, c, dt, p, length):
    """Returns the kernel (k, d, length) of a (1|d, n), b the same or None, c = C~ (k, d, n), dt (d) and p (1|d, n, r)."""
    count, channels, width = c.shape
    b = jnp.ones_like(a) if b is None else b
    by_rank = jnp.moveaxis(jnp.broadcast_to(p, (p.shape[0], width, p.shape[2])), 2, 0)
    full = (channels, width)
    left = jnp.concatenate([c, _spread(by_rank.conj(), full)])
    right = jnp.concatenate([_spread(b[None], full), _spread(by_rank, full)])
    weights = left[:, None] * right[None] * dt[None, None, :, None]
    system = (-dt[:, None] * a.real, dt[:, None] * a.imag, weights)

    @jax.checkpoint
    def at(frequencies):
        return _generating_function(*system, count, *frequencies)

    # Angles in float64 on the host: repeated products of w lose the phase of long kernels.
    bins = length // 2 + 1
    chunk = min(CHUNK, bins)
    f = np.arange(-(-bins // chunk) * chunk).reshape(-1, chunk)
    angle = np.where(f < bins, np.pi * f / length, 0.0)
    cosine = np.where(2 * f == length, 0.0, np.cos(angle))
    spectrum = jax.lax.map(at, (jnp.asarray(cosine, dt.dtype), jnp.asarray(np.sin(angle), dt.dtype)))
    spectrum = jnp.moveaxis(spectrum, 0, 2).reshape(count, channels, -1)[..., :bins]
    return jnp.fft.irfft(spectrum, length)


def _generating_function(decay, turn, weights, count, cos, sin):
    """The kernel's transform at the given frequencies, (k, d, frequencies)."""
    cos, sin = cos[None], sin[None]
    damping, centre = decay[..., None] * cos[None], turn[..., None] * cos[None]
    near = 1 / jax.lax.complex(damping, 2 * sin[None] - centre)
    far = 1 / jax.lax.complex(damping, 2 * sin[None] + centre)
    # v near + conj(v) far, over a pair.
    sums = _sums(weights.real, near + far) + _sums(weights.imag, 1j * (near - far))
    for i in range(weights.shape[1] - 1):
        column, row = sums[:, 1 + i : 2 + i], sums[count + i : count + i + 1]
        pivot = 1 + cos * sums[count + i, 1 + i]
        sums = sums - column * row * (cos / pivot)[None, None]
    return jax.lax.complex(cos, sin)[None] * sums[:count, 0]


def _sums(weights, terms):
    """Sums over n of real weights times complex terms, (rows, columns, d, frequencies)."""

    def contract(v):
        return jnp.einsum("lrdn,dnf->lrdf", weights, v, precision=jax.lax.Precision.HIGHEST)

    return jax.lax.complex(contract(terms.real), contract(terms.imag))


def _spread(v, shape):
    return jnp.broadcast_to(v, (v.shape[0], *shape))
