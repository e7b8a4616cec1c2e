"""Numbers that are not finite stay in their segment and reach no earlier token, although products multiply them by zero.

0 x NaN is NaN: inside a chunk of a matrix form, a token that is not finite would reach every other token of the chunk,
and a sum over tokens its gradient. `isolated` runs an implementation on zeros in the place of such numbers and sets what
they reach afterwards. A row without segment ids is one segment.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from layers.kernels.sizes import known


def isolated(run: Callable[..., Any], *series: str, readers: tuple[str, ...] = ()) -> Callable[..., Any]:
    """Returns `run` with padding, and what is not finite, kept from all tokens that may not see it.

    A token with a number that is not finite makes its outputs and those of the later tokens of its segment NaN, and the
    final state if that is the last segment; where the number is that of a reader, such as a query, its own outputs alone.
    Outputs that are NaN for this reason have no gradient. A log-decay of -inf is a decay of zero and passes.

    Args:
      run: an implementation that takes `initial_state`, `segments` and other arguments by name, and returns outputs that
        are zero at padding (b, t, ...), and a final state (b, ...).
      series: names of the arguments with tokens along axis 1; an axis of size 1 in place of b or t stands for all. The
        first is never None.
      readers: those of them that no state depends on.
    """

    @functools.wraps(run)
    def isolating(*, initial_state, segments, **arguments):
        batch, time = arguments[series[0]].shape[:2]
        if segments is None and known(time) and time == 1:
            # There is no other token, and decoding takes as few operations as possible.
            return run(initial_state=initial_state, segments=None, **arguments)
        own = spoiled = jnp.zeros((batch, time), bool)
        for name in series:
            x = arguments[name]
            if x is None or x.ndim < 3 or x.shape[1] != time:
                continue
            fit = x < jnp.inf if name == "log_decay" else jnp.isfinite(x)
            # One flag a token: autodiff keeps it for the backward pass.
            fit = fit.all(range(2, x.ndim))
            own, spoiled = (own | ~fit, spoiled) if name in readers else (own, spoiled | ~fit)
            if segments is not None and x.shape[0] == batch:
                fit &= segments.real
            arguments[name] = jnp.where(_expanded(fit, x), x, 0)
        lost = jnp.zeros((batch,), bool)
        if initial_state is not None:
            fit = jnp.isfinite(initial_state)
            lost = ~fit.all(range(1, fit.ndim))
            initial_state = jnp.where(fit, initial_state, 0)
        reached, lost = _reached(spoiled, lost, segments)
        out, final = run(initial_state=initial_state, segments=segments, **arguments)
        out = jnp.where(_expanded(own | reached, out), jnp.nan, out)
        if segments is not None:
            out = jnp.where(_expanded(segments.real, out), out, 0)
        return out, jnp.where(_expanded(lost, final), jnp.nan, final)

    return isolating


def isolated_tokens(mix: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a causal `mix(x, carried, segments)` with tokens of x that are not finite kept from earlier ones, as `isolated` does.

    For what is no primitive: `mix` runs on zeros in the place of such tokens and of carried numbers that are not finite.
    Outputs at padding stay as they are.
    """

    def isolating(x, carried, segments):
        batch, time, _ = x.shape
        if known(time) and (time == 0 or (segments is None and time == 1)):
            return mix(x, carried, segments)
        fit = jnp.isfinite(x).all(2)
        lost = jnp.zeros((batch,), bool)
        for leaf in jax.tree.leaves(carried):
            lost |= ~jnp.isfinite(leaf).all(range(1, leaf.ndim))
        carried = jax.tree.map(lambda leaf: jnp.where(jnp.isfinite(leaf), leaf, 0), carried)
        reached, lost = _reached(~fit, lost, segments)
        y, after = mix(jnp.where(fit[..., None], x, 0), carried, segments)
        if segments is not None:
            reached &= segments.real
        after = jax.tree.map(lambda leaf: _lost_where(lost, leaf), after)
        return jnp.where(reached[..., None], jnp.nan, y), after

    return isolating


def _reached(spoiled, lost, segments):
    """Tokens (b, t) and final states (b) that spoiled tokens reach, or initial states (b) that are `lost`."""
    if segments is None or not segments.packed:
        if segments is not None:
            spoiled &= segments.real
        never = jnp.iinfo(jnp.int32).max
        time = jnp.arange(spoiled.shape[1], dtype=jnp.int32)[None]
        first = jnp.where(spoiled, time, never).min(1)
        first = jnp.where(lost, -1, first)
        return time >= first[:, None], first < never
    last = jax.lax.cummax(jnp.where(spoiled & segments.real, segments.numbers, 0), axis=1)
    last = jnp.where(lost[:, None], jnp.maximum(last, 1), last)
    return last == segments.numbers, last[:, -1] >= jnp.maximum(segments.numbers.max(1), 1)


def cleaned(series: Mapping[str, jax.Array], taps: int) -> tuple[dict, dict, jax.Array]:
    """Returns what a causal `long_conv` runs on, and where what is not finite stands and reaches.

    Args:
      series: arrays (b, t, d) of the names x, input_gate and output_gate, and initial_state (b, taps - 1, d); x at least.
      taps: l, the number of taps.

    Returns:
      The arrays with zeros at tokens of which a number is not finite; those tokens by array, as flags (b, t, 1); and the
      outputs that they reach, (b, t, 1).
    """
    unfit = {name: ~jnp.isfinite(v).all(2, keepdims=True) for name, v in series.items()}
    inputs = unfit["x"] | unfit["input_gate"] if "input_gate" in unfit else unfit["x"]
    if "initial_state" in unfit:
        inputs = jnp.concatenate([unfit["initial_state"], inputs], axis=1)
    reached = reached_by(inputs[..., 0], taps)[:, -series["x"].shape[1] :, None]
    if "output_gate" in unfit:
        reached |= unfit["output_gate"]
    return {name: jnp.where(unfit[name], 0, v) for name, v in series.items()}, unfit, reached


def reached_by(unfit: jax.Array, taps: int) -> jax.Array:
    """Returns which outputs of a causal convolution with some taps see an input that is flagged; both are (b, t)."""
    place = jnp.arange(unfit.shape[1], dtype=jnp.int32)[None]
    if taps >= unfit.shape[1]:
        return place >= jnp.where(unfit, place, unfit.shape[1]).min(1, keepdims=True)
    return place - jax.lax.cummax(jnp.where(unfit, place, -taps), axis=1) < taps


def times(gradient: jax.Array, factor: jax.Array) -> jax.Array:
    """Returns gradient * factor, and zero where the gradient is zero although the factor is not finite.

    The sum of such products over tokens is a gradient that leaves out the tokens in which nobody is interested.
    """
    fit = jnp.isfinite(factor)
    unfit = jnp.where(gradient == 0, 0, jnp.full((), jnp.nan, gradient.dtype))
    return jnp.where(fit, gradient * jnp.where(fit, factor, 0), unfit)


def _lost_where(lost, leaf):
    """NaN in rows of a state that are lost; counts, which have none, stay."""
    return (
        jnp.where(_expanded(lost, leaf), jnp.nan, leaf) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf
    )


def _expanded(flags, x):
    return flags.reshape(*flags.shape, *[1] * (x.ndim - flags.ndim))
