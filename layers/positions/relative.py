"""Biases of relative positions for the logits of attention: ALiBi's slopes, T5's buckets, FIRE's interpolation."""

import jax.numpy as jnp
import numpy as np

from layers.typing import Array, Float, Int


def alibi_slopes(heads: int) -> np.ndarray:
    """Returns ALiBi's slope per head, (h,) (Press et al. 2021, arXiv:2108.12409).

    For h a power of two, the slopes are 2^(-8/h), 2^(-16/h), ..., 2^-8. Otherwise they are those for the power of two p
    below h, then every second slope for 2 p, from the first on.
    """
    power = 1 << (heads.bit_length() - 1)
    slopes = 2.0 ** (-8 * np.arange(1, power + 1) / power)
    between = 2.0 ** (-8 * np.arange(1, 2 * power + 1, 2) / (2 * power))
    return np.concatenate([slopes, between])[:heads].astype(np.float32)


def relative_buckets(
    relative: Int[Array, "*s"], *, bidirectional: bool, buckets: int, max_distance: int
) -> Int[Array, "*s"]:
    """Returns T5's bucket of a relative position (Raffel et al. 2019, arXiv:1910.10683).

    The first half of the buckets hold one distance each; the others hold ranges that grow geometrically up to
    `max_distance`. The last one holds all larger distances.

    Args:
      relative: position of the key minus that of the query.
      bidirectional: whether keys after the query have their own buckets, the second half of `buckets`; otherwise they
        count as distance 0.
      buckets: total number of buckets over both directions.
      max_distance: distance from which on all positions share a bucket.
    """
    one_sided = buckets // 2 if bidirectional else buckets
    exact = one_sided // 2
    distance = jnp.abs(relative) if bidirectional else jnp.maximum(-relative, 0)
    # A table computed in float64 on the host: a float32 logarithm may miss a boundary by one.
    every = np.arange(max_distance + 1)
    growth = np.log(np.maximum(every, exact) / exact) / np.log(max_distance / exact)
    far = exact + np.floor(growth * (one_sided - exact) * (1 + 1e-12)).astype(np.int32)
    table = jnp.asarray(np.where(every < exact, every, np.minimum(far, one_sided - 1)), jnp.int32)
    bucket = table[jnp.minimum(distance, max_distance)]
    return bucket + jnp.where(relative > 0, one_sided, 0) if bidirectional else bucket


def fire_interpolation(
    q_positions: Int[Array, "b t"],
    kv_positions: Int[Array, "b s"],
    *,
    curvature: Float[Array, ""],
    threshold: Float[Array, ""],
    epsilon: float = 1e-6,
) -> Float[Array, "b t s"]:
    """Returns FIRE's input in [0, 1] for each query i and key j <= i (Li et al. 2023, arXiv:2310.04418).

        psi(i - j) / (psi(max(i, threshold)) + epsilon),  psi(x) = log(|curvature x| + 1)

    Keys after the query count as distance 0.
    """
    i, j = (x.astype(jnp.float32) for x in (q_positions[:, :, None], kv_positions[:, None]))

    def psi(x):
        return jnp.log1p(jnp.abs(curvature) * x)

    return psi(jnp.maximum(i - j, 0)) / (psi(jnp.maximum(i, threshold)) + epsilon)
