"""Attention whose weights are products of positive features, causal or over the whole segment."""

import jax.numpy as jnp

from layers.kernels.gated_linear_attention import SMALLEST_DENOMINATOR, gated_linear_attention
from layers.segments import SegmentIds, Segments
from layers.typing import Array, Float


def feature_attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    memory: Float[Array, "b h k w"] | None,
    *,
    causal: bool,
    segment_ids: SegmentIds,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k w"] | None]:
    """Returns o_i = sum_j (q_i . k_j) v_j / sum_j (q_i . k_j) for features q, k >= 0.

    The sums run over j <= i if `causal`, or else over all j of the segment. Denominators below 1e-6 are replaced by 1e-6.

    Args:
      q, k, v: features of queries and keys, and values.
      memory: initial memory, float32, or None for zeros; None if not `causal`. Its last column is the sum of keys of the
        denominator.
      causal: whether sums run over j <= i only.
      segment_ids: see `layers.kernels.segments`.

    Returns:
      o, and the memory after the last token, None if not `causal`.
    """
    if causal:
        return gated_linear_attention(q, k, v, initial_state=memory, segment_ids=segment_ids, normalize=True)
    wide = jnp.concatenate([v.astype(jnp.float32), jnp.ones((*v.shape[:3], 1), jnp.float32)], axis=-1)
    if segment_ids is None:
        total = jnp.einsum("bthk,bthv->bhkv", k, wide, preferred_element_type=jnp.float32)
        sums = jnp.einsum("bthk,bhkv->bthv", q.astype(jnp.float32), total)
    else:
        sums = _both_directions(q, k, wide, Segments.of(segment_ids))
    o = sums[..., :-1] / jnp.maximum(sums[..., -1:], SMALLEST_DENOMINATOR)
    return o.astype(v.dtype), None


def _both_directions(q, k, v, segments):
    """Returns the sum over earlier tokens, the token itself included, and over later ones, within the segment."""

    def flip(x):
        return jnp.flip(x, axis=1)

    before, _ = gated_linear_attention(q, k, v, scale=1.0, segment_ids=segments)
    # A bonus of zero leaves out the token itself, which the first pass counts.
    nothing = jnp.zeros((q.shape[2], q.shape[3]), jnp.float32)
    flipped = Segments.of(flip(segments.ids), packed=segments.packed)
    after, _ = gated_linear_attention(
        flip(q), flip(k), flip(v), scale=1.0, bonus=nothing, segment_ids=flipped
    )
    return before + flip(after)
