"""Attention on a mesh that divides time, by one of several methods.

"all_gather": every device gathers the keys and values and attends with its own queries, as LASP-2H (Sun et al. 2025,
arXiv:2502.07563) treats the softmax layers of a hybrid. Keys and values are gathered as they are, with the heads that
queries share. Positions and segments are those of whole rows, derived before the cut, so that masks, windows and slopes
know where a part lies.

"ulysses": devices exchange time for heads, attend over whole rows with their heads, and exchange back (DeepSpeed-Ulysses,
Jacobs et al. 2023, arXiv:2309.14509). It moves less where t is long, and runs whatever kernel takes whole rows. Heads of
keys and values that are too few for the devices are repeated.

"ring" and "zigzag": keys and values visit the devices one after the other (`ring`); "zigzag" deals causal work out evenly.

"balanced_ring": the same in half the rounds under a causal mask, as devices that would wait compute for others
(`balanced_ring`); "ring" where a mask, a bias or places of tokens do not allow that.

"score_ring": first keys and then values visit, and whole rows of scores are kept (`score_ring`).

"token_ring": queries and results travel while keys and values stay (`token_ring`), in zig-zag order where that deals causal
work out evenly and 2 P divides the length.

Visits run on cuDNN's kernels where these can (`fused_visits`), and in plain JAX elsewhere.

"partitioned": the compiler partitions what one device would do, and may gather whole rows.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from layers.kernels import partition
from layers.kernels.attention import balanced_ring, fused_visits, ring, score_ring, token_ring, xla
from layers.kernels.attention.options import Logits, Mask, Options, Places, Tokens, places
from layers.kernels.attention.visits import Arrays, split_options
from layers.kernels.dispatch import note
from layers.kernels.forward_mode import no_forward_mode, reverse_mode_only
from layers.kernels.partition import HEAD_AXES, SEQUENCE_AXIS
from layers.kernels.sequence_parallel import (
    Arguments,
    attention_method,
    entries_of,
    parts_of_time,
    spec,
    spec_of,
)
from layers.kernels.shard_map_types import vary_alike

# t is the time of queries and s that of keys, both divided; n and m are the same, whole. u are heads that belong to a
# device after the exchange.
GATHERED = {
    "q": ("b t h k",),
    "k": ("b s h k",),
    "v": ("b s h v",),
    "bias": ("b h t m",),
    "slopes": ("h",),
    "sink_logits": ("h",),
    "prefix_lengths": ("b",),
    "q_positions": ("b t",),
    "kv_positions": ("b m",),
    "q_segments": ("b t",),
    "kv_segments": ("b m",),
}
EXCHANGED = {
    "q": ("b t h k",),
    "k": ("b s h k",),
    "v": ("b s h v",),
    "bias": ("b u n m",),
    "slopes": ("u",),
    "sink_logits": ("u",),
    "prefix_lengths": ("b",),
    "block_indices": ("b u i j",),
    "q_positions": ("b n",),
    "kv_positions": ("b m",),
    "kv_segment_ids": ("b m",),
    "kv_lengths": ("b",),
}
RINGS = {
    "q": ("b t h k",),
    "k": ("b s h k",),
    "v": ("b s h v",),
    "slopes": ("h",),
    "sink_logits": ("h",),
    "prefix_lengths": ("b",),
    "block_indices": ("b h i j",),
    "q_positions": ("b t",),
    "kv_positions": ("b s",),
    "q_segments": ("b t",),
    "kv_segments": ("b s",),
}
RINGED = {
    "balanced_ring": balanced_ring,
    "token_ring": token_ring,
    "score_ring": score_ring,
}  # by method; the others by `ring`
# A bias is cut along the tokens that stay.
BIAS = {"token_ring": ("b h n s",)}
MASK, LOGITS = ("prefix_lengths", "block_indices"), ("bias", "slopes", "sink_logits")
TOKENS = "kv_segment_ids", "q_positions", "kv_positions", "kv_lengths"


@dataclasses.dataclass(frozen=True)
class Attention:
    """The form over time of `attention`.

    Attributes:
      outputs: the letters of each result.
    """

    outputs: tuple[str, ...]

    def takes(self, arguments: Arguments) -> bool:
        """Returns whether the mesh in force divides the time of queries and keys, and it is not left to the compiler.

        Lists of blocks are left to the compiler where keys and values are gathered, and global tokens everywhere.
        """
        q, k, options = (arguments[name] for name in ("q", "k", "options"))
        if attention_method() == "partitioned":
            return False
        mask = options.mask
        listed = mask.block_indices is not None and attention_method() == "all_gather"
        left = listed or mask.global_keys is not None or mask.global_queries is not None
        return not left and parts_of_time(q.shape[1]) > 1 and parts_of_time(k.shape[1]) > 1

    def __call__(self, run: Callable[..., Any], impl: str | None, arguments: Arguments) -> Any:
        """Returns what `attention` returns for whole arrays; `run` takes the arguments of one device."""
        method = attention_method()
        if method in ("all_gather", "ulysses"):
            function = _gathered if method == "all_gather" else _exchanged
            return function(run, **arguments, outputs=self.outputs)
        if impl not in (None, "xla", "cudnn"):
            raise ValueError(
                f"impl={impl!r} of attention takes whole rows of keys, which method={method!r} does not have; use "
                "impl='xla', or method='ulysses'"
            )
        return _visited(method, impl, **arguments, outputs=self.outputs)


OVER_TIME = Attention(("b t h v",))
OVER_TIME_WITH_LSE = Attention(("b t h v", "b t h", "b t h"))


def _gathered(run, q, k, v, options, outputs):
    given = {"q": q, "k": k, "v": v, "prefix_lengths": options.mask.prefix_lengths}
    given |= _fields(options.logits, LOGITS) | places(q, k, options)._asdict()
    given = _without_none(given)
    entries = entries_of(GATHERED, given) | {"s": SEQUENCE_AXIS}

    def local(given):
        given = vary_alike(given)
        k, v = (jax.lax.all_gather(given[name], SEQUENCE_AXIS, axis=1, tiled=True) for name in "kv")
        tokens = Tokens(
            kv_segment_ids=given.get("kv_segments"),
            q_positions=given["q_positions"],
            kv_positions=given["kv_positions"],
        )
        own = _options(options, given, given.get("q_segments"), tokens)
        return run(q=given["q"], k=k, v=v, options=own)[: len(outputs)]

    specs = {name: spec_of(GATHERED, name, x, entries) for name, x in given.items()}
    results = tuple(spec(letters, entries) for letters in outputs)
    return partition.over_shards(local, (given,), (specs,), results)


def _exchanged(run, q, k, v, options, outputs):
    given = {"q": q, "k": k, "v": v}
    given |= _fields(options.mask, MASK) | _fields(options.logits, LOGITS) | _fields(options.tokens, TOKENS)
    given, segments = _without_none(given), options.segment_ids
    entries = entries_of(EXCHANGED, given)
    heads = entries["h"] or ()
    entries |= {"s": SEQUENCE_AXIS, "u": (*heads, SEQUENCE_AXIS)}
    parts, tensor = parts_of_time(q.shape[1]), partition.parts(heads)
    _check_heads(q.shape[2], parts, tensor)

    def local(given, segments):
        given, segments = vary_alike((given, segments))
        q, k, v = given["q"], *(_repeated(given[name], parts) for name in "kv")
        q, k, v = (_heads_for_time(x) for x in (q, k, v))
        own = _options(options, given, segments, Tokens(**_given(given, TOKENS)))
        results = run(q=q, k=k, v=v, options=own)[: len(outputs)]
        return tuple(
            jax.lax.all_to_all(x, SEQUENCE_AXIS, split_axis=1, concat_axis=2, tiled=True) for x in results
        )

    specs = {name: spec_of(EXCHANGED, name, x, entries) for name, x in given.items()}
    results = tuple(spec(letters, entries) for letters in outputs)
    return partition.over_shards(local, (given, segments), (specs, spec("b", entries)), results)


def _heads_for_time(x):
    """A part of the time of all heads (b, t / P, h, d) to a part of the heads over all time (b, t, h / P, d)."""
    return jax.lax.all_to_all(x, SEQUENCE_AXIS, split_axis=2, concat_axis=1, tiled=True)


def _repeated(x, parts):
    """Heads of keys or values as often as it takes to give every device those that its queries read."""
    repeats = math.lcm(x.shape[2], parts) // x.shape[2]
    return x if repeats == 1 else jnp.repeat(x, repeats, axis=2)


def _check_heads(heads, parts, tensor):
    if heads % (tensor * parts):
        over = f"{parts} devices ({SEQUENCE_AXIS})" + (
            f" times {tensor} ({', '.join(HEAD_AXES)})" if tensor > 1 else ""
        )
        raise ValueError(
            f"attention by method='ulysses': q has {heads} heads, which cannot be divided over {over}; use a multiple "
            f"of {tensor * parts}, or method='ring'"
        )


def _visited(method, impl, q, k, v, options, outputs):
    """Attention by visits of keys or of queries."""
    static, arrays = split_options(options)
    plan = ring.Plan(static, *_order(method, q, k, options))
    plan = plan._replace(fused=_fused(method, impl, plan, q, k, v, options, outputs))
    note("attention", "cudnn" if plan.fused else "xla")
    module = RINGED.get(method, ring)
    if module is balanced_ring and (
        plan.hops < parts_of_time(q.shape[1]) - 1 or not balanced_ring.takes(options, q, k)
    ):
        module = ring
    at = places(q, k, options) if options.segment_ids is not None or _given_places(options) else None
    given = {"q": q, "k": k, "v": v, "sink_logits": options.logits.sink_logits}
    given = _without_none(given | arrays._asdict() | (at._asdict() if at else {}))
    instead = "method='all_gather' with impl='reference'"
    given = reverse_mode_only(given, no_forward_mode(f"attention by method={method!r}", instead))
    axes = RINGS | {"bias": BIAS.get(method, ("b h t m",))}
    entries = entries_of(axes, given) | {"s": SEQUENCE_AXIS}

    def local(given):
        given = vary_alike(given)
        if plan.order == "zigzag":
            given = {name: _along_time(ring.to_zigzag, axes, name, x) for name, x in given.items()}
        own = Arrays(**_given(given, Arrays._fields))
        here = None if at is None else Places(**_given(given, Places._fields))
        found = module.attend(plan, *(given[name] for name in "qkv"), own, here)
        results = xla.with_sink(*found, given.get("sink_logits"))[: len(outputs)]
        return tuple(map(ring.from_zigzag, results)) if plan.order == "zigzag" else results

    specs = {name: spec_of(axes, name, x, entries) for name, x in given.items()}
    results = tuple(spec(letters, entries) for letters in outputs)
    return partition.over_shards(local, (given,), (specs,), results)


def _fused(method, impl, plan, q, k, v, options, outputs):
    """Whether cuDNN takes the visits.

    Raises:
      ValueError: it is asked for by name, and cannot.
    """
    if impl == "xla":
        return False
    if method == "score_ring":
        reason = "it keeps scores, which they do not return"
    elif len(outputs) > 1:
        reason = "they give no gradient to the log-sum-exp"
    else:
        reason = fused_visits.refusal(q, k, v, options, plan.order, parts_of_time(q.shape[1]))
    if impl == "cudnn" and reason is not None:
        raise ValueError(f"impl='cudnn' of attention cannot take the visits of method={method!r}: {reason}")
    return reason is None


def _given_places(options):
    """Whether positions or segments of the tokens are given, so that they need not be those of whole rows."""
    return any(x is not None for x in _fields(options.tokens, TOKENS).values())


def _along_time(exchange, axes, name, x):
    """`exchange` along the axis of x that the devices divide; an axis of size 1 stands for all and stays."""
    (letters,) = axes[name]
    for axis, letter in enumerate(letters.split()):
        if letter in "ts" and x.shape[axis] > 1:
            return exchange(x, axis)
    return x


def _order(method, q, k, options):
    """The order of tokens, and how many devices further keys are sent or queries come from.

    Raises:
      ValueError: zig-zag order is asked for, and twice the number of devices does not divide the length.
    """
    parts, length = parts_of_time(q.shape[1]), k.shape[1]
    hops, mask = parts - 1, options.mask
    segments = options.segment_ids
    # By index a window reaches no further than by position, unless padding stands between the tokens of a segment.
    by_index = not _given_places(options) and (segments is None or segments.padding == "end")
    only_window = mask.window is not None and mask.sink_tokens == 0 and mask.prefix_lengths is None
    if options.causal and only_window and by_index:
        hops = min(hops, -(-(mask.reach(options.causal) - 1) // (length // parts)))
    balanced = options.causal and hops == parts - 1 and q.shape[1] == length
    if method in ("ring", "balanced_ring", "score_ring") or not balanced:
        return "contiguous", hops
    if length % (2 * parts) == 0:
        return "zigzag", hops
    if method == "token_ring":
        return "contiguous", hops
    below = length // (2 * parts) * 2 * parts
    raise ValueError(
        f"attention by method='zigzag': {length} tokens cannot be divided into {2 * parts} pieces, two for each of {parts} "
        f"devices ({SEQUENCE_AXIS}); use {f'{below} or ' if below else ''}{below + 2 * parts}, or method='ring'"
    )


def _options(options, given, segments, tokens):
    """The options of one device."""
    mask: Mask = dataclasses.replace(options.mask, **_given(given, MASK))
    logits: Logits = dataclasses.replace(options.logits, **_given(given, LOGITS))
    return Options(options.causal, mask, logits, segments, tokens, options.scale)


def _fields(group, names):
    return {name: getattr(group, name) for name in names}


def _given(given, names):
    return {name: given.get(name) for name in names}


def _without_none(given):
    return {name: x for name, x in given.items() if x is not None}
