"""Segments read as images: scan orders of their pixels, and filters over both axes.

The tokens of a segment are pixels in rows of `columns`, from the top left; the last row may be shorter. Whatever is said here of
an image holds for each segment by itself, so that padding and packing mean what they mean elsewhere.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers.parameters import NO_DECAY, parameter, uniform_fan_in
from layers.parts.each_segment import mix_each_segment
from layers.parts.segmented_convolution import take_tokens
from layers.segments import Segments
from layers.typing import Array, Float, Int

ORDERS = ("row", "column", "snake", "hilbert", "window")
REVERSED = "_reversed"
# VMamba's cross scan.
CROSS = ("row", "column", "row_reversed", "column_reversed")


class Scan(NamedTuple):
    """One order in which the tokens of a batch are read.

    Attributes:
      index: the token at each place of the scan, (t,) or (b, t).
      place: the place of each token.
    """

    index: np.ndarray | Int[Array, "b t"]
    place: np.ndarray | Int[Array, "b t"]

    def read(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Returns the tokens in the order of the scan."""
        return _take(x, self.index)

    def restore(self, y: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Returns the inverse of `read`."""
        return _take(y, self.place)


def check_orders(config: Any) -> None:
    """Raises ValueError unless the orders of a config are of `ORDERS`, perhaps with "_reversed" behind, and its window is read."""
    orders = config.orders
    unknown = [name for name in orders if name.removesuffix(REVERSED) not in ORDERS]
    if unknown or not orders:
        raise ValueError(
            f"orders={tuple(orders)}; expected one or more of {', '.join(ORDERS)}, each also with {REVERSED!r} behind its name"
        )
    if config.window != type(config).window and not {"window", "window" + REVERSED} & {*orders}:
        raise ValueError(
            f"window={config.window} has no effect with orders={tuple(orders)}; expected the order 'window' too"
        )


def scan_places(order: str, time: int, columns: int, window: int = 1) -> Int[np.ndarray, " t"]:
    """Returns the place in the scan of each of `time` pixels; fewer pixels keep their order among each other.

        row      along rows, from top to bottom
        column   along columns, from left to right
        snake    along rows, every second one backwards
        hilbert  along a Hilbert curve through each of the squares, a power of 2 wide, that hold all columns
        window   through windows of `window` x `window` pixels along rows, and along rows in each

    With "_reversed" behind it the order is read from its end.
    """
    row, column = np.divmod(np.arange(time), columns)
    name = order.removesuffix(REVERSED)
    if name == "column":
        keys = (row, column)
    elif name == "snake":
        keys = (np.where(row % 2 == 0, column, columns - 1 - column), row)
    elif name == "hilbert":
        bits = (columns - 1).bit_length()
        keys = (_along_hilbert(row % 2**bits, column, bits), row >> bits)
    elif name == "window":
        keys = (column % window, row % window, column // window, row // window)
    else:
        keys = (column, row)
    index = np.lexsort(keys)  # The last key is the first to decide.
    places = np.empty(time, np.int32)
    places[index[::-1] if order.endswith(REVERSED) else index] = np.arange(time, dtype=np.int32)
    return places


def scans(
    orders: Sequence[str], time: int, columns: int, segments: Segments | None, window: int = 1
) -> tuple[list[Scan], Segments | None]:
    """Returns one `Scan` per order, and the segments of the tokens as each of them reads: the same for all, padding last."""
    places = [scan_places(order, time, columns, window) for order in orders]
    if segments is None:
        return [Scan(np.argsort(place).astype(np.int32), place) for place in places], None
    last = jnp.where(segments.real, segments.numbers, time + 1)
    found = []
    for place in places:
        index = jnp.lexsort((jnp.asarray(place)[segments.positions], last), axis=1).astype(jnp.int32)
        found.append(Scan(index, jnp.argsort(index, axis=1).astype(jnp.int32)))
    if segments.padding != "end":
        numbers = take_tokens(segments.numbers, found[0].index)
        segments = Segments.of(numbers, padding="end", packed=segments.packed)
    return found, segments


def as_grid(x: Float[Array, "b t d"], columns: int) -> Float[Array, "b r c d"]:
    """Returns rows of pixels (b, r, c, d), with zeros behind the last token."""
    rows = -(-x.shape[1] // columns)
    return jnp.pad(x, ((0, 0), (0, rows * columns - x.shape[1]), (0, 0))).reshape(
        x.shape[0], rows, columns, x.shape[2]
    )


def as_tokens(grid: Float[Array, "b r c d"], time: int) -> Float[Array, "b t d"]:
    """Returns the first `time` pixels of images, row by row."""
    b, rows, columns, width = grid.shape
    return grid.reshape(b, rows * columns, width)[:, :time]


class ImageFilter(nnx.Module):
    """A filter of every channel by itself over both axes of images, centred at the pixel; zeros surround an image.

    Weights (taps, taps, e) start uniform in +-1/taps.

    Args:
      channels: e.
      taps: width of the filter along each axis, odd.
      stride: the outputs are those at every `stride`-th pixel of both axes.
    """

    def __init__(self, channels: int, taps: int, *, stride: int = 1, rngs: nnx.Rngs):
        self.stride = stride
        axes = (None, None, "inner")
        self.weight = parameter(rngs, uniform_fan_in(), (taps, taps, channels), axes=axes)
        self.bias = parameter(rngs, nnx.initializers.zeros_init(), (channels,), axes=("inner",), **NO_DECAY)

    def __call__(self, x: Float[Array, "b r c d"]) -> Float[Array, "b p q d"]:
        """Returns the filtered image."""
        return _filtered(x, self.weight[...], self.bias[...], self.stride)

    def tokens(
        self, x: Float[Array, "b t d"], columns: int, segments: Segments | None
    ) -> Float[Array, "b t d"]:
        """Returns the filtered images of sequences of pixels; packed ones cost one pass per segment of the fullest row."""

        def filtered(weights, x, _):
            return as_tokens(_filtered(as_grid(x, columns), *weights, 1), x.shape[1])

        weights = (self.weight[...], self.bias[...])
        return on_images(filtered, weights, x, segments)


def on_images(
    function: Callable, weights: object, x: Float[Array, "b t d"], segments: Segments | None
) -> Float[Array, "b t f"]:
    """Returns function(weights, x, lengths) of every image by itself, with zeros from its length on; lengths is None for whole rows.

    See `layers.parts.each_segment.mix_each_segment` for what the function may do.
    """
    if segments is None:
        return function(weights, x, None)
    return mix_each_segment(function, weights, x, segment_ids=segments)


def _filtered(x, weight, bias, stride):
    half = weight.shape[0] // 2
    y = jax.lax.conv_general_dilated(
        x,
        weight[:, :, None].astype(x.dtype),
        (stride, stride),
        ((half, half), (half, half)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[3],
    )
    return y + bias.astype(y.dtype)[None, None, None]


def _take(x, index):
    if index.ndim == 2:
        return take_tokens(x, index)
    straight = np.arange(len(index))
    if (index == straight).all():
        return x
    return x[:, ::-1] if (index[::-1] == straight).all() else x[:, index]


def _along_hilbert(row, column, bits):
    """Distances along the Hilbert curve of a square 2^bits wide, from its upper to its lower left corner."""
    # Rows stand where the usual construction has x, so that squares below each other are joined.
    x, y, distance = row.copy(), column.copy(), np.zeros_like(row)
    for bit in reversed(range(bits)):
        right, up = (x >> bit) & 1, (y >> bit) & 1
        distance += ((3 * right) ^ up) << (2 * bit)
        flip = (up == 0) & (right == 1)
        x, y = np.where(flip, 2**bits - 1 - x, x), np.where(flip, 2**bits - 1 - y, y)
        x, y = np.where(up == 0, y, x), np.where(up == 0, x, y)
    return distance
