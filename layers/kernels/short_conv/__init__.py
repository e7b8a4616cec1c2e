"""Depthwise causal convolution of width 2 to 8: the local mixing before Mamba, Hyena and the delta rule."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from layers.kernels import checks
from layers.kernels.dispatch import Implementation, by_name_only, dispatch
from layers.kernels.segments import SegmentIds
from layers.kernels.short_conv import gpu, reference, tpu, xla
from layers.kernels.short_conv.over_time import Convolution
from layers.typing import Array, Float

__all__ = ["Piece", "compose", "short_conv", "summarize"]

IMPLEMENTATIONS = {
    "gpu": Implementation(gpu.short_conv, gpu.unsupported_reason, gpu.passed_over_reason, "gpu"),
    "tpu": Implementation(tpu.short_conv, tpu.unsupported_reason, tpu.passed_over_reason, "tpu"),
    "xla": Implementation(xla.short_conv),
    "reference": Implementation(reference.short_conv, passed_over_reason=by_name_only, forward_mode=True),
}
WIDTHS = range(2, 9)
ACTIVATIONS = (None, "silu")


def short_conv(
    x: Float[Array, "b t d"],
    weight: Float[Array, "w d"],
    bias: Float[Array, " d"] | None = None,
    *,
    activation: str | None = None,
    initial_state: Float[Array, "b w-1 d"] | None = None,
    segment_ids: SegmentIds = None,
    impl: str | None = None,
) -> tuple[Float[Array, "b t d"], Float[Array, "b w-1 d"]]:
    """Returns every channel convolved with its own w taps, and the last w - 1 inputs.

    The last tap is for the current token:

        y_t = activation(bias + sum_{j<w} weight_j x_{t-(w-1)+j})

    The short convolution of H3 (Fu et al. 2022, arXiv:2212.14052), Hyena (Poli et al. 2023, arXiv:2302.10866) and
    Mamba (Gu and Dao 2023, arXiv:2312.00752).

    Forward-mode differentiation (jax.jvp) needs impl="reference". Reverse mode, and forward over reverse as in
    jax.hessian, have no such limit.

    Args:
      x: input.
      weight: the taps, oldest first, between 2 and 8 of them.
      bias: added before the activation.
      activation: None or "silu".
      initial_state: the w - 1 inputs before the sequence, oldest first; zero if None. It belongs to the segment of the
        first real token.
      segment_ids: taps reach over padding (0) to earlier tokens of the same segment and never into another one. The
        output at padding is 0 (see `layers.kernels.segments`).
      impl: "gpu" (Hopper), "tpu", "xla", "reference", or None for the best. The kernels take padding that ends the rows.

    Returns:
      y: (b, t, d), in the type of x.
      final_state: (b, w - 1, d), the last w - 1 real inputs of the last segment, oldest first, with zeros before its
        beginning (or what `initial_state` holds). float32 or wider.

    Raises:
      ValueError, TypeError: a shape, type, width, activation or `impl` does not fit; the message names the argument.
    """
    sizes: dict[str, int] = {}
    checks.check_real(x=x, weight=weight, bias=bias, initial_state=initial_state)
    checks.check_shape("x", x, "b t d", sizes)
    checks.check_shape("weight", weight, "w d", sizes)
    if sizes["w"] not in WIDTHS:
        raise ValueError(
            f"weight has {sizes['w']} taps; expected {WIDTHS[0]} to {WIDTHS[-1]} (see long_conv for longer ones)"
        )
    if bias is not None:
        checks.check_shape("bias", bias, "d", sizes)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r}; expected None or 'silu'")
    sizes["m"] = sizes["w"] - 1
    if initial_state is not None:
        checks.check_shape("initial_state", initial_state, "b m d", sizes)
    segments = checks.check_segment_ids(segment_ids, sizes)
    if x.shape[1] == 0:
        dtype = checks.accumulation_dtype(x, weight, bias, initial_state)
        if initial_state is None:
            return x, jnp.zeros((sizes["b"], sizes["m"], sizes["d"]), dtype)
        return x, initial_state.astype(dtype)
    y, final = dispatch(
        "short_conv",
        IMPLEMENTATIONS,
        impl,
        over_time=OVER_TIME,
        x=x,
        weight=weight,
        bias=bias,
        activation=activation,
        initial_state=initial_state,
        segments=segments,
    )
    return y.astype(x.dtype), final


class Piece(NamedTuple):
    """The effect of consecutive tokens on the state: h -> h moved `length` places into the past, plus `state`.

    A length of w - 1 leaves nothing of the earlier state.
    """

    length: jax.Array
    state: jax.Array


def summarize(x: Float[Array, "b t d"], width: int, *, segment_ids: SegmentIds = None) -> Piece:
    """Returns the effect of consecutive tokens on a convolution with `width` taps: leaves (b,) and (b, w - 1, d).

    The first real token continues the segment before it; where it begins another segment, the caller sets the length to
    w - 1.
    """
    sizes: dict[str, int] = {}
    checks.check_real(x=x)
    checks.check_shape("x", x, "b t d", sizes)
    segments = checks.check_segment_ids(segment_ids, sizes)
    if width not in WIDTHS:
        raise ValueError(f"width={width}; expected {WIDTHS[0]} to {WIDTHS[-1]}")
    memory = width - 1
    _, state = short_conv(x, jnp.zeros((width, x.shape[2]), x.dtype), segment_ids=segments)
    if segments is None:
        return Piece(jnp.full((x.shape[0],), min(x.shape[1], memory), jnp.int32), state)
    length = jnp.minimum(segments.real.sum(1, dtype=jnp.int32), memory)
    if segments.packed:
        length = jnp.where(segments.starts.any(1), memory, length)
    return Piece(length, state)


def compose(first: Piece, second: Piece) -> Piece:
    """Returns the effect of `first` followed by `second`. Associative; the identity is Piece(0, 0)."""
    memory = first.state.shape[1]
    index = jnp.arange(memory)[None] + second.length[:, None]
    moved = jnp.take_along_axis(first.state, jnp.minimum(index, memory - 1)[..., None], axis=1)
    moved = jnp.where((index < memory)[..., None], moved, 0)
    return Piece(jnp.minimum(first.length + second.length, memory), moved + second.state)


def _piece(arguments, segments, impl):
    del impl  # the last inputs as they are
    return summarize(arguments["x"], arguments["weight"].shape[0], segment_ids=segments)


OVER_TIME = Convolution(
    axes={"x": ("b t h",), "weight": ("w h",), "bias": ("h",), "initial_state": ("b w h",)},
    outputs="b t h",
    state="b w h",
    summarize=_piece,
    compose=compose,
)
