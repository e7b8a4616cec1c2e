"""The options of `attention` by subject, their checks, and the positions and segments that follow from them.

The groups are pytrees. JAX also builds them from specifications and placeholders, so their arrays are annotated as
anything and checked in `read_options`.
"""

import dataclasses
import functools
import numbers
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layers.kernels import checks
from layers.kernels.promotion import joint_dtype
from layers.kernels.segments import SegmentIds, Segments
from layers.kernels.sizes import known


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["prefix_lengths", "block_indices", "global_keys", "global_queries"],
    meta_fields=["window", "dilation", "sink_tokens", "block_size", "query_block_size"],
)
@dataclasses.dataclass(frozen=True)
class Mask:
    """Which keys of its segment a query sees, besides `causal`; `attention` states the rule.

    Attributes:
      window: causal: the last `window` keys, the query's own included. Otherwise: keys at a distance of at most
        `window` on either side.
      dilation: distance between neighbours in a window, which then holds as many keys and reaches that much further
        (Beltagy et al. 2020, arXiv:2004.05150).
      sink_tokens: number of first positions that stay visible where `window` or `block_indices` would hide them.
      prefix_lengths: (b,) integers; positions below it see each other in both directions; needs `causal`. An axis of
        size 1 stands for all rows.
      block_indices: (b, h, blocks, listed) integers: per block of `query_block_size` query positions, the blocks of
        `block_size` key positions that it sees; -1 fills up, and a block listed twice counts once. Axes of size 1 stand
        for all rows or heads.
      block_size: positions in a block of keys of `block_indices`.
      query_block_size: positions in a block of queries, `block_size` if None. 1 gives every query a list of its own.
      global_keys: (b, h, n) integers, the indices along s of keys that stay visible where `window` or `block_indices`
        would hide them; -1 fills up, and a key listed twice counts once. Axes of size 1 stand for all rows or heads.
      global_queries: (b, n) integers, the indices along t of queries for which `window` and `block_indices` hide nothing;
        -1 fills up. An axis of size 1 stands for all rows.
    """

    window: int | None = None
    dilation: int = 1
    sink_tokens: int = 0
    prefix_lengths: Any = None
    block_indices: Any = None
    block_size: int | None = None
    query_block_size: int | None = None
    global_keys: Any = None
    global_queries: Any = None

    def reach(self, causal: bool) -> int:
        """The window without dilation that holds every key of this window."""
        return (self.window - causal) * self.dilation + causal

    @property
    def list_size(self) -> int | None:
        """Queries that share a list of blocks; None without lists."""
        return self.block_size if self.query_block_size is None else self.query_block_size


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["bias", "slopes", "sink_logits"],
    meta_fields=["logit_cap"],
)
@dataclasses.dataclass(frozen=True)
class Logits:
    """What happens to the scaled products of queries and keys before the softmax.

    Attributes:
      bias: (b, h, t, s), added to the logits; axes of size 1 stand for all. -inf hides a key.
      slopes: (h,), ALiBi: what the logits lose per head and unit of distance between positions.
      logit_cap: bounds the scaled logits, before bias and slopes.
      sink_logits: (h,), the logit of a key without value that every query sees, per head.
    """

    bias: Any = None
    slopes: Any = None
    logit_cap: float | None = None
    sink_logits: Any = None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["kv_segment_ids", "q_positions", "kv_positions", "kv_lengths"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Tokens:
    """Segments and positions of queries and keys, if the keys are not the queries' own tokens, such as those of a cache.

    Attributes:
      kv_segment_ids: (b, s), segments of the keys, given with `segment_ids`. A query then sees the keys of equal, non-zero
        id, and positions are indices if they are not given.
      q_positions, kv_positions: (b, t) and (b, s), always given together; one row stands for all.
      kv_lengths: (b,); keys at index kv_lengths or beyond, such as the unused end of a cache, are not seen.
    """

    kv_segment_ids: Any = None
    q_positions: Any = None
    kv_positions: Any = None
    kv_lengths: Any = None


class Options(NamedTuple):
    """The keyword arguments of `attention`, described there, without the implementation.

    `segment_ids` are `Segments` if the keys are the queries' own tokens, and an array of ids beside `kv_segment_ids`.
    """

    causal: bool = False
    mask: Mask = Mask()
    logits: Logits = Logits()
    segment_ids: Segments | jax.Array | None = None
    tokens: Tokens = Tokens()
    scale: float | None = None


def beyond(options: Options, taken: Collection[str]) -> str | None:
    """Returns the name of an option of `mask`, `logits` or `tokens` that is set and not among those taken, or None."""
    default = Options()
    for group in ("mask", "logits", "tokens"):
        for name, value in vars(getattr(options, group)).items():
            if name not in taken and value is not getattr(getattr(default, group), name):
                return name
    return None


def read_options(
    q,
    k,
    v,
    *,
    causal: bool = False,
    mask: Mask | None = None,
    logits: Logits | None = None,
    segment_ids: SegmentIds = None,
    tokens: Tokens | None = None,
    scale: float | None = None,
) -> Options:
    """Returns the options of a call.

    Raises:
      ValueError, TypeError: a shape, type or combination that `attention` does not take.
    """
    mask, logits, tokens = (
        _group(name, given, kind)
        for name, given, kind in (
            ("mask", mask, Mask),
            ("logits", logits, Logits),
            ("tokens", tokens, Tokens),
        )
    )
    _check_numbers(mask, logits, scale)
    sizes: dict[str, int] = {}
    checks.check_real(q=q, k=k, v=v, bias=logits.bias, slopes=logits.slopes, sink_logits=logits.sink_logits)
    checks.check_shape("q", q, "b t h k", sizes)
    checks.check_shape("k", k, "b s g k", sizes)
    checks.check_shape("v", v, "b s g v", sizes)
    checks.check_features(q=q, k=k)
    if sizes["g"] == 0 or sizes["h"] % sizes["g"]:
        raise ValueError(f"q has {sizes['h']} heads and k has {sizes['g']}; expected a multiple of k's")
    segments = checks.check_segment_ids(segment_ids, sizes)
    _check_arrays(mask, logits, tokens, sizes)
    _check_combination(causal, mask, logits, tokens, segments)
    _check_lengths(causal, mask, logits, tokens, segments, sizes)
    ids = segments
    if tokens.kv_segment_ids is not None:
        dtype = joint_dtype(segments.ids.dtype, tokens.kv_segment_ids.dtype)
        ids = segments.ids.astype(dtype)
        tokens = dataclasses.replace(tokens, kv_segment_ids=tokens.kv_segment_ids.astype(dtype))
    mask = _in_int32(mask, "prefix_lengths", "block_indices", "global_keys", "global_queries")
    tokens = _in_int32(tokens, "kv_lengths")
    return Options(causal, mask, logits, ids, tokens, scale)


def _in_int32(group, *names):
    """The group with these arrays in the type of positions."""
    given = {name: getattr(group, name) for name in names}
    cast = {name: array.astype(jnp.int32) for name, array in given.items() if array is not None}
    return dataclasses.replace(group, **cast) if cast else group


def _group(name, given, kind):
    """Returns `given`, or the options that change nothing if it is None."""
    if given is not None and not isinstance(given, kind):
        raise TypeError(f"{name} is {type(given).__name__}; expected a {kind.__name__} or None")
    return kind() if given is None else given


WHOLE_NUMBERS = "window", "dilation", "sink_tokens", "block_size", "query_block_size"


def _check_numbers(mask, logits, scale) -> None:
    """Raises TypeError for an array where a Python number is needed, because it shapes the program."""
    whole = {name: getattr(mask, name) for name in WHOLE_NUMBERS}
    real = {"logit_cap": logits.logit_cap, "scale": scale}
    for kind, article, values in ((int, "an int", whole), (numbers.Real, "a number", real)):
        for name, value in values.items():
            if value is not None and not isinstance(value, kind):
                raise TypeError(f"{name} is {type(value).__name__}; expected {article} known before tracing")


SHAPES = {
    "prefix_lengths": "b|1",
    "block_indices": "b|1 h|1 rows listed",
    "global_keys": "b|1 h|1 n",
    "global_queries": "b|1 n",
    "bias": "b|1 h|1 t|1 s|1",
    "slopes": "h",
    "sink_logits": "h",
    "kv_segment_ids": "b s",
    "q_positions": "b|1 t",
    "kv_positions": "b|1 s",
    "kv_lengths": "b",
}


def _check_arrays(mask, logits, tokens, sizes) -> None:
    """Raises ValueError or TypeError for the shape or type of an array."""
    for group in (mask, logits, tokens):
        for field in dataclasses.fields(group):
            array, name = getattr(group, field.name), field.name
            if name not in SHAPES or array is None:
                continue
            checks.check_shape(name, array, SHAPES[name], dict(sizes))
            if group is not logits and not jnp.issubdtype(array.dtype, jnp.integer):
                raise TypeError(f"{name} has dtype {array.dtype}; expected an integer type")


def _check_combination(causal, mask, logits, tokens, segments) -> None:
    """Raises ValueError where one option needs, or forbids, another."""
    if mask.window is not None and mask.window < causal:
        raise ValueError(f"window={mask.window}; expected at least {int(causal)}")
    if mask.dilation < 1:
        raise ValueError(f"dilation={mask.dilation}; expected at least 1")
    if mask.dilation > 1 and mask.window is None:
        raise ValueError(f"dilation={mask.dilation} changes nothing without window; expected 1")
    if mask.sink_tokens < 0:
        raise ValueError(f"sink_tokens={mask.sink_tokens}; expected at least 0")
    if mask.window is None and mask.block_indices is None:
        if mask.sink_tokens:
            raise ValueError(
                f"sink_tokens={mask.sink_tokens} changes nothing without window or block_indices; expected 0"
            )
        for name in ("global_keys", "global_queries"):
            if getattr(mask, name) is not None:
                raise ValueError(f"{name} changes nothing without window or block_indices; expected None")
    if mask.prefix_lengths is not None and not causal:
        raise ValueError("prefix_lengths is for causal=True; without it every key is seen already")
    if (mask.block_indices is None) != (mask.block_size is None):
        raise ValueError("block_indices and block_size go together; one of them was given alone")
    if mask.block_size is not None and mask.block_size < 1:
        raise ValueError(f"block_size={mask.block_size}; expected at least 1")
    if mask.query_block_size is not None and mask.block_size is None:
        raise ValueError(f"query_block_size={mask.query_block_size} needs block_indices and block_size")
    if mask.query_block_size is not None and mask.query_block_size < 1:
        raise ValueError(f"query_block_size={mask.query_block_size}; expected at least 1")
    if logits.logit_cap is not None and logits.logit_cap <= 0:
        raise ValueError(f"logit_cap={logits.logit_cap}; expected a positive number, or None")
    if (tokens.q_positions is None) != (tokens.kv_positions is None):
        raise ValueError("q_positions and kv_positions go together; one of them was given alone")
    if tokens.kv_segment_ids is not None and segments is None:
        raise ValueError("kv_segment_ids needs segment_ids, the segments of the queries")


def _check_lengths(causal, mask, logits, tokens, segments, sizes) -> None:
    """Raises ValueError where queries and keys of different lengths need further options."""
    t, s = sizes["t"], sizes["s"]
    lists = mask.block_indices
    uses_positions = causal or mask.window is not None or lists is not None or logits.slopes is not None
    if t != s and uses_positions and tokens.q_positions is None:
        raise ValueError(
            f"q has {t} tokens and k has {s}: causal, window, block_indices and slopes then need q_positions and "
            "kv_positions"
        )
    if t != s and segments is not None and tokens.kv_segment_ids is None:
        raise ValueError(
            f"segment_ids alone is for q and k of one length, not {t} and {s}; give kv_segment_ids"
        )
    if lists is not None and not known(t):
        raise ValueError(
            f"q has {t} tokens, a symbol; block_indices needs a number: export each length by itself"
        )
    if lists is not None and tokens.q_positions is None and lists.shape[2] * mask.list_size < t:
        raise ValueError(
            f"block_indices lists {lists.shape[2]} blocks of {mask.list_size} queries; expected enough for {t}"
        )


class Places(NamedTuple):
    """Positions (b|1, t), (b|1, s) and segments (b, t), (b, s) of the queries and keys.

    A query sees only keys of its own segment, and none if its segment is 0. Both segments are None if there is only one.
    """

    q_positions: jax.Array
    kv_positions: jax.Array
    q_segments: jax.Array | None
    kv_segments: jax.Array | None


def places(q, k, options: Options) -> Places:
    """Returns places with the positions that were not given, and with keys beyond a row's length in segment 0."""
    (b, t), s, tokens, segments = q.shape[:2], k.shape[1], options.tokens, options.segment_ids
    alone = isinstance(segments, Segments)
    q_segments, kv_segments = (segments.numbers,) * 2 if alone else (segments, tokens.kv_segment_ids)
    if tokens.kv_lengths is not None:
        if q_segments is None:
            q_segments, kv_segments = jnp.ones((b, t), jnp.int32), jnp.ones((b, s), jnp.int32)
        kv_segments = jnp.where(
            jnp.arange(s, dtype=jnp.int32)[None] < tokens.kv_lengths[:, None], kv_segments, 0
        )
    if tokens.q_positions is not None:
        positions = (x.astype(jnp.int32) for x in (tokens.q_positions, tokens.kv_positions))
        return Places(*positions, q_segments, kv_segments)
    if alone:
        return Places(segments.positions, segments.positions, q_segments, kv_segments)
    indices = (jnp.arange(n, dtype=jnp.int32)[None] for n in (t, s))
    return Places(*indices, q_segments, kv_segments)
