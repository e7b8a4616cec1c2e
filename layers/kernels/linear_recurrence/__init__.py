"""h_t = a_t h_{t-1} + x_t, elementwise, real or complex: the core of S5, LRU, RG-LRU, HGRN and of every EMA."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from layers.kernels import checks
from layers.kernels.dispatch import Implementation, by_name_only, dispatch
from layers.kernels.linear_recurrence import gpu, reference, tpu, xla
from layers.kernels.promotion import joint_dtype
from layers.kernels.segments import SegmentIds
from layers.kernels.sequence_parallel import Recurrence
from layers.typing import Array, Num

__all__ = ["Piece", "compose", "linear_recurrence", "summarize"]

IMPLEMENTATIONS = {
    "gpu": Implementation(gpu.linear_recurrence, gpu.unsupported_reason, gpu.passed_over_reason, "gpu"),
    "tpu": Implementation(tpu.linear_recurrence, tpu.unsupported_reason, tpu.passed_over_reason, "tpu"),
    "xla": Implementation(xla.linear_recurrence),
    "reference": Implementation(
        reference.linear_recurrence, passed_over_reason=by_name_only, forward_mode=True
    ),
}


def linear_recurrence(
    a: Num[Array, "#b #t d"],
    x: Num[Array, "b t d"],
    *,
    initial_state: Num[Array, "b d"] | None = None,
    segment_ids: SegmentIds = None,
    reverse: bool = False,
    impl: str | None = None,
) -> tuple[Num[Array, "b t d"], Num[Array, "b d"]]:
    """Returns every h_t of h_t = a_t h_{t-1} + x_t along time, and the last.

    A diagonal linear recurrence: the core of S5 (Smith et al. 2023, arXiv:2208.04933), LRU (Orvieto et al. 2023,
    arXiv:2303.06349) and RG-LRU (De et al. 2024, arXiv:2402.19427).

    Forward-mode differentiation (jax.jvp) needs impl="reference". Reverse mode, and forward over reverse as in
    jax.hessian, have no such limit.

    Args:
      a: decay per step; an axis of size 1 in place of b or t stands for all (a time-invariant system).
      x: input per step. a and x may each be real or complex.
      initial_state: h_0, zero if None. It belongs to the segment of the first real token in the running direction.
      segment_ids: 0 is padding, which leaves the state as it is; a change of id resets the state
        (see `layers.kernels.segments`).
      reverse: whether to run from the last step to the first, h_t = a_t h_{t+1} + x_t.
      impl: "gpu", "tpu", "xla", "reference", or None for the best.

    Returns:
      h: (b, t, d), in the type of x, or complex if a or x is.
      final_state: (b, d), the state after the last step run, float32 or wider (complex64 if h is complex).

    Raises:
      ValueError, TypeError: a shape, type or `impl` does not fit; the message names the argument.
    """
    sizes: dict[str, int] = {}
    checks.check_floating(a=a, x=x, initial_state=initial_state)
    checks.check_shape("x", x, "b t d", sizes)
    checks.check_shape("a", a, "b|1 t|1 d", sizes)
    if initial_state is not None:
        checks.check_shape("initial_state", initial_state, "b d", sizes)
    segments = checks.check_segment_ids(segment_ids, sizes)
    if (
        initial_state is not None
        and jnp.iscomplexobj(initial_state)
        and not (jnp.iscomplexobj(a) or jnp.iscomplexobj(x))
    ):
        raise TypeError("initial_state is complex but a and x are real; expected a real initial_state")
    output = joint_dtype(x.dtype, jnp.complex64) if jnp.iscomplexobj(a) else x.dtype
    if x.shape[1] == 0:
        dtype = checks.accumulation_dtype(a, x, initial_state)
        state = (
            jnp.zeros((x.shape[0], x.shape[2]), dtype)
            if initial_state is None
            else initial_state.astype(dtype)
        )
        return x.astype(output), state
    h, final = dispatch(
        "linear_recurrence",
        IMPLEMENTATIONS,
        impl,
        over_time=OVER_TIME,
        a=a,
        x=x,
        initial_state=initial_state,
        segments=segments,
        reverse=reverse,
    )
    return h.astype(output), final


class Piece(NamedTuple):
    """The effect of consecutive tokens on the state: h -> decay * h + state."""

    decay: jax.Array
    state: jax.Array


def summarize(
    a: Num[Array, "#b #t d"],
    x: Num[Array, "b t d"],
    *,
    segment_ids: SegmentIds = None,
    reverse: bool = False,
    impl: str | None = None,
) -> Piece:
    """Returns the effect of consecutive tokens, with leaves (b, d).

    The first real token continues the segment before it; where it begins another segment, the caller sets `decay` to
    zero.
    """
    probe = jnp.ones((x.shape[0], x.shape[2]), checks.accumulation_dtype(a, x))
    options = {"segment_ids": segment_ids, "reverse": reverse, "impl": impl}
    _, state = linear_recurrence(a, x, **options)
    _, decay = linear_recurrence(a, jnp.zeros_like(x), initial_state=probe, **options)
    return Piece(decay, state)


def compose(first: Piece, second: Piece) -> Piece:
    """Returns the effect of `first` followed by `second`. Associative; the identity is Piece(1, 0)."""
    return Piece(second.decay * first.decay, second.decay * first.state + second.state)


def _piece(arguments, segments, impl):
    names = "a", "x", "reverse"
    return summarize(**{name: arguments[name] for name in names}, segment_ids=segments, impl=impl)


OVER_TIME = Recurrence(
    axes={"a": ("b t h",), "x": ("b t h",), "initial_state": ("b h",)},
    outputs="b t h",
    state="b h",
    summarize=_piece,
    compose=compose,
    elementwise=True,
)
