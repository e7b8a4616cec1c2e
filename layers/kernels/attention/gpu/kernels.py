"""The Triton kernels of attention of one query per row and head: keys are cut into parts, whose results a second kernel joins.

A program of the first kernel takes a part of the keys of one row and one key/value head, with all query heads that share it, and
keeps the maximum m of their logits, the sum l of exp(a - m) and the output so far,

    m' = max(m, max_j a_j),   l' = exp(m - m') l + sum_j exp(a_j - m'),   o' = exp(m - m') o + sum_j exp(a_j - m') v_j,

as flash-decoding does (Dao et al. 2022, arXiv:2205.14135, with keys in parallel). The second kernel gives o, m and l over all
parts. Each key and value is read once, from the layout (b, s, g, k) of a cache, and no logits are in memory: bound by reading the
keys and values, b s g (k + v) elements.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layers.kernels.pallas_triton import launch, pl, pltriton

KEYS = 64  # per step of a program
PROGRAMS = 512  # parts are made until there are so many programs
FEWEST_ROWS = 16  # of a product
LOG2_E = math.log2(math.e)
ZERO = np.int32(0)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: jax.Array,
    scale: float,
    cap: float | None,
    dtype: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the output (b, 1, h, v) in `dtype`, and m and l (b, 1, h), float32.

    Args:
      q, k, v: as in `layers.kernels.attention.attention`, with one query.
      seen: (b, s) int8, 1 for the keys that the query sees.
      scale, cap: of the logits.
    """
    (b, _, h, _), (s, g), width = q.shape, k.shape[1:3], v.shape[3]
    splits = parts(b * g, s)
    size = -(-s // (splits * KEYS)) * KEYS
    f32 = jnp.float32
    found = launch(
        lambda **refs: _part(size, scale, cap, **refs),
        name="attention_part",
        grid=(splits, g, b),
        inputs=dict(q=q, k=k, v=v, seen=seen),
        outputs=dict(
            o=jax.ShapeDtypeStruct((b, h, splits, width), f32),
            top=jax.ShapeDtypeStruct((b, h, splits), f32),
            total=jax.ShapeDtypeStruct((b, h, splits), f32),
        ),
    )
    joined = launch(
        _join,
        name="attention_join",
        grid=(h, b),
        inputs=found,
        outputs=dict(
            output=jax.ShapeDtypeStruct((b, 1, h, width), dtype),
            highest=jax.ShapeDtypeStruct((b, 1, h), f32),
            weight=jax.ShapeDtypeStruct((b, 1, h), f32),
        ),
    )
    return joined["output"], joined["highest"], joined["weight"]


def parts(programs: int, keys: int) -> int:
    """Returns the number of parts of the keys, a power of two, of so many programs without parts."""
    wanted = min(-(-PROGRAMS // programs), -(-keys // KEYS))
    return pl.next_power_of_2(max(1, wanted))


def _part(size: int, scale: float, cap: float | None, *, q, k, v, seen, o, top, total) -> None:
    """One part of the keys of a row and a key/value head."""
    part, group, row = (pl.program_id(axis) for axis in range(3))
    keys, shared = k.shape[1], q.shape[2] // k.shape[2]
    rows = max(FEWEST_ROWS, pl.next_power_of_2(shared))
    head = jnp.arange(rows) < shared
    heads = pl.ds(group * shared, rows)
    features, q_in = _features(k.shape[3])
    values, v_in = _features(v.shape[3])
    queries = pltriton.load(q.at[row, ZERO, heads, features], mask=head[:, None] & q_in[None], other=0)

    def step(number: Any, carry: Any) -> Any:
        m, l, acc = carry
        first = part * size + number * KEYS
        here, inside = pl.ds(first, KEYS), first + jnp.arange(KEYS) < keys
        visible = pltriton.load(seen.at[row, here], mask=inside, other=0) != 0
        ks = pltriton.load(k.at[row, here, group, features], mask=inside[:, None] & q_in[None], other=0)
        # What a query does not see is selected away, whatever it is.
        vs = pltriton.load(v.at[row, here, group, values], mask=visible[:, None] & v_in[None], other=0)
        a = _product(queries, ks.T) * scale
        if cap is not None:
            a = cap * _tanh(a / cap)
        a = jnp.where(visible[None], a, -jnp.inf)
        new = jnp.maximum(m, a.max(1))
        finite = jnp.where(new == -jnp.inf, 0.0, new)
        p = jnp.exp2((a - finite[:, None]) * LOG2_E)
        rescale = jnp.exp2((m - finite) * LOG2_E)
        acc = rescale[:, None] * acc + _product(p.astype(vs.dtype), vs)
        return new, rescale * l + p.sum(1), acc

    start = (
        jnp.full(rows, -jnp.inf, jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.zeros((rows, v_in.shape[0]), jnp.float32),
    )
    m, l, acc = jax.lax.fori_loop(0, size // KEYS, step, start)
    pltriton.store(top.at[row, heads, part], m, mask=head)
    pltriton.store(total.at[row, heads, part], l, mask=head)
    pltriton.store(o.at[row, heads, part, values], acc, mask=head[:, None] & v_in[None])


def _join(*, o, top, total, output, highest, weight) -> None:
    """One head of a row."""
    head, row = pl.program_id(0), pl.program_id(1)
    values, v_in = _features(o.shape[3])
    m, l = top[row, head, :], total[row, head, :]
    m_all = m.max(0)
    weights = jnp.exp2((m - jnp.where(m_all == -jnp.inf, 0.0, m_all)) * LOG2_E)
    l_all = (weights * l).sum(0)
    parts_ = pltriton.load(
        o.at[row, head, pl.ds(ZERO, o.shape[2]), values],
        mask=jnp.broadcast_to(v_in[None], (o.shape[2], v_in.shape[0])),
        other=0,
    )
    joined = (weights[:, None] * parts_).sum(0) / jnp.where(l_all == 0, 1.0, l_all)
    pltriton.store(output.at[row, ZERO, head, values], joined.astype(output.dtype), mask=v_in)
    highest[row, ZERO, head] = m_all
    weight[row, ZERO, head] = l_all


def _features(size: int) -> tuple[Any, jax.Array]:
    """Returns a slice of as many features, filled up to a power of two, and which of them exist."""
    padded = max(16, pl.next_power_of_2(size))
    return pl.ds(ZERO, padded), jnp.arange(padded) < size


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _tanh(x: jax.Array) -> jax.Array:
    e = jnp.exp2(-2 * LOG2_E * jnp.abs(x))
    return jnp.sign(x) * (1 - e) / (1 + e)
