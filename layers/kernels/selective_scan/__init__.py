"""h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_t^T, y_t = h_t c_t: the selective scan of Mamba."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from layers.kernels import checks
from layers.kernels.dispatch import Implementation, by_name_only, dispatch
from layers.kernels.isolation import isolated
from layers.kernels.segments import SegmentIds, Segments, select_real
from layers.kernels.selective_scan import gpu, gpu_pieces, reference, xla
from layers.kernels.sequence_parallel import Recurrence
from layers.typing import Array, Float

__all__ = ["Piece", "compose", "selective_scan", "summarize"]

SERIES, READERS = ("x", "dt", "b", "c", "gate"), ("c", "gate")
IMPLEMENTATIONS = {
    "gpu": Implementation(gpu.selective_scan, gpu.unsupported_reason, gpu.passed_over_reason, "gpu"),
    "xla": Implementation(isolated(xla.selective_scan, *SERIES, readers=READERS)),
    "gpu_pieces": Implementation(
        gpu_pieces.selective_scan, gpu_pieces.unsupported_reason, by_name_only, "gpu"
    ),
    "reference": Implementation(
        isolated(reference.selective_scan, *SERIES, readers=READERS),
        passed_over_reason=by_name_only,
        forward_mode=True,
    ),
}


def selective_scan(
    x: Float[Array, "b t d"],
    dt: Float[Array, "b t d"],
    a: Float[Array, "d n"],
    b: Float[Array, "b t g n"],
    c: Float[Array, "b t g n"],
    *,
    skip: Float[Array, " d"] | None = None,
    gate: Float[Array, "b t d"] | None = None,
    dt_bias: Float[Array, " d"] | None = None,
    dt_softplus: bool = False,
    initial_state: Float[Array, "b d n"] | None = None,
    segment_ids: SegmentIds = None,
    impl: str | None = None,
) -> tuple[Float[Array, "b t d"], Float[Array, "b d n"]]:
    """Returns the outputs and last state of a diagonal state space whose step size, input and output depend on the token.

        h_t = exp(dt_t a) h_{t-1} + (dt_t x_t) b_t^T
        y_t = (h_t c_t + skip x_t) silu(gate_t)

    Each of the d channels has n states. The core of Mamba (Gu and Dao 2023, arXiv:2312.00752). The input is discretised by
    dt b (Euler), the decay exactly, as in the released models.

    Forward-mode differentiation (jax.jvp) needs impl="reference". Reverse mode, and forward over reverse as in
    jax.hessian, have no such limit.

    Args:
      x: input.
      dt: step size per token and channel, at least zero; with dt_softplus any real number. Where a sum with dt_bias or a
        rate has the wrong sign, it is refused if known, and NaN in outputs of compiled code.
      a: continuous-time decay rates, at most 0. The log-decay of a step is dt a.
      b, c: input and output vectors per group; channel i reads group i // (d / g).
      skip: weight of the current input in the output (D in the paper); 0 if None.
      gate: the output is multiplied by silu(gate) (z in the paper); by 1 if None.
      dt_bias: added to dt, before the softplus.
      dt_softplus: whether softplus(dt + dt_bias) replaces dt + dt_bias.
      initial_state: h_0, zero if None. It belongs to the segment of the first real token.
      segment_ids: 0 is padding, which leaves the state as it is and gives the output 0; a change of id resets the
        state (see `layers.kernels.segments`).
      impl: "gpu" (for Hopper; at most 32 states per channel), "gpu_pieces" (the same in pieces of time), "xla", "reference", or
        None for the best of "gpu" and "xla".

    Returns:
      y: (b, t, d), in the type of x.
      final_state: (b, d, n), the state after the last token, float32 or wider.

    Raises:
      ValueError, TypeError: a shape, type, sign or `impl` does not fit; the message names the argument.
    """
    arrays = {"x": x, "dt": dt, "a": a, "b": b, "c": c, "skip": skip, "gate": gate, "dt_bias": dt_bias}
    segments = _check(arrays, initial_state, segment_ids)
    arrays["a"], arrays["dt"] = _signed(a, dt, dt_bias, dt_softplus)
    if x.shape[1] == 0:
        dtype = checks.accumulation_dtype(*arrays.values(), initial_state)
        if initial_state is None:
            return x, jnp.zeros((x.shape[0], *a.shape), dtype)
        return x, initial_state.astype(dtype)
    y, final = dispatch(
        "selective_scan",
        IMPLEMENTATIONS,
        impl,
        over_time=OVER_TIME,
        **arrays,
        dt_softplus=dt_softplus,
        initial_state=initial_state,
        segments=segments,
    )
    return y.astype(x.dtype), final


def _check(arrays, initial_state, segment_ids):
    patterns = {"x": "b t d", "dt": "b t d", "a": "d n", "b": "b t g n", "c": "b t g n"}
    patterns |= {"skip": "d", "gate": "b t d", "dt_bias": "d"}
    checks.check_real(**arrays, initial_state=initial_state)
    sizes: dict[str, int] = {}
    for name, pattern in patterns.items():
        if arrays.get(name) is not None:
            checks.check_shape(name, arrays[name], pattern, sizes)
    if sizes["g"] == 0 or sizes["d"] % sizes["g"]:
        raise ValueError(
            f"b has {sizes['g']} groups, x has {sizes['d']} channels; expected a number of groups that divides the channels"
        )
    if initial_state is not None:
        checks.check_shape("initial_state", initial_state, "b d n", sizes)
    return checks.check_segment_ids(segment_ids, sizes)


def _signed(a, dt, dt_bias, dt_softplus):
    """Returns rates and step sizes that make no state grow: others are refused if known, and NaN in compiled code."""
    a = checks.not_positive("a", a, "a rate of decay is negative, such as -jnp.exp(log_rate)")
    if dt_softplus:
        return a, dt
    positive = "a step size is positive, such as jax.nn.softplus(dt), which dt_softplus=True computes"
    if dt_bias is None:
        return a, checks.not_negative("dt", dt, positive)
    dtype = checks.accumulation_dtype(dt, dt_bias)
    total = checks.not_negative(
        "dt + dt_bias", dt.astype(dtype) + dt_bias.astype(dtype)[None, None], positive
    )
    return a, jnp.where(jnp.isnan(total), jnp.nan, dt)


class Piece(NamedTuple):
    """The effect of consecutive tokens on the state: h -> decay * h + state."""

    decay: jax.Array
    state: jax.Array


def summarize(
    x: Float[Array, "b t d"],
    dt: Float[Array, "b t d"],
    a: Float[Array, "d n"],
    b: Float[Array, "b t g n"],
    *,
    dt_bias: Float[Array, " d"] | None = None,
    dt_softplus: bool = False,
    segment_ids: SegmentIds = None,
    impl: str | None = None,
) -> Piece:
    """Returns the effect of consecutive tokens, with leaves (b, d, n).

    The first real token continues the segment before it; where it begins another segment, the caller sets `decay` to
    zero.
    """
    segments = Segments.of(segment_ids)
    options = {"dt_bias": dt_bias, "dt_softplus": dt_softplus, "segment_ids": segments}
    _, state = selective_scan(x, dt, a, b, b, **options, impl=impl)
    a, dt = _signed(a, dt, dt_bias, dt_softplus)
    dt = dt.astype(state.dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.astype(state.dtype)[None, None]
    if dt_softplus:
        dt = jax.nn.softplus(dt)
    dt = select_real(dt, segments)
    decay = jnp.exp(dt.sum(1)[..., None] * a.astype(state.dtype)[None])
    if segments is not None and segments.packed:
        decay = jnp.where(segments.starts.any(1)[:, None, None], 0, decay)
    return Piece(decay, state)


def compose(first: Piece, second: Piece) -> Piece:
    """Returns the effect of `first` followed by `second`. Associative; the identity is Piece(1, 0)."""
    return Piece(second.decay * first.decay, second.decay * first.state + second.state)


def _piece(arguments, segments, impl):
    names = "x", "dt", "a", "b", "dt_bias", "dt_softplus"
    return summarize(**{name: arguments[name] for name in names}, segment_ids=segments, impl=impl)


OVER_TIME = Recurrence(
    axes=dict.fromkeys(("x", "dt", "gate"), ("b t h",))
    | dict.fromkeys(("b", "c"), ("b t h n",))
    | dict.fromkeys(("skip", "dt_bias"), ("h",))
    | {"a": ("h n",), "initial_state": ("b h n",)},
    outputs="b t h",
    state="b h n",
    summarize=_piece,
    compose=compose,
    elementwise=True,
)
