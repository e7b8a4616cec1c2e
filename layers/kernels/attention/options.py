"""The options of `attention`, their checks, and the positions and segments that they amount to."""

import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp

from layers.kernels import checks
from layers.kernels.segments import segment_numbers, segment_starts


class Options(NamedTuple):
    """The keyword arguments of `attention`, described there."""

    causal: bool = False
    window: int | None = None
    sink_tokens: int = 0
    prefix_lengths: jax.Array | None = None
    block_indices: jax.Array | None = None
    block_size: int | None = None
    bias: jax.Array | None = None
    slopes: jax.Array | None = None
    logit_cap: float | None = None
    sink_logits: jax.Array | None = None
    scale: float | None = None
    segment_ids: jax.Array | None = None
    kv_segment_ids: jax.Array | None = None
    q_positions: jax.Array | None = None
    kv_positions: jax.Array | None = None
    kv_lengths: jax.Array | None = None


def check(q, k, v, options: Options) -> None:
    """Raises ValueError or TypeError for shapes, types and combinations that `attention` does not take."""
    o = options
    _check_numbers(o)
    sizes: dict[str, int] = {}
    checks.check_real(q=q, k=k, v=v, bias=o.bias, slopes=o.slopes, sink_logits=o.sink_logits)
    checks.check_shape("q", q, "b t h k", sizes)
    checks.check_shape("k", k, "b s g k", sizes)
    checks.check_shape("v", v, "b s g v", sizes)
    if sizes["g"] == 0 or sizes["h"] % sizes["g"]:
        raise ValueError(f"q has {sizes['h']} heads and k has {sizes['g']}; expected a multiple of k's")
    checks.check_segment_ids(o.segment_ids, sizes)
    shapes = {
        "prefix_lengths": "b|1",
        "block_indices": "b|1 h|1 rows listed",
        "bias": "b|1 h|1 t|1 s|1",
        "slopes": "h",
        "sink_logits": "h",
        "kv_segment_ids": "b s",
        "q_positions": "b|1 t",
        "kv_positions": "b|1 s",
        "kv_lengths": "b",
    }
    for name, pattern in shapes.items():
        array = getattr(o, name)
        if array is None:
            continue
        checks.check_shape(name, array, pattern, dict(sizes))
        if name not in ("bias", "slopes", "sink_logits") and not jnp.issubdtype(array.dtype, jnp.integer):
            raise TypeError(f"{name} has dtype {array.dtype}; expected an integer type")
    _check_combination(o)
    t, s = sizes["t"], sizes["s"]
    uses_positions = o.causal or o.window is not None or o.block_indices is not None or o.slopes is not None
    if t != s and uses_positions and o.q_positions is None:
        raise ValueError(
            f"q has {t} tokens and k has {s}: causal, window, block_indices and slopes then need q_positions and "
            "kv_positions"
        )
    if t != s and o.segment_ids is not None and o.kv_segment_ids is None:
        raise ValueError(
            f"segment_ids alone is for q and k of one length, not {t} and {s}; give kv_segment_ids"
        )
    if o.block_indices is not None and o.q_positions is None and o.block_indices.shape[2] * o.block_size < t:
        raise ValueError(
            f"block_indices lists {o.block_indices.shape[2]} blocks of {o.block_size} queries; expected enough for {t}"
        )


def _check_numbers(o: Options) -> None:
    """Raises TypeError for an array where a Python number is needed; these shape the program."""
    for kind, article, names in (
        (int, "an int", ("window", "sink_tokens", "block_size")),
        (numbers.Real, "a number", ("logit_cap", "scale")),
    ):
        for name in names:
            value = getattr(o, name)
            if value is not None and not isinstance(value, kind):
                raise TypeError(f"{name} is {type(value).__name__}; expected {article} known before tracing")


def _check_combination(o: Options) -> None:
    """Raises ValueError where one option needs, or forbids, another."""
    if o.window is not None and o.window < o.causal:
        raise ValueError(f"window={o.window}; expected at least {int(o.causal)}")
    if o.sink_tokens < 0:
        raise ValueError(f"sink_tokens={o.sink_tokens}; expected at least 0")
    if o.sink_tokens and o.window is None and o.block_indices is None:
        raise ValueError(
            f"sink_tokens={o.sink_tokens} changes nothing without window or block_indices; expected 0"
        )
    if o.prefix_lengths is not None and not o.causal:
        raise ValueError("prefix_lengths is for causal=True; without it every key is seen already")
    if (o.block_indices is None) != (o.block_size is None):
        raise ValueError("block_indices and block_size go together; one of them was given alone")
    if o.block_size is not None and o.block_size < 1:
        raise ValueError(f"block_size={o.block_size}; expected at least 1")
    if o.logit_cap is not None and o.logit_cap <= 0:
        raise ValueError(f"logit_cap={o.logit_cap}; expected a positive number, or None")
    if (o.q_positions is None) != (o.kv_positions is None):
        raise ValueError("q_positions and kv_positions go together; one of them was given alone")
    if o.kv_segment_ids is not None and o.segment_ids is None:
        raise ValueError("kv_segment_ids needs segment_ids, the segments of the queries")


class Places(NamedTuple):
    """Positions (b|1, t), (b|1, s) and segments (b, t), (b, s) of the queries and keys.

    A query sees only keys of its own segment, and none if that is 0. Both segments are None if there is only one.
    """

    q_positions: jax.Array
    kv_positions: jax.Array
    q_segments: jax.Array | None
    kv_segments: jax.Array | None


def places(q, k, options: Options) -> Places:
    """Fills in the positions that were not given, and puts keys beyond a row's length in segment 0."""
    o, (b, t), s = options, q.shape[:2], k.shape[1]
    alone = o.segment_ids is not None and o.kv_segment_ids is None
    q_segments, kv_segments = (
        (segment_numbers(o.segment_ids),) * 2 if alone else (o.segment_ids, o.kv_segment_ids)
    )
    if o.kv_lengths is not None:
        if q_segments is None:
            q_segments, kv_segments = jnp.ones((b, t), jnp.int32), jnp.ones((b, s), jnp.int32)
        kv_segments = jnp.where(jnp.arange(s)[None] < o.kv_lengths[:, None], kv_segments, 0)
    if o.q_positions is not None:
        positions = (x.astype(jnp.int32) for x in (o.q_positions, o.kv_positions))
        return Places(*positions, q_segments, kv_segments)
    if alone:
        positions = segment_positions(o.segment_ids)
        return Places(positions, positions, q_segments, kv_segments)
    indices = (jnp.arange(n, dtype=jnp.int32)[None] for n in (t, s))
    return Places(*indices, q_segments, kv_segments)


def segment_positions(segment_ids: jax.Array) -> jax.Array:
    """The number of earlier real tokens of the same segment, (b, t)."""
    count = jnp.cumsum(segment_ids != 0, axis=1, dtype=jnp.int32) - 1
    return count - jax.lax.cummax(jnp.where(segment_starts(segment_ids), count, 0), axis=1)
