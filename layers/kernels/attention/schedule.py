"""Which blocks of keys each block of queries visits, and in how many steps.

There are two schedules. The general one visits pairs of large blocks, one pair per step, and leaves out the pairs that the
mask is known to hide. Steps that only turn out to be hidden at run time are skipped then. Where a query block sees few key
blocks, as in windows and lists of blocks, the other schedule takes many small query blocks per step and fetches for each the
key blocks on its own list.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from layers.kernels.segments import Segments
from layers.kernels.sizes import known

# The memory for the logits of one step: a CPU's cache, or enough to keep an accelerator busy.
CPU_STEP_BYTES, STEP_BYTES = 1 << 19, 1 << 27
# Bounds on a block of the general schedule.
PAIR_BLOCKS = 128, 512
# Bounds on a block of the schedule for windows, and the keys that a step fetches for one query block.
WINDOW_BLOCKS = 32, 128
LISTED_KEYS = 2048


class Steps(NamedTuple):
    """One entry per step: row groups (n,) by their first query block; lists (n, b|1, h|1, rows, columns) of key blocks.

    -1 in a list is no block. `listed` (same shape) distinguishes blocks on the list from those visited for their sink
    tokens; if None, the mask looks that up.
    """

    row: jax.Array
    blocks: jax.Array
    listed: jax.Array | None


class Schedule(NamedTuple):
    """Sizes and numbers of blocks (padding included), steps, and whether steps may turn out to be hidden."""

    q_block: int
    kv_block: int
    q_blocks: int
    kv_blocks: int
    steps: Steps
    uncertain: bool


def schedule(q, k, options, at) -> Schedule:
    """Returns the schedule for arguments of these shapes; `at` are their places, in order if `uses_lists`."""
    (b, t, h, _), s = q.shape, k.shape[1]
    if uses_lists(q, k, options):
        return _grouped(q, s, *_lists(t, s, options, at))
    if not _known(q, k):
        return one_block(t, s)
    if _is_small(q, k):
        return _pairs(t, s, t, s, options)
    smallest, size = PAIR_BLOCKS
    while size > smallest and 4 * b * h * size * size > _step_bytes():
        size //= 2
    q_block = min(t, size)
    return _pairs(t, s, q_block, min(s, size * size // q_block), options)


def one_block(t, s) -> Schedule:
    """Returns the schedule of one step, which visits all queries and keys at once."""
    one = jnp.zeros(1, jnp.int32)
    return Schedule(t, s, 1, 1, Steps(one, one.reshape(1, 1, 1, 1, 1), None), uncertain=False)


def uses_lists(q, k, o) -> bool:
    """Returns whether lists of small blocks save work, and mean the same by index as the options do by position."""
    if (o.mask.window is None and o.mask.block_indices is None) or _is_small(q, k):
        return False
    if o.tokens.q_positions is not None or o.mask.prefix_lengths is not None:
        return False
    if in_segments(o):
        per_token = o.logits.bias is not None and o.logits.bias.shape[2:] != (1, 1)
        if o.mask.block_indices is not None or per_token or (o.mask.sink_tokens and not o.causal):
            return False
    size, columns = _list_shape(o)
    return size * columns <= k.shape[1] // 2


def _known(q, k) -> bool:
    """Whether the sizes are numbers: for symbols of `jax.export`, all logits are one step."""
    return all(map(known, (*q.shape, *k.shape)))


def _is_small(q, k) -> bool:
    """Whether all logits fit into one step."""
    return not _known(q, k) or 4 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[1] <= _step_bytes()


def _step_bytes() -> int:
    return CPU_STEP_BYTES if jax.default_backend() == "cpu" else STEP_BYTES


def _list_shape(o) -> tuple[int, int]:
    """Keys in a block, and blocks in a list."""
    if o.mask.block_indices is not None:
        return o.mask.block_size, o.mask.block_indices.shape[3]
    window = o.mask.reach(o.causal)
    size = min(max(WINDOW_BLOCKS[0], 1 << max(window - 1, 0).bit_length()), WINDOW_BLOCKS[1])
    reach = -(-(window - o.causal) // size)
    return size, (1 if o.causal else 2) * reach + 1


def in_segments(o) -> bool:
    """Returns whether the position of a real token may differ from its index, because it counts within a segment."""
    segments = o.segment_ids
    if o.tokens.q_positions is not None or not isinstance(segments, Segments):
        return False
    return bool(segments.packed) or segments.padding != "end"


def _pairs(t, s, q_block, kv_block, o) -> Schedule:
    """Every pair of blocks that is not hidden whatever the data."""
    i, j = np.meshgrid(np.arange(-(-t // q_block)), np.arange(-(-s // kv_block)), indexing="ij")
    seen = np.ones(i.shape, bool)
    if o.tokens.q_positions is None and o.mask.prefix_lengths is None:
        first_q, last_q = i * q_block, (i + 1) * q_block - 1
        first_k, last_k = j * kv_block, (j + 1) * kv_block - 1
        if o.causal:
            seen &= first_k <= last_q
        if o.mask.window is not None and not in_segments(o):
            window = o.mask.reach(o.causal)
            near = (first_q - last_k < window + (not o.causal)) & (first_k - last_q <= window)
            seen &= near | (first_k < o.mask.sink_tokens)
    row, block = (jnp.asarray(v[seen], jnp.int32) for v in (i, j))
    known = o.tokens.q_positions is None and o.mask.prefix_lengths is None and o.mask.block_indices is None
    known = known and o.segment_ids is None and o.tokens.kv_lengths is None
    steps = Steps(row, block[:, None, None, None, None], None)
    return Schedule(q_block, kv_block, *i.shape, steps, uncertain=not known and row.size > 1)


def _lists(t, s, o, at):
    """Sizes of blocks of queries and keys, lists (b|1, h|1, query blocks, columns) and their `listed`."""
    size, columns = _list_shape(o)
    q_size = size if o.mask.block_indices is None else o.mask.list_size
    q_blocks, kv_blocks = -(-t // q_size), -(-s // size)
    if o.mask.block_indices is not None:
        lists = o.mask.block_indices[:, :, :q_blocks].astype(jnp.int32)
    else:
        last = np.arange(q_blocks)[:, None] + (0 if o.causal else columns // 2)
        lists = jnp.asarray(last + np.arange(1 - columns, 1), jnp.int32)[None, None]
    lists = distinct(jnp.where(lists < kv_blocks, lists, -1))
    sinks = _sink_blocks(o, at, q_blocks, size)
    sinks = jnp.where((sinks[..., :, None] == lists[..., None, :]).any(-1) | (sinks >= kv_blocks), -1, sinks)
    lists = jnp.broadcast_to(lists, (*sinks.shape[:3], columns))
    listed = jnp.concatenate([jnp.ones(lists.shape, bool), jnp.zeros(sinks.shape, bool)], axis=3)
    lists = jnp.concatenate([lists, sinks], axis=3)
    return q_size, size, lists, None if o.mask.block_indices is None else listed


def distinct(lists):
    """Each list along the last axis in order, with repeated entries replaced by -1."""
    lists = jnp.sort(jnp.maximum(lists, -1), axis=-1)
    again = jnp.pad(lists[..., 1:] == lists[..., :-1], [(0, 0)] * (lists.ndim - 1) + [(1, 0)])
    return jnp.where(again[..., : lists.shape[-1]], -1, lists)


def _sink_blocks(o, at, q_blocks, size):
    """The blocks (b|1, 1, query blocks, columns) that hold the sink tokens of the queries of a block.

    Of several segments in a causal block, only the first can have begun in an earlier block.
    """
    sinks = o.mask.sink_tokens
    if not sinks or not in_segments(o):
        columns = jnp.arange(-(-sinks // size), dtype=jnp.int32)
        return jnp.broadcast_to(columns, (1, 1, q_blocks, columns.size))
    first = (jnp.arange(q_blocks, dtype=jnp.int32) * size)[None]
    start = first - at.q_positions[:, ::size]
    columns = jnp.arange(1 + -(-(sinks - 1) // size), dtype=jnp.int32)
    return jnp.maximum(start // size, 0)[:, None, :, None] + columns[None, None, None]


def _grouped(q, s, q_size, size, lists, listed) -> Schedule:
    """Cuts lists into steps of as many query blocks as memory allows: of few queries, the keys take more than the logits."""
    b, _, h, width = q.shape
    tiles = max(1, _step_bytes() // (4 * b * h * size * max(q_size, min(width, size))))
    columns = max(1, min(lists.shape[3], LISTED_KEYS // size, tiles))
    most = max(1, tiles // columns)
    groups = -(-lists.shape[2] // most)
    rows = -(-lists.shape[2] // groups)
    padding = ((0, 0), (0, 0), (0, groups * rows - lists.shape[2]), (0, -lists.shape[3] % columns))

    def cut(v, fill):
        v = jnp.pad(v, padding, constant_values=fill)
        v = v.reshape(*v.shape[:2], groups, rows, -1, columns)
        return v.transpose(2, 4, 0, 1, 3, 5).reshape(-1, *v.shape[:2], rows, columns)

    blocks = cut(lists, -1)
    row = jnp.repeat(jnp.arange(groups, dtype=jnp.int32) * rows, blocks.shape[0] // groups)
    return Schedule(
        q_size,
        size,
        groups * rows,
        -(-s // size),
        Steps(row, blocks, None if listed is None else cut(listed, False)),
        uncertain=False,
    )
