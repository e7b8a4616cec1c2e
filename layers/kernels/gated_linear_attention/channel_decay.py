"""Scores and decays inside a chunk, with a log-decay per key channel.

The score of i against j is sum_k q_ik k_jk exp(g_{j+1,k} + ... + g_ik). It is a matrix product only if the exponential
is split at a point between j and i, where both factors are at most 1. A chunk is therefore cut into leaves of 16 steps.
Inside a leaf the sum over channels is written out. Neighbouring blocks of 1, 2, 4, ... leaves are then joined. The border
between two blocks is the point at which queries of the second and keys of the first split, so each join is one batched
product. Sums of g restart at the points of reference, so strong decay elsewhere costs no accuracy.

Arrays are cut into chunks (n): q, k, g (n, b or 1, h, c, k).
"""

import functools

import jax
import jax.numpy as jnp

from layers.kernels.gated_linear_attention.scalar_decay import exact_parts
from layers.kernels.mixed_precision import product
from layers.kernels.promotion import promoting


def within_chunks(q, k, g, bonus, same, scale, dtype, leaf):
    """Returns the weights of the chunk's values, and the decays from its start and to its end.

    Returns:
      weights: scale sum_k q_ik k_jk exp(sum of g_k over j + 1 .. i, or i - 1 with a bonus), (n, b, h, 1, c, c).
      exponents: sums of g from the start of the chunk to each step (without it, with a bonus), after it, both
        (n, b or 1, h, c, k), and of all, (n, b or 1, h, k).
    """
    exclusive = bonus is not None
    *lead, size, width = q.shape
    read, rest, totals = _leaf_sums(g, leaf, exclusive)
    leaves = totals.shape[-2]
    cut = (*lead, leaves, leaf, width)
    q, k = (scale * q).reshape(cut), k.reshape(cut)
    weights = _leaf_scores((exclusive, dtype), q, k, g.reshape(*g.shape[:-2], leaves, leaf, width))
    if bonus is not None:
        here = jnp.sum(q * k * bonus[None, None, :, None, None], axis=-1)
        diagonal = jnp.broadcast_to(jnp.eye(leaf, dtype=bool), weights.shape)
        weights = jnp.where(diagonal, here[..., None], weights)
    weights = weights.astype(dtype)
    # The barrier keeps the compiler from computing the leaves inside the concatenations below.
    weights = jax.lax.optimization_barrier(weights)
    block = 1
    while block < leaves:
        pairs = (leaves // (2 * block), 2, block, leaf, width)
        upto = (read + _neighbours(totals, block, earlier=True)[..., None, :]).reshape(*g.shape[:-2], *pairs)
        after = (rest + _neighbours(totals, block, earlier=False)[..., None, :]).reshape(
            *g.shape[:-2], *pairs
        )
        side = block * leaf
        second = q.reshape(*lead, *pairs)[..., 1, :, :, :] * jnp.exp(upto[..., 1, :, :, :])
        first = k.reshape(*lead, *pairs)[..., 0, :, :, :] * jnp.exp(after[..., 0, :, :, :])
        second, first = (x.reshape(*lead, leaves // (2 * block), side, width) for x in (second, first))
        joined = product("...ik,...jk->...ij", second, first, dtype).astype(dtype)
        weights = weights.reshape(*lead, leaves // (2 * block), 2, side, side)
        upper = jnp.concatenate([weights[..., 0, :, :], jnp.zeros_like(joined)], axis=-1)
        lower = jnp.concatenate([joined, weights[..., 1, :, :]], axis=-1)
        weights = jnp.concatenate([upper, lower], axis=-2)
        block *= 2
    weights = weights.reshape(*lead, 1, size, size)
    if same is not None:
        weights = jnp.where(jnp.broadcast_to(same, weights.shape), weights, 0)
    before = read + _neighbours(totals, leaves, earlier=True)[..., None, :]
    after = rest + _neighbours(totals, leaves, earlier=False)[..., None, :]
    return weights, (before.reshape(g.shape), after.reshape(g.shape), totals.sum(-2))


def _leaf_sums(g, leaf, exclusive):
    """Sums of g inside each leaf up to a step (without the step if `exclusive`), after it, and over the whole leaf."""
    g = g.reshape(*g.shape[:-2], g.shape[-2] // leaf, leaf, g.shape[-1])
    upto = jnp.tril(jnp.ones((leaf, leaf), bool))
    # Each sum is computed separately: the gradient of a difference would subtract large numbers at early steps.
    return _masked_sum(jnp.tril(upto, -1) if exclusive else upto, g), _masked_sum(~upto, g), g.sum(-2)


def _neighbours(totals, block, *, earlier):
    """Sums over the leaves before (or after) each leaf in its block of leaves: (..., leaves, k)."""
    blocks = totals.reshape(*totals.shape[:-2], totals.shape[-2] // block, block, totals.shape[-1])
    below = jnp.tril(jnp.ones((block, block), bool), -1)
    return _masked_sum(below if earlier else below.T, blocks).reshape(totals.shape)


def _masked_sum(mask, x):
    """sum_j mask_ij x_j over the next-to-last axis, as a fused loop; exact where a matrix product may round."""
    terms = jnp.broadcast_to(x[..., None, :, :], (*x.shape[:-2], *mask.shape, x.shape[-1]))
    return jnp.where(jnp.broadcast_to(mask[..., None], terms.shape), terms, 0).sum(-2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _leaf_scores(settings, q, k, g):
    """sum_l q_il k_jl exp(sum of g_l over j + 1 .. i, or i - 1 if exclusive) for j < i (exclusive) or j <= i, else 0."""
    exclusive, _ = settings
    decay = _leaf_decay(settings, g, diagonal=not exclusive)
    return _sum_pairs(q[..., :, None, :] * k[..., None, :, :] * decay, -1)


def _sum_pairs(terms, axis):
    """The sum over an axis; NaN where a term is infinite.

    XLA's autotuner tries a Triton kernel for a fusion that ends in a plain sum. Its tile would hold all pairs of a leaf,
    which is slow to compile and to run. XLA does not try Triton for a sum and a maximum that are taken together.
    """
    lowest = jnp.full((), -jnp.inf, terms.dtype)

    def step(left, right):
        return left[0] + right[0], jnp.maximum(left[1], right[1])

    total, largest = jax.lax.reduce(
        (terms, terms), (jnp.zeros_like(lowest), lowest), step, (terms.ndim + axis,)
    )
    return jnp.where(largest < jnp.inf, total, jnp.nan)


def _leaf_decay(settings, g, *, diagonal=False, keys_first=False):
    """The decay from every key to every later query, and to the query of its own step with `diagonal`; else 0.

    The shape is (..., s, s, k): queries before keys, or keys before queries with `keys_first`.
    """
    exclusive, dtype = settings
    upto = jnp.tril(jnp.ones((g.shape[-2],) * 2, bool))
    query, key = (-3, -2) if keys_first else (-2, -3)
    difference = 0
    for part in exact_parts(g, dtype):
        within = _masked_sum(upto, part)
        read = _masked_sum(jnp.tril(upto, -1), part) if exclusive else within
        difference += jnp.expand_dims(read, query) - jnp.expand_dims(within, key)
    pairs = upto if diagonal else jnp.tril(upto, -1)
    pairs = jnp.broadcast_to((pairs.T if keys_first else pairs)[..., None], difference.shape)
    return jnp.where(pairs, jnp.exp(jnp.where(pairs, jnp.minimum(difference, 0), 0)), 0)


def _leaf_forward(settings, q, k, g):
    return _leaf_scores(settings, q, k, g), (q, k, g)


def _leaf_backward(settings, residuals, cotangent):
    # The barriers keep the compiler from holding the decays of all pairs in memory for several sums. Both sums run over
    # the third axis from the end, which is the fast one on a GPU.
    q, k, g, cotangent = jax.lax.optimization_barrier((*residuals, cotangent))
    decay = _leaf_decay(settings, g, keys_first=True)
    dq = _sum_pairs(cotangent.swapaxes(-1, -2)[..., None] * k[..., :, None, :] * decay, -3)
    q, k, g, cotangent, dq = jax.lax.optimization_barrier((q, k, g, cotangent, dq))
    dk = _sum_pairs(cotangent[..., None] * q[..., :, None, :] * _leaf_decay(settings, g), -3)
    exclusive, _ = settings
    later = jnp.triu(jnp.ones((g.shape[-2],) * 2, bool))
    if exclusive:
        dg = _masked_sum(jnp.triu(later, 1), q * dq) - _masked_sum(later, k * dk)
    else:
        dg = _masked_sum(later, q * dq - k * dk)
        # The score of a step with itself has no decay. The sums above leave it out, since they would only round it.
        own = jnp.diagonal(cotangent, axis1=-2, axis2=-1)[..., None]
        dq, dk = dq + own * k, dk + own * q
    return dq, dk, _sum_to(dg, g.shape)


_leaf_scores.defvjp(promoting(_leaf_forward), promoting(_leaf_backward))


def _sum_to(x, shape):
    """Sums over the axes that have size 1 in `shape`."""
    return x.sum([i for i, size in enumerate(shape) if size != x.shape[i]], keepdims=True)
