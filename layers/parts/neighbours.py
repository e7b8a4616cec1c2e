"""Attention within a radius by blocks and their two neighbours, with a bias whose numbers grow with t alone."""

import jax.numpy as jnp

from layers.kernels.attention import Logits, Mask, Piece, Tokens, attention_with_lse
from layers.typing import Array, Float, Int, Num


def distances(radius: int) -> Int[Array, "q s"]:
    """Position of the key minus that of the query, for the queries of a block and the keys of it and its neighbours."""
    size = radius + 1
    return jnp.arange(3 * size, dtype=jnp.int32)[None] - size - jnp.arange(size, dtype=jnp.int32)[:, None]


def in_blocks(x: Num[Array, "b t *f"], size: int) -> Num[Array, "n size *f"]:
    """Returns x in blocks of `size` tokens, those of a row one after the other; zeros fill up the last."""
    x = jnp.pad(x, [(0, -x.shape[1] % size if axis == 1 else 0) for axis in range(x.ndim)])
    return x.reshape(x.shape[0] * (x.shape[1] // size), size, *x.shape[2:])


def near_attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    *,
    radius: int,
    bias: Float[Array, "n h q s"],
    lengths: Int[Array, "b"],
    first: int = 0,
    scale: float | None = None,
) -> Piece:
    """Returns attention of each token over those at a distance of at most `radius`.

    Args:
      bias: added to the logits, for the n blocks of `in_blocks(q, radius + 1)` and the keys of `distances`; n = 1 stands
        for all.
      lengths: keys from here on are not seen.
      first: keys before it are not seen.
    """
    (b, t), size = q.shape[:2], radius + 1
    count = -(-t // size)
    index = jnp.arange(t, dtype=jnp.int32)[None]
    real = ((index >= first) & (index < lengths[:, None])).astype(jnp.int32)

    def around(x):
        blocks = in_blocks(x, size).reshape(b, count, size, *x.shape[2:])
        blocks = jnp.pad(blocks, [(0, 0), (1, 1)] + [(0, 0)] * (blocks.ndim - 2))
        joined = jnp.concatenate([blocks[:, :-2], blocks[:, 1:-1], blocks[:, 2:]], axis=2)
        return joined.reshape(b * count, *joined.shape[2:])

    queries, keys, values, segments = in_blocks(q, size), around(k), around(v), around(real)
    piece = attention_with_lse(
        *(queries, keys, values),
        mask=Mask(window=radius),
        logits=Logits(bias=bias),
        segment_ids=jnp.ones(queries.shape[:2], jnp.int32),
        tokens=Tokens(
            kv_segment_ids=segments,
            q_positions=jnp.arange(size, 2 * size, dtype=jnp.int32)[None],
            kv_positions=jnp.arange(3 * size, dtype=jnp.int32)[None],
        ),
        scale=scale,
    )
    return Piece(*(x.reshape(b, count * size, *x.shape[2:])[:, :t] for x in piece))
