"""One step of blocked attention: fetching its blocks, its logits, and what they may see.

Blocked arrays are (b, g, blocks, r, block, d) for queries and (b, g, blocks, block, d) for keys and values: g key/value
heads, r query heads per key/value head. If lists of key blocks differ by head, g = h and r = 1 for the queries. A step holds
R query blocks and, per query block, N keys; its logits are (b, g, R, r, block, N).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from layers.kernels.attention.options import Places
from layers.kernels.attention.schedule import Steps
from layers.kernels.promotion import joint_dtype


class Context(NamedTuple):
    """What the logits depend on besides queries and keys.

    Places are blocked, (b|1, 1, blocks, block), and so are the keys that these logits leave out, `aside`, (b|1, h|1, blocks,
    block), where those of the keys may differ by head too, and the bias, (b|1, h|1, blocks|1, block|1, blocks|1, block|1);
    the others are as given.
    """

    at: Places
    bias: jax.Array | None
    prefix_lengths: jax.Array | None
    block_indices: jax.Array | None
    slopes: jax.Array | None
    aside: jax.Array | None


class Rules(NamedTuple):
    """The options that are not arrays, and the precision of products."""

    causal: bool
    window: int | None
    dilation: int
    sink_tokens: int
    block_size: int | None
    list_size: int | None
    logit_cap: float | None
    scale: float
    precision: jax.lax.Precision | None
    uncertain: bool


def rows(x, step: Steps):
    """The query blocks of a step; axis 2 is blocks."""
    count = step.blocks.shape[2]
    return x if count == x.shape[2] else jax.lax.dynamic_slice_in_dim(x, step.row, count, axis=2)


def put_rows(x, step: Steps, new):
    """Returns `x` with the query blocks of a step replaced."""
    return new if new.shape == x.shape else jax.lax.dynamic_update_slice_in_dim(x, new, step.row, axis=2)


def columns(x, step: Steps):
    """The key blocks per query block, end to end: (b, g, blocks, block, ...) to (b, g, R, N, ...)."""
    if step.blocks.size == 1:
        return jax.lax.dynamic_slice_in_dim(x, step.blocks[0, 0, 0, 0], 1, axis=2)
    x = x.at[_where(x, step)].get(mode="promise_in_bounds")
    return x.reshape(*x.shape[:3], -1, *x.shape[5:])


def add_columns(x, step: Steps, new):
    """Returns `x` with `new` (b, g, R, N, ...) added at the key blocks of each query block."""
    if step.blocks.size == 1:
        old = columns(x, step)
        return jax.lax.dynamic_update_slice_in_dim(x, old + new, step.blocks[0, 0, 0, 0], axis=2)
    new = new.reshape(*new.shape[:3], step.blocks.shape[3], *x.shape[3:])
    return x.at[_where(x, step)].add(new, mode="promise_in_bounds")


def _where(x, step: Steps):
    """Indices of batch, head and block into (b|1, g|1, blocks, ...), broadcast over (b, g, R, columns)."""
    blocks = jnp.maximum(step.blocks, 0)
    heads = max(x.shape[1], blocks.shape[1])
    batch = jnp.arange(x.shape[0], dtype=jnp.int32).reshape(-1, 1, 1, 1)
    head = jnp.arange(heads, dtype=jnp.int32).reshape(1, -1, 1, 1) // (heads // x.shape[1])
    return batch, head, blocks


def by_head(x, groups):
    """(b, h|1, R, block, N) to (b, g|1, R, r|1, block, N)."""
    if x.shape[1] == 1:
        return x[:, :, :, None]
    return jnp.moveaxis(x.reshape(x.shape[0], groups, -1, *x.shape[2:]), 2, 3)


def bias_columns(bias, step: Steps):
    """The bias of a step, (b|1, h|1, R|1, block|1, N|1)."""
    if bias.shape[2] > 1:
        bias = rows(bias, step)
    bias = jnp.moveaxis(bias, 4, 2)
    if bias.shape[2] == 1:
        return bias[:, :, 0]
    if step.blocks.size == 1:
        return jax.lax.dynamic_index_in_dim(bias, step.blocks[0, 0, 0, 0], axis=2, keepdims=False)
    batch, head, blocks = _where(bias, step)
    row = jnp.arange(bias.shape[3], dtype=jnp.int32).reshape(1, 1, -1, 1)
    tile = jnp.moveaxis(bias.at[batch, head, blocks, row].get(mode="promise_in_bounds"), 3, 4)
    return tile.reshape(*tile.shape[:4], -1)


def distances(context: Context, step: Steps):
    """Positions of the queries minus those of the keys, (b|1, h|1, R, block, N)."""
    return (
        rows(context.at.q_positions, step)[..., None] - columns(context.at.kv_positions, step)[..., None, :]
    )


def visible(context: Context, step: Steps, rules: Rules):
    """Returns which keys of a step are seen, (b|1, h|1, R, block, N)."""
    at = context.at
    i, j = rows(at.q_positions, step)[..., None], columns(at.kv_positions, step)[..., None, :]
    seen = jnp.ones((1,) * 5, bool)
    if rules.window is not None:
        seen &= (i - j < rules.window) if rules.causal else (jnp.abs(i - j) <= rules.window)
    if rules.dilation > 1:
        seen &= (i - j) % rules.dilation == 0
    if step.listed is not None:
        seen &= jnp.repeat(step.listed, rules.block_size, axis=3)[..., None, :]
    elif context.block_indices is not None:
        seen &= _on_list(context.block_indices, rules, i, j)
    if rules.sink_tokens:
        seen |= j < rules.sink_tokens
    if rules.causal:
        seen &= j <= i
    if context.prefix_lengths is not None:
        prefix = context.prefix_lengths[:, None, None, None, None]
        seen |= (i < prefix) & (j < prefix)
    if context.aside is not None:
        seen &= ~columns(context.aside, step)[..., None, :]
    if at.q_segments is not None:
        segment = rows(at.q_segments, step)[..., None]
        seen &= (segment == columns(at.kv_segments, step)[..., None, :]) & (segment != 0)
    if step.blocks.size == 1:  # always a block
        return jnp.broadcast_to(seen, jnp.broadcast_shapes(seen.shape, (1, 1, 1, 1, j.shape[-1])))
    block = j.shape[-1] // step.blocks.shape[3]
    return seen & jnp.repeat(step.blocks >= 0, block, axis=3)[..., None, :]


def _on_list(lists, rules, i, j):
    """Whether the block of position j is on the list of that of i; both (b|1, 1, 1, block, 1) and (b|1, 1, 1, 1, N)."""
    row = (i // rules.list_size)[:, :, 0, :, 0]
    inside = (row >= 0) & (row < lists.shape[2])
    batch = jnp.arange(lists.shape[0], dtype=jnp.int32).reshape(-1, 1, 1)
    head = jnp.arange(lists.shape[1], dtype=jnp.int32).reshape(1, -1, 1)
    listed = lists[batch, head, jnp.where(inside, row, 0)]
    seen = (listed[:, :, None, :, None, :] == (j // rules.block_size)[..., None]).any(-1)
    return seen & inside[:, :, None, :, None]


def logits(q, k, context: Context, step: Steps, rules: Rules, unfit=None):
    """The logits of a step, -inf where hidden, and the capped logits before any bias, both float32 or wider.

    `unfit`, blocked as keys are, (b, g, blocks, block), is added to the logits of a key: zero, or NaN to mark it.
    """
    capped = product("bgnrqd,bgnkd->bgnrqk", q, k, rules) * rules.scale
    if rules.logit_cap is not None:
        capped = rules.logit_cap * jnp.tanh(capped / rules.logit_cap)
    groups, total = q.shape[1], capped
    if unfit is not None:
        total = total + columns(unfit, step)[:, :, :, None, None]
    if context.bias is not None:
        bias = by_head(bias_columns(context.bias, step), groups).astype(total.dtype)
        # Selected, because the sum of -inf and NaN is NaN.
        total = jnp.where(bias == -jnp.inf, -jnp.inf, total + bias)
    if context.slopes is not None:
        slopes = by_head(context.slopes.astype(total.dtype)[None, :, None, None, None], groups)
        total = total - slopes * by_head(jnp.abs(distances(context, step)), groups).astype(total.dtype)
    seen = by_head(visible(context, step, rules), groups)
    return jnp.where(seen, total, -jnp.inf), capped


def product(equation, left, right, rules: Rules):
    """A matrix product in the type of the operands, accumulated in float32 or wider."""
    return product_of(equation, left, right, rules.precision)


def product_of(equation, left, right, precision):
    """`product` with this precision, such as `precision_of` gives."""
    dtype = joint_dtype(left.dtype, jnp.float32)
    return jnp.einsum(equation, left, right, precision=precision, preferred_element_type=dtype)


def precision_of(dtype) -> jax.lax.Precision | None:
    """The precision of products in a type: exact in float32 and wider."""
    return None if dtype in (jnp.bfloat16, jnp.float16) else jax.lax.Precision.HIGHEST
