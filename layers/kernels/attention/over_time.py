"""Attention on a mesh that divides time, by one of two methods.

"all_gather": every device gathers the keys and values and attends with its own queries, as LASP-2H (Sun et al. 2025,
arXiv:2502.07563) treats the softmax layers of a hybrid. Keys and values are gathered as they are, with the heads that
queries share. Positions and segments are those of whole rows, derived before the cut, so that masks, windows and slopes
know where a part lies.

"ulysses": devices exchange time for heads, attend over whole rows with their heads, and exchange back (DeepSpeed-Ulysses,
Jacobs et al. 2023, arXiv:2309.14509). It moves less where t is long, and runs whatever kernel takes whole rows.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from layers.kernels import partition
from layers.kernels.attention.options import Logits, Mask, Options, Tokens, places
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
        """Returns whether the mesh in force divides the time of queries and keys.

        Lists of blocks are left to the compiler where keys and values are gathered.
        """
        q, k, options = (arguments[name] for name in ("q", "k", "options"))
        listed = options.mask.block_indices is not None and attention_method() == "all_gather"
        return not listed and parts_of_time(q.shape[1]) > 1 and parts_of_time(k.shape[1]) > 1

    def __call__(self, run: Callable[..., Any], impl: str | None, arguments: Arguments) -> Any:
        """Returns what `attention` returns for whole arrays; `run` takes the arguments of one device."""
        del impl  # part of `run`
        method = {"all_gather": _gathered, "ulysses": _exchanged}[attention_method()]
        return method(run, **arguments, outputs=self.outputs)


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
    _check_heads(q, k, partition.parts(heads))

    def local(given, segments):
        given, segments = vary_alike((given, segments))
        q, k, v = (_heads_for_time(given[name]) for name in "qkv")
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


def _check_heads(q, k, tensor):
    parts = parts_of_time(q.shape[1])
    for name, x in (("q", q), ("k", k)):
        if x.shape[2] % (tensor * parts):
            over = f"{parts} devices ({SEQUENCE_AXIS})" + (
                f" times {tensor} ({', '.join(HEAD_AXES)})" if tensor > 1 else ""
            )
            raise ValueError(
                f"attention by method='ulysses': {name} has {x.shape[2]} heads, which cannot be divided over {over}; "
                f"use a multiple of {tensor * parts}, or method='all_gather'"
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
