"""Attention of one query per row over a cache, in equal parts of all its tiles (stream-K)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layers.kernels.attention import Piece
from layers.typing import Array, Float, Int


class Schedule(NamedTuple):
    """Which tiles of a cache each unit reads: unit u those of numbers u `each` to (u + 1) `each` - 1, below `total`.

    Tiles are numbered through all rows, through the key/value heads of a row, and through the tokens of a head.

    Attributes:
      ends: number after the last tile of each row and head, (b g).
      each, total: tiles per unit, and of all.
    """

    ends: Int[Array, "n"]
    each: Int[Array, ""]
    total: Int[Array, ""]

    @classmethod
    def of(cls, lengths: Int[Array, "b"], *, groups: int, units: int, tile: int) -> "Schedule":
        """Returns the schedule of rows of these lengths with `groups` key/value heads, in tiles of `tile` tokens."""
        ends = jnp.cumsum(jnp.repeat(-(-lengths // tile), groups))
        return cls(ends, -(-ends[-1] // units), ends[-1])

    def tiles(self, step: Any, units: int) -> tuple[Int[Array, "u"], Int[Array, "u"]]:
        """Returns the row and head (as one number) and the tile in it that each unit reads in a step; beyond all if it has none."""
        number = jnp.arange(units) * self.each + step
        owner = jnp.searchsorted(self.ends, number, side="right")
        begun = jnp.concatenate([jnp.zeros(1, self.ends.dtype), self.ends])
        return owner, number - begun[jnp.minimum(owner, len(self.ends) - 1)]


def lean_attention(
    q: Float[Array, "b h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g v"],
    lengths: Int[Array, "b"],
    *,
    logits_of: Any,
    units: int,
    tile: int,
) -> Piece:
    """Returns softmax attention over the first `lengths` keys of each row, as a `Piece` of (b, 1, h, ...).

        o = sum_tiles exp(lse_i) o_i / sum_tiles exp(lse_i)

    Each of the `units` reads the same number of consecutive tiles, across heads and rows, one per step, as in Lean Attention
    (Sanovar et al. 2024, arXiv:2405.10480). The number of steps is that of the tiles that have tokens: rows of different lengths and
    slots without tokens cost nothing.

    Args:
      logits_of: function from query heads (u, r, k) of units, keys (u, n, k), rows (u,), heads (u,) and slots (u, n) to float32
        logits (u, r, n), -inf at hidden keys.
      units: number of parts.
      tile: tokens in a tile.
    """
    (b, h, width), (s, groups), features = q.shape, k.shape[1:3], v.shape[3]
    each = h // groups
    schedule = Schedule.of(lengths, groups=groups, units=units, tile=tile)
    q = q.reshape(b, groups, each, width)

    def step(number, carry):
        owner, place = schedule.tiles(number, units)
        inside = jnp.minimum(owner, b * groups - 1)
        row, group = inside // groups, inside % groups
        slots = place[:, None] * tile + jnp.arange(tile)[None]
        there = (slots < lengths[row][:, None]) & (owner < b * groups)[:, None]
        at = row[:, None], jnp.minimum(slots, s - 1), group[:, None]
        logits = logits_of(q[row, group], k[at], row, group, at[1])
        logits = jnp.where(there[:, None], logits, -jnp.inf)
        top = logits.max(2)
        powers = jnp.exp(logits - jnp.where(jnp.isfinite(top), top, 0.0)[..., None])
        values = jnp.where(there[..., None], v[at], 0).astype(jnp.float32)
        sums = powers.sum(2), jnp.einsum("urn,unv->urv", powers, values, precision=jax.lax.Precision.HIGHEST)
        return merged(carry, (top, *sums), inside)

    def merged(carry, new, owner):
        """Returns (largest logit, sum of powers, weighted values) of each row and head with those of a step."""
        top, total, output = carry
        highest = jnp.maximum(top, jax.ops.segment_max(new[0], owner, len(top)))
        base = jnp.where(jnp.isfinite(highest), highest, 0.0)
        old, factor = jnp.exp(top - base), jnp.exp(new[0] - base[owner])
        total = total * old + jax.ops.segment_sum(new[1] * factor, owner, len(top))
        more = jax.ops.segment_sum(new[2] * factor[..., None], owner, len(top))
        return highest, total, output * old[..., None] + more

    count = b * groups
    empty = (
        jnp.full((count, each), -jnp.inf),
        jnp.zeros((count, each)),
        jnp.zeros((count, each, features)),
    )
    top, total, output = jax.lax.fori_loop(0, schedule.each, step, empty)
    output = output / jnp.where(total > 0, total, 1.0)[..., None]
    return Piece(output.reshape(b, 1, h, features), (top + jnp.log(total)).reshape(b, 1, h))
