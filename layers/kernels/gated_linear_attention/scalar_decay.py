"""Inside a chunk, with one log-decay per head and step: scores, and the decays from and to the chunk's ends.

Arrays are cut into chunks (n) and heads into groups that share queries and keys: q, k (n, b, g, c, k); log-decay
(n, b or 1, g or 1, r or 1, c), r heads a group.
"""

import jax
import jax.numpy as jnp

from layers.kernels.gated_linear_attention.products import contract, product


def exponents(g, exclusive):
    """Sums of g (..., c) from the start of the chunk to each step (`exclusive`: without it), after it, and of all."""
    size = g.shape[-1]
    before = contract("...j,ij->...i", g, _below(size, -1 if exclusive else 0).astype(g.dtype))
    # Summed anew: as a difference, its gradient at early steps would be one of large numbers.
    after = contract("...j,ji->...i", g, _below(size, -1).astype(g.dtype))
    return before, after, g.sum(-1)


def scores(q, k, g, bonus, same, scale, dtype):
    """Weights of the chunk's values: scale q_i k_j exp(sum of g over j + 1 .. i, or i - 1 with a bonus), (..., c, c)."""
    exclusive = bonus is not None
    raw = product("nbgik,nbgjk->nbgij", dtype, q, k)[:, :, :, None]
    below = _below(q.shape[-2], -1)
    exponent = _differences(g, exclusive, dtype)
    exponent = jnp.where(jnp.broadcast_to(below, exponent.shape), exponent, 0)
    weights = raw * (scale * jnp.exp(exponent))
    seen = _below(q.shape[-2], -1 if exclusive else 0)
    seen = seen[None, None, None, None]
    weights = jnp.where(jnp.broadcast_to(seen if same is None else seen & same, weights.shape), weights, 0)
    if exclusive:
        here = scale * product("nbgck,grk->nbgrc", jnp.promote_types(dtype, jnp.float32), q * k, bonus)
        diagonal = jnp.broadcast_to(jnp.eye(q.shape[-2], dtype=bool), weights.shape)
        weights = jnp.where(diagonal, here[..., None], weights)
    return weights.astype(dtype)


def exact_parts(g, dtype):
    """Splits g into parts whose cumulative sums may be subtracted: a sum of g, rounded, loses digits to all before it.

    For products of wide operands (`dtype`), the first part is g in multiples of 1/256, whose sums over a chunk are exact,
    and the second the rest, which is small. The second carries the gradient.
    """
    if dtype == jnp.bfloat16:
        return (g,)
    coarse = jax.lax.stop_gradient(jnp.round(g * 256) / 256)
    return coarse, g - coarse


def _differences(g, exclusive, dtype):
    """Sums of g (..., c) over j + 1 .. i (`exclusive`: i - 1), (..., c, c), for j < i."""
    difference = 0
    for part in exact_parts(g, dtype):
        upto, read = (
            contract("...j,ij->...i", part, _below(g.shape[-1], k).astype(g.dtype))
            for k in (0, -1 if exclusive else 0)
        )
        difference += read[..., :, None] - upto[..., None, :]
    # A sum of terms that are at most 0, but for rounding.
    return difference - jax.lax.stop_gradient(jnp.maximum(difference, 0))


def _below(size, k):
    return jnp.tril(jnp.ones((size, size), bool), k)
