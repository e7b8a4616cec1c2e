"""Attention on a mesh that divides time: every device gathers the keys and values and attends with its own queries.

This is how LASP-2H (Sun et al. 2025, arXiv:2502.07563) treats the softmax layers of a hybrid. Keys and values are gathered
as they are, with the heads that queries share. Positions and segments are those of whole rows, derived before the cut, so
that masks, windows and slopes know where a part lies.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from layers.kernels import partition
from layers.kernels.attention.options import Logits, Mask, Options, Tokens, places
from layers.kernels.partition import SEQUENCE_AXIS
from layers.kernels.sequence_parallel import Arguments, entries_of, parts_of_time, spec, spec_of

AXES = {
    "q": ("b t h k",),
    "k": ("b s h k",),
    "v": ("b s h v",),
    "bias": ("b h t j",),
    "slopes": ("h",),
    "sink_logits": ("h",),
    "prefix_lengths": ("b",),
    "q_positions": ("b t",),
    "kv_positions": ("b j",),
    "q_segments": ("b t",),
    "kv_segments": ("b j",),
}


@dataclasses.dataclass(frozen=True)
class Gathered:
    """The form over time of `attention`.

    Attributes:
      outputs: the letters of each result.
    """

    outputs: tuple[str, ...]

    def takes(self, arguments: Arguments) -> bool:
        """Returns whether the mesh in force divides the time of these arguments. Lists of blocks are left to the compiler."""
        q, k, options = (arguments[name] for name in ("q", "k", "options"))
        return options.mask.block_indices is None and parts_of_time(q.shape[1]) > 1 and _divides(k)

    def __call__(self, run: Callable[..., Any], impl: str | None, arguments: Arguments) -> Any:
        """Returns what `attention` returns for whole arrays; `run` takes the arguments of one device."""
        del impl  # part of `run`
        q, k, v, options = (arguments[name] for name in ("q", "k", "v", "options"))
        mask, logits = options.mask, options.logits
        given = {"q": q, "k": k, "v": v, "prefix_lengths": mask.prefix_lengths}
        given |= {name: getattr(logits, name) for name in ("bias", "slopes", "sink_logits")}
        given |= places(q, k, options)._asdict()
        given = {name: x for name, x in given.items() if x is not None}
        entries = entries_of(AXES, given) | {"s": SEQUENCE_AXIS}

        def local(given):
            q = given["q"]
            k, v = (jax.lax.all_gather(given[name], SEQUENCE_AXIS, axis=1, tiled=True) for name in "kv")
            return run(q=q, k=k, v=v, options=_of_part(options, given))[: len(self.outputs)]

        specs = {name: spec_of(AXES, name, x, entries) for name, x in given.items()}
        results = tuple(spec(letters, entries) for letters in self.outputs)
        return partition.over_shards(local, (given,), (specs,), results)


def _of_part(options: Options, given: Arguments) -> Options:
    """The options of one device, whose queries are a part of the row."""
    mask: Mask = dataclasses.replace(options.mask, prefix_lengths=given.get("prefix_lengths"))
    names = "bias", "slopes", "sink_logits"
    logits: Logits = dataclasses.replace(options.logits, **{name: given.get(name) for name in names})
    tokens = Tokens(
        kv_segment_ids=given.get("kv_segments"),
        q_positions=given["q_positions"],
        kv_positions=given["kv_positions"],
    )
    return Options(options.causal, mask, logits, given.get("q_segments"), tokens, options.scale)


def _divides(k):
    return parts_of_time(k.shape[1]) > 1


OVER_TIME = Gathered(("b t h v",))
OVER_TIME_WITH_LSE = Gathered(("b t h v", "b t h", "b t h"))
