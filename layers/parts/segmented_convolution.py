"""Long convolutions that stay within segments, and the past inputs that a causal one carries from call to call.

A kernel that does not change with time cannot forget, so each segment is convolved on its own: padding is moved to the
ends of the rows, and a loop takes the first segment of all rows, then the second, and so on. A batch without packing
costs one convolution; a packed batch costs one per segment of the fullest row. If `Segments` states that padding is at
the ends, nothing is moved; if it states that no row is packed, there is no loop.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from layers.kernels.forward_mode import reverse_mode_only
from layers.kernels.long_conv import long_conv
from layers.segments import SegmentIds, Segments, select_real
from layers.typing import Array, Float, Int, Num

NO_FORWARD_MODE = (
    "packed rows run in a loop over their segments, which has no forward-mode differentiation (jax.jvp, jax.jacfwd); pass one "
    "segment per row, with Segments.of(segment_ids, packed=False), or use reverse mode (jax.grad, jax.vjp, jax.jacrev)"
)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["order", "place", "numbers"],
    meta_fields=["in_order"],
)
@dataclasses.dataclass(frozen=True)
class Packing:
    """The places of each row's tokens once its padding is moved to its end.

    Attributes:
      order: index of the token at each place, (b, t).
      place: place of each token, (b, t).
      numbers: number of the segment at each place, from 1, (b, t); 0 is padding.
      in_order: whether padding is at the ends already, so that every token stays in its place; static.
    """

    # Any, since transformations replace arrays by placeholders.
    order: Any
    place: Any
    numbers: Any
    in_order: bool = False

    def pack(self, x: Num[Array, "b t *f"]) -> Num[Array, "b t *f"]:
        """Returns x with the padding of each row at its end."""
        return x if self.in_order else take_tokens(x, self.order)

    def unpack(self, x: Num[Array, "b t *f"]) -> Num[Array, "b t *f"]:
        """Returns the inverse of `pack`; values at padding have no meaning."""
        return x if self.in_order else take_tokens(x, self.place)


def pack_rows(segment_ids: Int[Array, "b t"] | Segments) -> Packing:
    """Returns how to move the padding of each row to its end."""
    segments = Segments.of(segment_ids)
    if segments.padding == "end":
        same = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32)[None], segments.shape)
        return Packing(same, same, segments.numbers, in_order=True)
    order = jnp.argsort(~segments.real, axis=1, stable=True).astype(jnp.int32)
    place = jnp.maximum(jnp.cumsum(segments.real, axis=1, dtype=jnp.int32) - 1, 0)
    return Packing(order, place, take_tokens(segments.numbers, order))


def take_tokens(x: Num[Array, "b t *f"], index: Int[Array, "b s"]) -> Num[Array, "b s *f"]:
    """Returns the tokens of each row at `index`."""
    return jnp.take_along_axis(x, jnp.expand_dims(index, tuple(range(2, x.ndim))), axis=1)


def convolve(
    x: Float[Array, "b t d"],
    kernel: Float[Array, "d l"],
    *,
    ahead: Float[Array, "d m"] | None = None,
    past: Float[Array, "b s d"] | None = None,
    segment_ids: SegmentIds = None,
) -> Float[Array, "b t d"]:
    """Returns y_t = sum_j kernel_j x_{t-j} + sum_j ahead_j x_{t+1+j}, over the segment of t.

    Args:
      x: input.
      kernel: taps on the token itself and earlier ones; computed in float32 or wider.
      ahead: taps on later tokens, at most t of them; not with `past`.
      past: the l - 1 inputs before the first real token, latest last, zeros before its segment begins.
      segment_ids: see `layers.kernels.segments`; the output at padding is zero.
    """
    if x.shape[1] == 0:
        return x
    if segment_ids is None:
        return _convolve(x, kernel, ahead, past)
    segments = Segments.of(segment_ids)
    packing = pack_rows(segments)
    if segments.packed:
        arrays = reverse_mode_only((packing.pack(x), kernel, ahead, past), NO_FORWARD_MODE)
        y = _by_segment(*arrays, packing.numbers)
    else:
        y = _convolve(packing.pack(select_real(x, segments)), kernel, ahead, past)
    return select_real(packing.unpack(y), segments)


def last_inputs(
    past: Float[Array, "b s d"], x: Float[Array, "b t d"], segment_ids: SegmentIds
) -> Float[Array, "b s d"]:
    """Returns the last s inputs of the current segment, latest last, with zeros before its start.

    Args:
      past: the result for the tokens before x, cleared already if they belong to another segment.
      x: new inputs.
    """
    size, time = past.shape[1], x.shape[1]
    if size == 0 or time == 0:
        return past
    if segment_ids is None:
        return jnp.concatenate([past, x.astype(past.dtype)], axis=1)[:, time:]
    packing = pack_rows(segment_ids)
    inputs = jnp.concatenate([past, packing.pack(x).astype(past.dtype)], axis=1)
    numbers = jnp.pad(packing.numbers, ((0, 0), (size, 0)), constant_values=1)
    index = (numbers != 0).sum(1)[:, None] - size + jnp.arange(size)[None]
    current = take_tokens(numbers, index) == numbers.max(1)[:, None]
    return jnp.where(current[..., None], take_tokens(inputs, index), 0)


def _convolve(x, kernel, ahead, past):
    if ahead is None:
        return long_conv(x, kernel, initial_state=past)[0]
    # The row is padded with zeros to a circle twice as long; the taps at the end of the circle look ahead.
    time = x.shape[1]
    both = [_fit(kernel, time), _fit(ahead, time)[:, ::-1]]
    circle = jnp.pad(x, ((0, 0), (0, time), (0, 0)))
    return long_conv(circle, jnp.concatenate(both, axis=1), circular=True)[0][:, :time]


def _fit(kernel, length):
    return jnp.pad(kernel[:, :length], ((0, 0), (0, max(0, length - kernel.shape[1]))))


def _one_segment(x, kernel, ahead, past, numbers, number):
    own = (numbers == number)[..., None]
    past = None if past is None else jnp.where(number == 1, past, 0)
    return jnp.where(own, _convolve(jnp.where(own, x, 0), kernel, ahead, past), 0)


@jax.custom_vjp
def _by_segment(x, kernel, ahead, past, numbers):
    """Returns the sum over segments by a loop of data-dependent length; its transpose is a loop of the same length."""

    def add(number, y):
        return y + _one_segment(x, kernel, ahead, past, numbers, number)

    return jax.lax.fori_loop(1, numbers.max(initial=0) + 1, add, jnp.zeros_like(x))


def _forward(*arguments):
    return _by_segment(*arguments), arguments


def _backward(arguments, dy):
    *arrays, numbers = arguments

    def add(number, totals):
        _, pullback = jax.vjp(lambda *arrays: _one_segment(*arrays, numbers, number), *arrays)
        return jax.tree.map(jnp.add, totals, pullback(dy))

    zeros = tuple(jax.tree.map(jnp.zeros_like, array) for array in arrays)
    return *jax.lax.fori_loop(1, numbers.max(initial=0) + 1, add, zeros), None


_by_segment.defvjp(_forward, _backward)
