"""What the kernels of `gated_linear_attention` do not take as it is, made of calls that they take, on one device.

Wide value heads are several heads that share queries and keys; see `head_parts`. Wide key heads are sums of calls:

    S_t^T q_t = sum over parts p of the keys of (S_t^p)^T q_t^p,    S_t^p = a_t S_{t-1}^p + k_t^p v_t^T.

Each call reads the values and writes outputs, which are rounded before they are added, in float32.

The sum of weights is the output for one more feature of the values. Where all values of a row are alike, its gradient and
those of the values all but cancel in those of queries and keys, which leaves no digits of bfloat16. Outputs are therefore
computed for values less their mean m over the row, which the division gives back, whatever m is:

    sum_j w_j v_j / sum_j w_j = (sum_j w_j (v_j - m) + m sum_j w_j) / sum_j w_j.

With a bonus a step reads the state before it. There
each step asks for the next one instead, with its query, so that strong decays are exact:

    o_t = scale (S_{t-1}^T q_t + (q_t^T Diag(u) k_t) v_t).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from layers.kernels import head_parts
from layers.kernels.gated_linear_attention.normalizer import divided, with_ones
from layers.kernels.segments import Segments, select_real

Run = Callable[..., tuple[jax.Array, jax.Array]]


def attend(
    run: Run,
    scale: float,
    smallest: float | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    state: jax.Array,
    g: jax.Array | None = None,
    bonus: jax.Array | None = None,
    segments: Segments | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns outputs (b, t, h, v) and the last state, as the public function does.

    Args:
      run: takes q, k, v, g, number and state with heads of at most `head_parts.WIDEST` features.
      scale: factor that `run` gives the outputs.
      smallest: the smallest denominator, or None to leave outputs as they are.
      state: (b, h, k, v), or with `smallest` (b, h, k, v + 1).
      g, bonus: log-decay (b or 1, t or 1, h or 1) and u (h, k), float32.
    """
    q, k, v = (select_real(x, segments) for x in (q, k, v))
    if smallest is not None:
        v, means = _centered(v, segments)
        v, means = select_real(with_ones(v), segments), _shared(means, state.shape[1])
        state = _shifted(state, -means.swapaxes(1, 2))
    if g is not None:
        g = select_real(jnp.broadcast_to(g, (*q.shape[:2], state.shape[1])), segments)
    if bonus is None:
        number = None if segments is None or not segments.packed else segments.numbers
        o, final = _in_parts(run, q, k, v, g, number, state)
    else:
        o, final = _before(run, scale, q, k, v, g, bonus, segments, state)
    if smallest is not None:
        o = divided(_shifted(o.astype(jnp.float32), means), smallest)
        final = _shifted(final, means.swapaxes(1, 2))
    return o, final


def _centered(v: jax.Array, segments: Segments | None) -> tuple[jax.Array, jax.Array]:
    """Returns values less about their means over the row, and these, (b, 1, h, v), float32.

    The means are multiples of 1/64 of the largest value's size, about. Subtracting a finer number would round all values in
    one direction, and an average of many values would show it.
    """
    wide = jax.lax.stop_gradient(v.astype(jnp.float32))
    count = v.shape[1] if segments is None else jnp.maximum(segments.real.sum(1), 1)[:, None, None, None]
    mean, square = (x.sum(1, keepdims=True) / count for x in (wide, wide * wide))
    unit = jnp.exp2(jnp.ceil(0.5 * jnp.log2(jnp.maximum(square, 2.0**-100))) - 6)
    mean = jnp.round(mean / unit) * unit
    return (v.astype(jnp.float32) - mean).astype(v.dtype), mean


def _shifted(sums: jax.Array, means: jax.Array) -> jax.Array:
    """Returns sums of weighted values, the last of which are the sums of weights, for values that are larger by `means`."""
    weights = sums[..., -1:]
    return jnp.concatenate([sums[..., :-1] + weights * means, weights], axis=-1)


def _in_parts(
    run: Run, q: Any, k: Any, v: Any, g: Any, number: Any, state: Any
) -> tuple[jax.Array, jax.Array]:
    """Runs heads of any size."""
    heads, width = state.shape[1], v.shape[3]
    parts = head_parts.value_parts(width)
    if parts.count > 1:
        v = head_parts.split(_shared(v, heads), parts)
        state = head_parts.split_state(state, parts)
        g = None if g is None else jnp.repeat(g, parts.count, axis=2)
    o, finals = None, []
    for part in head_parts.key_parts(q.shape[3]):
        if o is not None:
            # One after the other: the interpreter cannot run two kernels at once.
            o, q = jax.lax.optimization_barrier((o, q))
        added, final = run(q[..., part], k[..., part], v, g, number, state[:, :, part])
        o = added if o is None else o.astype(jnp.float32) + added.astype(jnp.float32)
        finals.append(final)
    final = finals[0] if len(finals) == 1 else jnp.concatenate(finals, axis=2)
    if parts.count > 1:
        o, final = head_parts.join(o, parts, width), head_parts.join_state(final, parts, width)
    return o, final


def _before(
    run: Run, scale: float, q: Any, k: Any, v: Any, g: Any, bonus: Any, segments: Any, state: Any
) -> tuple[jax.Array, jax.Array]:
    """Reads the state before each step and adds the bonus."""
    heads, number = state.shape[1], None
    if segments is not None and segments.packed:
        # Padding asks for the token after it, so it belongs to the segment before it.
        number = jnp.maximum(jax.lax.cummax(segments.numbers, axis=1), 1)
    shifted = jnp.pad(q[:, 1:], ((0, 0), (0, 1), (0, 0), (0, 0)))
    o, final = _in_parts(run, shifted, k, v, g, number, state)
    q, k, v = (_shared(x.astype(jnp.float32), heads) for x in (q, k, v))
    precision = jax.lax.Precision.HIGHEST
    first = scale * jnp.einsum("bhk,bhkv->bhv", q[:, 0], state, precision=precision)[:, None]
    o = jnp.concatenate([first, o[:, :-1].astype(jnp.float32)], axis=1)
    if segments is not None:
        o = jnp.where(segments.starts[..., None, None], 0, o)
    o += scale * (q * bonus[None, None] * k).sum(-1, keepdims=True) * v
    return select_real(o, segments), final


def _shared(x: jax.Array, heads: int) -> jax.Array:
    """Repeats each head of (b, t, h, d) for all heads that share it."""
    return x if x.shape[2] == heads else jnp.repeat(x, heads // x.shape[2], axis=2)
