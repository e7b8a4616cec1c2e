"""Tokens in mini-batches of a fixed size that begin anew with every segment, wherever calls cut them."""

import jax
import jax.numpy as jnp

from layers.segments import Segments, select_real
from layers.typing import Array, Bool, Float, Int


class MiniBatches:
    """The tokens of one call by mini-batch: those of a segment form runs of `size`, and the call may begin inside one.

    Each row has as many mini-batches as the row that needs most could have. A row of `Segments` whose number of segments is not known
    has as many as tokens, most of them empty.

    Args:
      time: t, the number of tokens.
      size: c, tokens of a mini-batch.
      start: (b), tokens that earlier calls have put into the mini-batch of the first token.
      segments: those of the tokens.
      whole: whether no row begins inside a mini-batch.

    Attributes:
      places: (b, t), the place of every token in its mini-batch, from 0.
      live: (n, b, c), whether a token stands at a place of a mini-batch.
      begins: (n, b), whether a mini-batch is the first one of a segment other than the first of its row.
      last: (b), tokens in the mini-batch that the call leaves open; 0 where it is full.
    """

    def __init__(
        self, time: int, size: int, start: Int[Array, "b"], segments: Segments | None, *, whole: bool
    ):
        rows = start.shape[0]
        self._time, self._size, self._segments = time, size, segments
        places = jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32)[None], (rows, time))
        if segments is None:
            real, places = jnp.ones((rows, time), bool), places + start[:, None]
        else:
            real = segments.real
            places = segments.positions + jnp.where(segments.numbers == 1, start[:, None], 0)
        self.places = places % size
        first = jnp.cumsum(real, axis=1, dtype=jnp.int32) == 1
        number = jnp.cumsum(real & (self.places == 0) & ~first, axis=1, dtype=jnp.int32)
        count = (time + size - 1 if whole else time + 2 * size - 2) // size
        if segments is not None and segments.packed:
            count = time if segments.most is None else min(time, count + segments.most - 1)
        self._count, slots = count, count * size
        self._slot = jnp.where(real, number * size + self.places, slots)
        here = jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32)[None], (rows, time))
        empty = jnp.full((rows, slots), time, jnp.int32)
        row = jnp.arange(rows, dtype=jnp.int32)[:, None]
        # At the places without a token stands the number of the token behind the last.
        self._token = empty.at[row, self._slot].set(here, mode="drop")
        self.live = self._by_batch(self._token < time)
        starts = jnp.zeros_like(real) if segments is None else segments.starts & real
        self.begins = self.gather(starts)[:, :, 0]
        end = jnp.where(real, self._slot, -1).max(1, initial=-1)
        self.last = jnp.where(end < 0, start, (end + 1) % size)

    def gather(
        self, x: Float[Array, "b t *f"] | Bool[Array, "b t"]
    ) -> Float[Array, "n b c *f"] | Bool[Array, "n b c"]:
        """Returns values of tokens by mini-batch, zero where there is no token."""
        padded = jnp.concatenate([x, jnp.zeros_like(x, shape=(x.shape[0], 1, *x.shape[2:]))], axis=1)
        return self._by_batch(_taken(padded, self._token))

    def scatter(self, x: Float[Array, "n b c *f"]) -> Float[Array, "b t *f"]:
        """Returns values by mini-batch at their tokens, zero at padding; the inverse of `gather`."""
        x = jnp.moveaxis(x, 0, 1)
        x = x.reshape(x.shape[0], self._count * self._size, *x.shape[3:])
        if self._time == 0:
            return x[:, :0]
        return select_real(_taken(x, jnp.minimum(self._slot, self._count * self._size - 1)), self._segments)

    def _by_batch(self, x):
        x = x.reshape(x.shape[0], self._count, self._size, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)


def _taken(x: jax.Array, index: jax.Array) -> jax.Array:
    """The entries of x (b, t, ...) at an index (b, s) along time."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)
