"""What mixers share that replace the softmax attention of `Attention` by a pattern of their own."""

import dataclasses

import jax.numpy as jnp

from layers.mixer import Visit
from layers.mixers.attention.attention import Attention
from layers.parts.attention_config import AttentionConfig
from layers.parts.cache import Cache, extend
from layers.parts.position_blocks import numbers_and_positions
from layers.positions import Rotary
from layers.positions.position import NoPosition
from layers.segments import Segments
from layers.typing import Array, Float


class Patterned(Attention):
    """Base class of causal attention whose tokens are told by their segments and positions.

    A mixer has `attend(q, entries, here, there, given)`, which returns what `finish` takes. `entries` are what `project` returns
    behind the queries, by default keys and values, and those in the cache. `here` and `there` are the numbers of the segments and the
    positions (b, t) of queries and entries; `given` is what they are from: None for whole rows, `Segments`, or the `Visit` of a call
    with a cache.
    """

    patterns = ("causal_self",)

    def mix(
        self,
        x: Float[Array, "b t d"],
        carried: Cache | None,
        segments: Segments | None,
        visit: Visit | None,
    ) -> tuple[Float[Array, "b t d"], Cache | None]:
        if visit is None:
            here = numbers_and_positions(x, segments)
            q, *entries = self.project(x, here[1], segments)
            return self.finish(self.attend(q, tuple(entries), here, here, segments), x), None
        q, *entries = self.project(x, visit.positions, segments)
        carried, seen, beyond = extend(carried, tuple(entries), visit, **self.kept)
        here, there = (visit.numbers, visit.positions), (seen.numbers, seen.positions)
        y = self.finish(self.attend(q, seen.entries, here, there, visit), x)
        return jnp.where(beyond[..., None], jnp.nan, y), carried


def refuse_options(
    config: AttentionConfig,
    mixer: str,
    *,
    positions: tuple[type, ...] = (Rotary, NoPosition),
) -> None:
    """Raises ValueError for options of attention, those in `fixed`, that a mixer with a pattern of its own leaves at their defaults.

    Other positions are refused too: such a mixer takes rotary ones or none, or none but its own.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in config.fixed and value != field.default:
            raise ValueError(
                f"{field.name}={value!r}; {mixer} has a pattern of its own, expected {field.default!r}"
            )
    if not isinstance(config.position, positions):
        taken = (
            "takes 'rope' or 'none'" if Rotary in positions else "has positions of its own, expected 'none'"
        )
        raise ValueError(f"position={config.position!r}; {mixer} {taken}")
