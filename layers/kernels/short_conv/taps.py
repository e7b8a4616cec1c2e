"""Where the taps of a short convolution find their inputs.

`earlier(v, k)` holds at each token the value of v at the k-th real token before it in its segment, and zero if there is
none. The first tokens of a sequence also reach into the state, and the state after it holds its last tokens. With
m = width - 1 those move as blocks (b, m, d). Each movement has its adjoint beside it, so that the backward pass never
scatters.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from layers.kernels.segments import Segments


@dataclasses.dataclass(frozen=True)
class Whole:
    """One segment and no padding: all movements are shifts."""

    time: int
    memory: int

    def earlier(self, v, k):
        """v_{t-k}."""
        return _shift(v, k, self.time)

    def later(self, v, k):
        """v_{t+k}, the adjoint of `earlier`."""
        return _shift(v, -k, self.time)

    def first(self, v):
        """The first m tokens."""
        return _shift(v, 0, self.memory)

    def from_first(self, block):
        """A block as the first m tokens, the adjoint of `first`."""
        return _shift(block, 0, self.time)

    def last(self, v):
        """The last m tokens, zeros before a shorter sequence."""
        return _shift(v, self.memory - self.time, self.memory)

    def from_last(self, block):
        """A block as the last m tokens, the adjoint of `last`."""
        return _shift(block, self.time - self.memory, self.time)

    def remaining(self, state):
        """What is left of the earlier state, at its new place."""
        return _shift(state, -self.time, self.memory)

    def from_remaining(self, block):
        """The adjoint of `remaining`."""
        return _shift(block, self.time, self.memory)

    def real(self, v):
        """v, with zeros at padding."""
        return v


class Beside:
    """Segments with padding behind them: movements are shifts, masked where they cross from one segment to another."""

    def __init__(self, segments: Segments, memory: int):
        self.memory, self.time = memory, segments.shape[1]
        self._number = segments.numbers
        self._segments = self._number.max(1, keepdims=True)
        tokens = segments.real.sum(1, keepdims=True, dtype=jnp.int32)
        time = jnp.arange(self.time, dtype=jnp.int32)[None]
        in_last = segments.real & (self._number == self._segments)
        # The number of real tokens behind each one, and m outside the last segment.
        self._last_rank = jnp.where(in_last, tokens - 1 - time, memory)
        self._length = jnp.minimum(in_last.sum(1, keepdims=True, dtype=jnp.int32), memory)

    def earlier(self, v, k):
        return self._beside(v, k)

    def later(self, v, k):
        return self._beside(v, -k)

    def first(self, v):
        number = _shift(self._number[..., None], 0, self.memory)
        return jnp.where(number == 1, _shift(v, 0, self.memory), 0)

    def from_first(self, block):
        return jnp.where(self._number[..., None] == 1, _shift(block, 0, self.time), 0)

    def last(self, v):
        places = [self._at_last(i) for i in range(self.memory)]
        return jnp.stack([jnp.where(at, v, 0).sum(1, dtype=v.dtype) for at in places], axis=1)

    def from_last(self, block):
        entries = [jnp.where(self._at_last(i), block[:, i : i + 1], 0) for i in range(self.memory)]
        return functools.reduce(jnp.add, entries)

    def remaining(self, state):
        return self._slide(state, -1)

    def from_remaining(self, block):
        return self._slide(block, 1)

    def real(self, v):
        return jnp.where((self._number > 0)[..., None], v, 0)

    def _beside(self, v, k):
        number = self._number[..., None]
        same = (number > 0) & (number == _shift(number, k, self.time))
        return jnp.where(same, _shift(v, k, self.time), 0)

    def _at_last(self, i):
        """The token that entry i of the state after the sequence holds, as a mask (b, t, 1)."""
        return (self._last_rank == self.memory - 1 - i)[..., None]

    def _slide(self, block, sign):
        """The block moved by the length of the last segment; zero in rows whose last segment is not the first."""
        stays = self._segments <= 1
        moved = [
            jnp.where((stays & (self._length == n))[..., None], _shift(block, sign * n, self.memory), 0)
            for n in range(self.memory)
        ]
        return functools.reduce(jnp.add, moved)


class Scattered:
    """Segments with padding anywhere: all movements are gathers along time."""

    def __init__(self, segments: Segments, memory: int):
        self.memory = memory
        real, self._number = segments.real, segments.numbers
        time = jnp.arange(segments.shape[1], dtype=jnp.int32)[None]
        self._time = jnp.zeros_like(self._number) + time
        none = segments.shape[1]
        # The nearest real token strictly before and after each token: -1 and `none` if there is none.
        last = jax.lax.cummax(jnp.where(real, time, -1), axis=1)
        first = jax.lax.cummin(jnp.where(real, time, none), axis=1, reverse=True)
        self._before = jnp.pad(last[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
        self._after = jnp.pad(first[:, 1:], ((0, 0), (0, 1)), constant_values=none)
        self._first, self._last = first[:, :1], last[:, -1:]
        rank = jnp.cumsum(real, axis=1, dtype=jnp.int32) - real.astype(jnp.int32)
        self._first_rank = jnp.where(self._number == 1, rank, memory)
        self._segments = self._number.max(1, keepdims=True)
        from_end = jnp.cumsum(real[:, ::-1], axis=1, dtype=jnp.int32)[:, ::-1] - real.astype(jnp.int32)
        self._last_rank = jnp.where(real & (self._number == self._segments), from_end, memory)
        # The number of real tokens of the last segment, at most m.
        self._length = jnp.minimum((self._last_rank < memory).sum(1, keepdims=True, dtype=jnp.int32), memory)

    def earlier(self, v, k):
        return self._linked(v, self._time, k, self._before)

    def later(self, v, k):
        return self._linked(v, self._time, k, self._after)

    def first(self, v):
        index = self._chain(self._first, self._after)
        return _gather(v, index, self._number_at(index) == 1)

    def from_first(self, block):
        return _gather(block, self._first_rank, self._first_rank < self.memory)

    def last(self, v):
        index = self._chain(self._last, self._before)[:, ::-1]
        return _gather(v, index, (self._number_at(index) == self._segments) & (self._segments > 0))

    def from_last(self, block):
        return _gather(block, self.memory - 1 - self._last_rank, self._last_rank < self.memory)

    def remaining(self, state):
        return self._slide(state, self._length)

    def from_remaining(self, block):
        return self._slide(block, -self._length)

    def real(self, v):
        return jnp.where((self._number > 0)[..., None], v, 0)

    def _linked(self, v, index, k, links):
        for _ in range(k):
            index = _follow(index, links)
        return _gather(v, index, (self._number_at(index) == self._number) & (self._number > 0))

    def _chain(self, index, links):
        """The m tokens that follow from one, as (b, m)."""
        chain = [index]
        while len(chain) < self.memory:
            chain.append(_follow(chain[-1], links))
        return jnp.concatenate(chain, axis=1)

    def _number_at(self, index):
        return jnp.where(_within(index, self._number), _take(self._number, index), 0)

    def _slide(self, block, by):
        """block[i + by], zero outside and in rows whose last segment is not the first."""
        index = jnp.arange(self.memory, dtype=jnp.int32)[None] + by
        return _gather(block, index, _within(index, block) & (self._segments <= 1))


def _shift(v, k, time):
    """v_{t-k} for t = 0 .. time - 1, zero where there is no such token."""
    return jax.lax.pad(v, jnp.zeros((), v.dtype), ((0, 0, 0), (k, time - k - v.shape[1], 0), (0, 0, 0)))


def _within(index, v):
    return (index >= 0) & (index < v.shape[1])


def _take(v, index):
    index = jnp.clip(index, 0, v.shape[1] - 1)
    return jnp.take_along_axis(v, index, axis=1, mode="promise_in_bounds")


def _follow(index, links):
    """The index one link further, unchanged outside the row."""
    return jnp.where(_within(index, links), _take(links, index), index)


def _gather(v, index, valid):
    index = jnp.clip(index, 0, v.shape[1] - 1)[..., None]
    taken = jnp.take_along_axis(v, index, axis=1, mode="promise_in_bounds")
    return jnp.where(valid[..., None], taken, 0)
