"""Numbers that are not finite stay in their segment, although products multiply what other tokens hide by zero.

0 x NaN is NaN: inside a chunk of a matrix form, a token that is not finite would reach every other token of the chunk.
`isolated` runs an implementation on zeros in the place of such numbers and sets what they reach afterwards: the later
tokens of their segment, and the final state if that is the last segment.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def isolated(run: Callable[..., Any], *series: str) -> Callable[..., Any]:
    """Returns `run` with padding, and what is not finite, kept from all tokens that may not see it.

    Calls without segments are left as they are. A log-decay of -inf is a decay of zero and passes.

    Args:
      run: an implementation that takes `initial_state`, `segments` and other arguments by name, and returns outputs that
        are zero at padding (b, t, ...), and a final state (b, ...).
      series: names of the arguments with tokens along axis 1; an axis of size 1 in place of b or t stands for all.
    """

    @functools.wraps(run)
    def isolating(*, initial_state, segments, **arguments):
        if segments is None:
            return run(initial_state=initial_state, segments=None, **arguments)
        spoiled = jnp.zeros(segments.shape, bool)
        for name in series:
            x = arguments[name]
            if x is None or x.ndim < 3 or x.shape[1] != segments.shape[1]:
                continue
            fit = x < jnp.inf if name == "log_decay" else jnp.isfinite(x)
            # One flag a token: autodiff keeps it for the backward pass.
            fit = fit.all(range(2, x.ndim))
            spoiled |= ~fit
            fit = fit if x.shape[0] != segments.shape[0] else fit & segments.real
            arguments[name] = jnp.where(_expanded(fit, x), x, 0)
        last = jax.lax.cummax(jnp.where(spoiled & segments.real, segments.numbers, 0), axis=1)
        if initial_state is not None:
            fit = jnp.isfinite(initial_state)
            last = jnp.where(fit.all(range(1, fit.ndim))[:, None], last, jnp.maximum(last, 1))
            initial_state = jnp.where(fit, initial_state, 0)
        out, final = run(initial_state=initial_state, segments=segments, **arguments)
        out = jnp.where(_expanded(segments.real & (last == segments.numbers), out), jnp.nan, out)
        lost = last[:, -1] >= jnp.maximum(segments.numbers.max(1), 1)
        final = jnp.where(_expanded(lost, final), jnp.nan, final)
        return jnp.where(_expanded(segments.real, out), out, 0), final

    return isolating


def times(gradient: jax.Array, factor: jax.Array, segments: Any) -> jax.Array:
    """Returns gradient * factor; with segments, zero where the gradient is zero although the factor is not finite.

    The sum of such products over tokens is a gradient that leaves out the tokens in which nobody is interested.
    """
    if segments is None:
        return gradient * factor
    fit = jnp.isfinite(factor)
    unfit = jnp.where(gradient == 0, 0, jnp.full((), jnp.nan, gradient.dtype))
    return jnp.where(fit, gradient * jnp.where(fit, factor, 0), unfit)


def _expanded(flags, x):
    return flags.reshape(*flags.shape, *[1] * (x.ndim - flags.ndim))
