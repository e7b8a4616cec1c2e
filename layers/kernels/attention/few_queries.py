"""`attention` of few queries over many keys, as in steps of generation, which reads each key and value once.

    a = scale q . k   (b, s, t, g, r)       o = sum_s exp(a - m) v / sum_s exp(a - m)

Products with one query, or a few, are bound by the bytes of the keys, and a matrix product in the compiler's hands begins with
a copy of them in its own layout. Here they are sums of elementwise products over the axes of a cache as they are, which the
compiler fuses with all that selects and converts: the keys are read once, and the values once. Logits of all keys are in
memory. The backward pass is that of `xla`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layers.kernels import devices
from layers.kernels.attention import xla
from layers.kernels.attention.options import Logits, Mask, Options, Places, Tokens, places
from layers.kernels.checks import accumulation_dtype
from layers.kernels.promotion import promoting
from layers.kernels.sizes import known

# The most queries, and the fewest keys, of a call that it takes by default.
QUERIES, KEYS = 8, 128


class Rules(NamedTuple):
    """The options that are not arrays."""

    causal: bool
    mask: Mask
    logit_cap: float | None
    scale: float


def attention(q, k, v, options: Options):
    """Returns output (b, t, h, v) and log-sum-exp in two parts, as `xla.attention` does."""
    o = options
    scale = q.shape[-1] ** -0.5 if o.scale is None else o.scale
    rules = Rules(
        o.causal, Mask(o.mask.window, o.mask.dilation, o.mask.sink_tokens), o.logits.logit_cap, scale
    )
    results = _attend(rules, q, k, v, places(q, k, o), o.logits.slopes)
    return xla.with_sink(*results, o.logits.sink_logits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(rules: Rules, q, k, v, at: Places, slopes):
    """Returns the output, and the parts m and log l of the log-sum-exp."""
    (b, t, h, width), g = q.shape, k.shape[2]
    dtype = accumulation_dtype(q, k, v)
    q = q.astype(dtype).reshape(b, 1, t, g, h // g, width)
    products = rules.scale * jnp.sum(q * k.astype(dtype)[:, :, None, :, None], axis=-1)
    # A sum with what is not finite is -inf at times, which must not hide the key.
    logits = jnp.where(jnp.isfinite(products), products, jnp.nan)
    if rules.logit_cap is not None:
        logits = rules.logit_cap * jnp.tanh(logits / rules.logit_cap)
    i, j = (x.astype(jnp.int32) for x in (at.q_positions[:, None], at.kv_positions[:, :, None]))
    if slopes is not None:
        distances = jnp.abs(i - j).astype(dtype)[..., None, None]
        logits = logits - slopes.astype(dtype).reshape(1, 1, 1, g, h // g) * distances
    seen = _visible(rules, i, j, at)[..., None, None]
    logits = jnp.where(seen, logits, -jnp.inf)
    top = logits.max(1, keepdims=True)
    top = jnp.where(top == -jnp.inf, 0, top)
    weights = jnp.exp(logits - top)
    total = weights.sum(1, keepdims=True)
    empty = total == 0
    chances = (weights / jnp.where(empty, 1, total)).astype(v.dtype).astype(dtype)[..., None]
    # Selected, because the product of zero and what is not finite is NaN.
    output = jnp.sum(jnp.where(seen[..., None], chances * v.astype(dtype)[:, :, None, :, None], 0), axis=1)
    spoiled = ~jnp.isfinite(output).all(-1, keepdims=True)
    output = jnp.where(spoiled, jnp.nan, output).reshape(b, t, h, v.shape[-1])
    top = jnp.where(spoiled[..., 0], jnp.nan, jnp.where(empty, -jnp.inf, top)[:, 0]).reshape(b, t, h)
    return output, top, jnp.log(jnp.where(empty, 1, total))[:, 0].reshape(b, t, h)


def _visible(rules: Rules, i, j, at: Places):
    """Returns which keys are seen (b|1, s, t); i (b|1, 1, t) and j (b|1, s, 1) are positions."""
    mask, seen = rules.mask, jnp.ones((1, 1, 1), bool)
    if mask.window is not None:
        steps = (i - j) if rules.causal else jnp.abs(i - j)
        seen &= steps < mask.reach(rules.causal) + (not rules.causal)
        seen &= steps % mask.dilation == 0
    if mask.sink_tokens:
        seen |= j < mask.sink_tokens
    if rules.causal:
        seen &= j <= i
    if at.q_segments is not None:
        segment = at.q_segments[:, None]
        seen &= (segment == at.kv_segments[:, :, None]) & (segment != 0)
    return seen


def _forward(rules, q, k, v, at, slopes):
    return _attend(rules, q, k, v, at, slopes), (q, k, v, at, slopes)


def _backward(rules, residuals, cotangents):
    q, k, v, at, slopes = residuals
    tokens = Tokens(at.kv_segments, at.q_positions, at.kv_positions)

    def again(q, k, v, slopes):
        logits = Logits(slopes=slopes, logit_cap=rules.logit_cap)
        return xla.attention(
            q, k, v, Options(rules.causal, rules.mask, logits, at.q_segments, tokens, rules.scale)
        )

    doutput, _, dlog_total = cotangents
    _, pull = jax.vjp(again, q, k, v, slopes)
    # The log-sum-exp is m + log l, of which callers stop the gradient of m.
    dq, dk, dv, dslopes = pull((doutput.astype(v.dtype), dlog_total, jnp.zeros_like(dlog_total)))
    return dq, dk, dv, None, dslopes


_attend.defvjp(promoting(_forward), promoting(_backward))


def unsupported(*, options: Options, **_: Any) -> str | None:
    """Why the function does not compute what the options say, or None."""
    default = Options()
    for group, names in (
        ("mask", ("prefix_lengths", "block_indices", "global_keys", "global_queries")),
        ("logits", ("bias",)),
    ):
        for name in names:
            if getattr(getattr(options, group), name) is not getattr(getattr(default, group), name):
                return f"it knows causal, window, sinks, slopes, caps, segments and tokens, not {name}"
    return None


def passed_over(*, q, k, **_: Any) -> str | None:
    """Why `impl=None` leaves a call to others, or None."""
    t, s = q.shape[1], k.shape[1]
    if devices.backend() != "gpu":
        return f"matrix products are faster on {devices.backend()}"
    if known(t) and known(s) and t <= QUERIES and s >= KEYS:
        return None
    return f"it is for at most {QUERIES} queries over at least {KEYS} keys, and these are {t} and {s}"
