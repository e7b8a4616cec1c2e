"""Scores and decays inside a chunk, with one log-decay per head and step.

Arrays are cut into chunks (n) and heads into groups that share queries and keys: q, k (n, b, g, c, k); log-decay
(n, b or 1, g or 1, r or 1, c), with r heads per group.
"""

import functools

import jax
import jax.numpy as jnp

from layers.kernels.mixed_precision import contract, product
from layers.kernels.promotion import joint_dtype, promoting


def within_chunks(q, k, g, bonus, same, scale, dtype):
    """Returns the weights of the chunk's values, and the decays from its start and to its end.

    Returns:
      weights: scale q_i k_j exp(sum of g over j + 1 .. i, or i - 1 with a bonus), (n, b, g, r, c, c).
      exponents: sums of g from the start of the chunk to each step (without it, with a bonus), after it, both of the
        shape of g, and of all, without the last axis.
    """
    exclusive = bonus is not None
    raw = product("nbgik,nbgjk->nbgij", q, k, dtype)[:, :, :, None]
    if same is not None:
        # Here and below: the products of one segment with another may be infinite, and so may their gradients.
        raw = jnp.where(jnp.broadcast_to(same, raw.shape), raw, 0)
    below = _below(q.shape[-2], -1)
    exponent = _differences(g, exclusive, dtype)
    exponent = jnp.where(jnp.broadcast_to(below, exponent.shape), exponent, 0)
    weights = raw * (scale * jnp.exp(exponent))
    seen = _below(q.shape[-2], -1 if exclusive else 0)
    seen = seen[None, None, None, None]
    weights = jnp.where(jnp.broadcast_to(seen if same is None else seen & same, weights.shape), weights, 0)
    if exclusive:
        here = scale * product("nbgck,grk->nbgrc", q * k, bonus, joint_dtype(dtype, jnp.float32))
        diagonal = jnp.broadcast_to(jnp.eye(q.shape[-2], dtype=bool), weights.shape)
        weights = jnp.where(diagonal, here[..., None], weights)
    before = contract("...j,ij->...i", g, _below(g.shape[-1], -1 if exclusive else 0).astype(g.dtype))
    # This sum is computed separately: the gradient of a difference would subtract large numbers at early steps.
    after = contract("...j,ji->...i", g, _below(g.shape[-1], -1).astype(g.dtype))
    return weights.astype(dtype), (before, after, g.sum(-1))


def exact_parts(g, dtype):
    """Splits g into parts whose cumulative sums may be subtracted: a rounded sum of g loses digits to everything before it.

    For products of float32 or wider operands (`dtype`), the first part is g in multiples of 1/256, whose sums over a chunk
    are exact, and the second is the small remainder.
    """
    if dtype == jnp.bfloat16:
        return (g,)
    coarse = jnp.round(g * 256) / 256
    return coarse, g - coarse


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _differences(g, exclusive, dtype):
    """Sums of g (..., c) over j + 1 .. i (`exclusive`: i - 1), (..., c, c), for j < i; at most 0."""
    difference = 0
    for part in exact_parts(g, dtype):
        upto, read = (
            contract("...j,ij->...i", part, _below(g.shape[-1], k).astype(g.dtype))
            for k in (0, -1 if exclusive else 0)
        )
        difference += read[..., :, None] - upto[..., None, :]
    return jnp.minimum(difference, 0)


def _differences_forward(g, exclusive, dtype):
    return _differences(g, exclusive, dtype), None


def _differences_backward(exclusive, dtype, _, cotangent):
    """The gradient of g: step t collects the cotangents of all pairs j < t <= i (`exclusive`: t < i)."""
    size = cotangent.shape[-1]
    reading, upto = (_below(size, k).astype(cotangent.dtype) for k in (-1 if exclusive else 0, 0))
    if dtype == jnp.bfloat16:
        # Subtracting two sums of one sign loses some digits, but no more than the operands of the products lost.
        rows = contract("...i,it->...t", cotangent.sum(-1), reading)
        return (rows - contract("...j,jt->...t", cotangent.sum(-2), upto),)
    earlier = contract("...ij,jt->...it", cotangent, 1 - upto)
    return ((earlier * jnp.broadcast_to(reading, earlier.shape)).sum(-2),)


_differences.defvjp(promoting(_differences_forward), promoting(_differences_backward))


def _below(size, k):
    return jnp.tril(jnp.ones((size, size), bool), k)
