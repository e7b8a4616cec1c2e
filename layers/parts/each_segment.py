"""Runs mixers that need a whole sequence at once on each segment separately.

What they compute depends on the length of the sequence and on positions in it, so each segment is moved to the start of
its row and mixed there alone: first the first segment of all rows, then the second, and so on. A batch without packing
costs one pass; a packed batch costs one pass per segment of the fullest row. If `Segments` states that padding is at the
ends, nothing is moved; if it states that no row is packed, there is no loop.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from layers.kernels.forward_mode import reverse_mode_only
from layers.parts.segmented_convolution import NO_FORWARD_MODE, Packing, pack_rows, take_tokens
from layers.segments import SegmentIds, Segments, select_real
from layers.typing import Array, Bool, Float, Int

Mix = Callable[[Any, Float[Array, "b t d"], Int[Array, "b"]], Float[Array, "b t f"]]


def mix_each_segment(
    mix: Mix,
    weights: Any,
    x: Float[Array, "b t d"],
    *,
    segment_ids: SegmentIds,
) -> Float[Array, "b t f"]:
    """Returns mix(weights, x, lengths) of each segment on its own.

    Args:
      mix: function of weights, sequences (b, t, d) that are zero from their lengths (b) on, and lengths, to outputs (b,
        t, f). Outputs from the lengths on are discarded. Lengths are at least 1: a row without such a segment is passed
        as one zero token. The function must not close over arrays; it reads only `weights`.
      weights: pytree of floating arrays.
      x: inputs; without segment_ids each row is one sequence.
      segment_ids: see `layers.kernels.segments`; the output at padding is zero.
    """
    segments = Segments.of(segment_ids)
    if segments is None or x.shape[1] == 0:
        return mix(weights, x, jnp.maximum(jnp.full(x.shape[:1], x.shape[1], jnp.int32), 1))
    if segments.padding == "end" and not segments.packed:
        y = mix(weights, select_real(x, segments), jnp.maximum(segments.real.sum(1, dtype=jnp.int32), 1))
    else:
        y = _loop(mix, *reverse_mode_only((weights, x), NO_FORWARD_MODE), pack_rows(segments))
    return select_real(y, segments)


def is_within(lengths: Int[Array, "b"], time: int) -> Bool[Array, "b t"]:
    """Returns whether each of `time` places holds a token of a sequence of that length."""
    return jnp.arange(time, dtype=lengths.dtype)[None] < lengths[:, None]


def reverse_segments(x: Float[Array, "b t *f"], segment_ids: SegmentIds = None) -> Float[Array, "b t *f"]:
    """Returns x with the tokens of each segment reversed in place; padding is not moved."""
    segments = Segments.of(segment_ids)
    if segments is None:
        return x[:, ::-1]
    if x.shape[1] == 0:
        return x
    packing = pack_rows(segments)
    numbers, place = packing.numbers, packing.place
    # Numbers increase over the tokens; padding comes last.
    ascending = jnp.where(numbers == 0, x.shape[1] + 1, numbers)
    first, beyond = (
        take_tokens(jax.vmap(partial(jnp.searchsorted, side=side))(ascending, numbers), place)
        for side in ("left", "right")
    )
    index = take_tokens(packing.order, jnp.clip(first + beyond - 1 - place, 0, x.shape[1] - 1))
    return take_tokens(x, jnp.where(segments.real, index, jnp.arange(x.shape[1], dtype=index.dtype)[None]))


def _one(mix: Mix, weights: Any, x: Array, packing: Packing, number: Int[Array, ""]) -> Array:
    """Returns the outputs of segment `number` of each row at its tokens, and zero elsewhere."""
    time = x.shape[1]
    own = packing.numbers == number
    start, length = jnp.argmax(own, axis=1)[:, None].astype(jnp.int32), own.sum(1, dtype=jnp.int32)
    there = jnp.clip(start + jnp.arange(time, dtype=jnp.int32)[None], 0, time - 1)
    sequence = take_tokens(packing.pack(x), there)
    y = mix(weights, jnp.where(is_within(length, time)[..., None], sequence, 0), jnp.maximum(length, 1))
    index = packing.place - start
    back = (index >= 0) & (index < length[:, None])
    return jnp.where(back[..., None], take_tokens(y, jnp.where(back, index, 0)), 0)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loop(mix, weights, x, packing):
    """Returns the sum over segments by a loop of data-dependent length; its transpose is a loop of the same length."""
    shape = jax.eval_shape(partial(_one, mix), weights, x, packing, 1)

    def add(number, y):
        return y + _one(mix, weights, x, packing, number)

    zeros = jnp.zeros(shape.shape, shape.dtype)
    return jax.lax.fori_loop(1, packing.numbers.max(initial=0) + 1, add, zeros)


def _forward(mix, weights, x, packing):
    return _loop(mix, weights, x, packing), (weights, x, packing)


def _backward(mix, arguments, dy):
    weights, x, packing = arguments

    def add(number, totals):
        _, pullback = jax.vjp(lambda weights, x: _one(mix, weights, x, packing, number), weights, x)
        return jax.tree.map(jnp.add, totals, pullback(dy))

    zeros = jax.tree.map(jnp.zeros_like, (weights, x))
    return *jax.lax.fori_loop(1, packing.numbers.max(initial=0) + 1, add, zeros), None


_loop.defvjp(_forward, _backward)
