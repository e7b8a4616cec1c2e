"""The cross-entropy of a linear output layer, computed in pieces of the sequence.

The logits of a language model, (b, t, v), are often its largest array by far, and their gradient is another of that size.
Here neither exists as a whole. Where the loss is differentiated, each piece gives its part of the gradients along with
its losses, so that no logits are computed twice.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from layers.kernels import mixed_precision, partition
from layers.kernels.forward_mode import no_forward_mode, reverse_mode_only
from layers.kernels.promotion import promoting
from layers.kernels.shard_map_types import vary_as, vary_like
from layers.typing import Array, Bool, Float, Int

# Logits per device and piece: 1 GiB in float32.
PIECE = 2**28


class Unprojected(NamedTuple):
    """The logits of a linear output layer before they are computed: `logits` computes them.

    Attributes:
      x: vectors (b, t, d).
      matrix: output matrix (v, d), in its own type.
      logit_cap: c, if the logits are c tanh(x matrix^T / c); None for no bound.
    """

    x: Float[Array, "b t d"]
    matrix: Float[Array, "v d"]
    logit_cap: float | None = None

    @property
    def logits(self) -> Float[Array, "b t v"]:
        """The float32 logits (b, t, v), x matrix^T or bounded; products, of the gradients too, are in the type of x."""
        x, matrix, cap = self
        if x.dtype == jnp.bfloat16:
            message = no_forward_mode("the product of bfloat16 vectors with an output matrix", "float32")
            x, matrix = reverse_mode_only((x, matrix), message)
            logits = mixed_precision.product("btd,vd->btv", x, matrix, x.dtype)
        else:
            logits = jnp.einsum("btd,vd->btv", x, matrix.astype(x.dtype), preferred_element_type=jnp.float32)
        return logits if cap is None else cap * jnp.tanh(logits / cap)


class CrossEntropy(NamedTuple):
    """What `linear_cross_entropy` returns.

    Attributes:
      total: sum of the losses over the counted positions, and of the z-losses; differentiable.
      losses: cross-entropy per position in nats (b, t), 0 where it is not counted; not differentiable.
      hits: whether the label has the largest logit (b, t), False where it is not counted.
    """

    total: Float[Array, ""]
    losses: Float[Array, "b t"]
    hits: Bool[Array, "b t"]


def linear_cross_entropy(
    x: Float[Array, "b t d"],
    matrix: Float[Array, "v d"],
    labels: Int[Array, "b t"],
    counted: Bool[Array, "b t"],
    *,
    z_loss: float = 0.0,
    piece: int = PIECE,
) -> CrossEntropy:
    """Returns the cross-entropy of the logits x matrix^T, without holding all of them.

        a_p = matrix x_p,   loss_p = logsumexp(a_p) - a_p[label_p]
        total = sum over counted p of loss_p + z_loss logsumexp(a_p)^2

    Products are in the type of x, with sums in float32; all else is in float32. `x` and `labels` are ignored where they
    are not counted, even if they are not finite or out of range; a counted label out of range makes the total and the gradients NaN.

    The z-loss keeps logits near zero: Chowdhery et al. 2022 (arXiv:2204.02311).

    Args:
      x: vectors (b, t, d).
      matrix: output matrix (v, d); rounded to the type of x.
      labels: (b, t), from 0 to v - 1.
      counted: where there is a label (b, t).
      z_loss: weight of the z-loss.
      piece: the most logits that a device holds.

    Raises:
      ValueError: shapes do not fit, `z_loss` is negative, or `piece` is below 1.
    """
    b, t, d = x.shape
    if matrix.ndim != 2 or matrix.shape[1] != d:
        raise ValueError(f"matrix has shape {matrix.shape}; expected (v, {d})")
    for name, array in (("labels", labels), ("counted", counted)):
        if array.shape != (b, t):
            raise ValueError(f"{name} has shape {array.shape}; expected {(b, t)}")
    if not z_loss >= 0:
        raise ValueError(f"z_loss={z_loss}; expected at least 0")
    if piece < 1:
        raise ValueError(f"piece={piece}; expected at least 1")
    message = no_forward_mode("linear_cross_entropy", "the cross-entropy of `Unprojected.logits` in float32")
    x, matrix = reverse_mode_only((x, vary_like(matrix, x)), message)
    total, losses, hits = _cross_entropy((float(z_loss), piece), x, matrix, labels, counted)
    return CrossEntropy(total, jax.lax.stop_gradient(losses), hits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(static, x, matrix, labels, counted):
    return promoting(_over_shards)(static, x, matrix, labels, counted, differentiated=False)[0]


def _forward(static, x, matrix, labels, counted):
    results, gradients = _over_shards(static, x, matrix, labels, counted, differentiated=True)
    return results, (gradients, jnp.zeros(0, matrix.dtype))


def _backward(static, kept, cotangents):  # noqa: ARG001
    (dx, dmatrix), like = kept
    factor = cotangents[0]
    dmatrix = _over_devices(dmatrix * factor, dx)
    return (dx * factor).astype(dx.dtype), dmatrix.astype(like.dtype), None, None


_cross_entropy.defvjp(promoting(_forward), promoting(_backward))


def _over_shards(static, x, matrix, labels, counted, differentiated):
    """The results, and the gradients if `differentiated`; positions are divided over all axes that can divide them."""
    spec, names = _division(x)
    tokens, whole = jax.P(*spec), jax.P()
    gradients = ((jax.P(*spec, None), jax.P(names or None)),) if differentiated else ((),)

    def run(x, matrix, labels, counted):
        (total, losses, hits), found = _in_pieces(static, x, matrix, labels, counted, differentiated)
        if names:
            total = jax.lax.psum(total, names)
        return (total, losses, hits), found and (found[0], found[1][None])

    return partition.over_shards(
        run,
        (x, matrix.astype(x.dtype), labels, counted),
        (jax.P(*spec, None), whole, tokens, tokens),
        ((whole, tokens, tokens), *gradients),
    )


def _over_devices(parts, x):
    """The sum over the first axis, which has an entry per device.

    It is taken in the backward pass, where XLA joins it with the sum of another use's gradient, as of a tied embedding.
    """
    names = _division(x)[1]
    if not names:
        return parts[0]

    def run(part):
        return jax.lax.psum(part[0], names)

    return partition.over_shards(run, (parts,), (jax.P(names),), jax.P())


def _division(x):
    """How rows and time of x are divided, and the mesh axes that divide them."""
    spec = partition.spec_of_tokens(x)
    return spec, tuple(name for entry in spec for name in partition.names_of(entry))


def _in_pieces(static, x, matrix, labels, counted, differentiated):
    z_loss, piece = static
    b, t, _ = x.shape
    count = max(1, min(t, math.ceil(b * t * matrix.shape[0] / piece)))
    length = -(-t // count)
    arrays = jnp.where(counted[..., None], x, 0), jnp.where(counted, labels, 0), counted

    def cut(array):
        array = jnp.pad(array, ((0, 0), (0, count * length - t), *((0, 0),) * (array.ndim - 2)))
        return jnp.moveaxis(array.reshape(b, count, length, *array.shape[2:]), 1, 0)

    def join(array):
        return jnp.moveaxis(array, 0, 1).reshape(b, count * length, *array.shape[3:])[:, :t]

    def step(carry, piece_of_row):
        total, dmatrix = carry
        added, losses, hits, dlogits = _piece(z_loss, matrix, *piece_of_row, differentiated)
        if not differentiated:
            return (total + added, dmatrix), (losses, hits)
        dx = jnp.einsum("btv,vd->btd", dlogits, matrix)
        new = jnp.einsum("btv,btd->vd", dlogits, piece_of_row[0], preferred_element_type=jnp.float32)
        return (total + added, dmatrix + new), (losses, hits, dx)

    zeros = (jnp.zeros((), jnp.float32), jnp.zeros(matrix.shape, jnp.float32) if differentiated else ())
    pieces = tuple(map(cut, arrays))
    if count == 1:
        carry, out = step(zeros, tuple(a[0] for a in pieces))
        out = tuple(y[:, :t] for y in out)
    else:
        carry, out = jax.lax.scan(step, jax.tree.map(lambda z: vary_as(z, *pieces), zeros), pieces)
        out = tuple(map(join, out))
    return (carry[0], *out[:2]), (out[2], carry[1]) if differentiated else ()


def _piece(z_loss, matrix, x, labels, counted, differentiated):
    """The total, the losses, the hits and the gradient by the logits of one piece, None unless `differentiated`."""
    logits = jnp.einsum("btd,vd->btv", x, matrix, preferred_element_type=jnp.float32)
    chosen = jax.lax.broadcasted_iota(labels.dtype, logits.shape, 2) == labels[..., None]
    top = logits.max(2)
    shifted = logits - top[..., None]
    log_total = jnp.log(jnp.exp(shifted).sum(2))
    inside = (labels >= 0) & (labels < matrix.shape[0])
    losses = log_total - jnp.where(chosen, shifted, 0).sum(2)
    losses = jnp.where(counted, jnp.where(inside, losses, jnp.nan), 0)
    lse = jnp.where(counted, top + log_total, 0)
    hits = counted & (jnp.argmax(logits, 2) == labels)
    total = losses.sum() + z_loss * (lse**2).sum()
    if not differentiated:
        return total, losses, hits, None
    # The top and the logarithm of the sum stay apart: their sum would round the latter away where logits are large.
    p = jnp.exp(shifted - log_total[..., None])
    dlogits = (1 + 2 * z_loss * lse)[..., None] * p - chosen
    dlogits = jnp.where(inside[..., None], dlogits, jnp.nan)
    return total, losses, hits, jnp.where(counted[..., None], dlogits, 0).astype(x.dtype)
