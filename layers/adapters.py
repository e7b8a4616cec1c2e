"""Low-rank adapters of linear maps (Hu et al. 2021, arXiv:2106.09685), which are trained where the maps are not."""

import contextlib
import contextvars
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.dropout import dropout
from layers.parameters import axes_of, declared
from layers.typing import Array, Float, Int, Key

# The optimizer group of all factors.
GROUP = "lora"


# The key of the call, and the number of adapters that have drawn from it.
_draws: contextvars.ContextVar[list[Any] | None] = contextvars.ContextVar("draws", default=None)


@contextlib.contextmanager
def dropping(key: Key[Array, ""] | None) -> Iterator[None]:
    """Context in which adapters with dropout draw from a key, each in turn; they drop nothing without a key or outside."""
    token = _draws.set(None if key is None else [key, 0])
    try:
        yield
    finally:
        _draws.reset(token)


def in_training() -> bool:
    """Returns whether layers are called inside `dropping` with a key, as in training."""
    return _draws.get() is not None


def scale_of(alpha: float, rank: int, stabilized: bool) -> float:
    """Returns the scale s of an adapter; see `LowRank`."""
    return alpha / (math.sqrt(rank) if stabilized else rank)


def alpha_of(scale: float, rank: int, stabilized: bool) -> float:
    """Returns the alpha of an adapter of the scale, without what rounding adds; the inverse of `scale_of`."""
    return float(f"{scale * (math.sqrt(rank) if stabilized else rank):.12g}")


class LowRank(nnx.Module):
    """What a linear map W (inputs, outputs) gains: the matrix s A B of the rank r.

        y = x W + s (drop(x) A) B,     s = alpha / r, or alpha / sqrt(r) if it is rank-stabilized

    A (inputs, r) starts uniform in +-1 / sqrt(inputs) and B (r, outputs) at zero, so that the map starts as it was. Both are
    float32; products are in the type of the map's outputs. The factors of stacked layers are stacked like their maps.
    Rank-stabilized: Kalajdzievski 2023 (arXiv:2312.03732).

    Attributes:
      a, b: the factors.
      alpha: numerator of the scale.
      stabilized: whether the scale is that of rank stabilization.
      dropout: rate with which inputs are dropped in training (see `dropping`).
    """

    def __init__(self, a: nnx.Param, b: nnx.Param, *, alpha: float, stabilized: bool, dropout: float = 0.0):
        self.a, self.b = a, b
        self.alpha, self.stabilized, self.dropout = alpha, stabilized, dropout

    @property
    def rank(self) -> int:
        """Number r of columns of A."""
        return self.a.shape[-1]

    @property
    def scale(self) -> float:
        """Factor s."""
        return scale_of(self.alpha, self.rank, self.stabilized)

    @property
    def product(self) -> Float[Array, "*layers inputs outputs"]:
        """The matrix s A B in float32.

        Raises:
          ValueError: inputs are dropped, which a layer that takes the matrix cannot do.
        """
        if self.dropout and _draws.get() is not None:
            raise ValueError(
                f"an adapter with dropout={self.dropout} stands at a map whose layer takes the matrix and not its outputs; expected "
                "lora.dropout=0, or lora.targets without it"
            )
        return self.scale * jnp.matmul(self.a[...], self.b[...], precision=jax.lax.Precision.HIGHEST)

    def rows(self, ids: Int[Array, "*rows"], dtype: Any) -> Float[Array, "*rows outputs"]:
        """Returns rows of s A B in `dtype`, those of the tokens of an embedding."""
        return self.scale * (self.a[...][ids].astype(dtype) @ self.b[...].astype(dtype))

    def __call__(self, x: Float[Array, "*rows inputs"], dtype: Any) -> Float[Array, "*rows outputs"]:
        """Returns s (x A) B in `dtype`."""
        if self.dropout and (draws := _draws.get()) is not None:
            draws[1] += 1
            # Beyond what a layer splits its key into.
            x = dropout(x, self.dropout, jax.random.fold_in(draws[0], (1 << 16) + draws[1]))
        inner = x.astype(dtype) @ self.a[...].astype(dtype)
        return self.scale * (inner @ self.b[...].astype(dtype))


def adapter_of(
    linear: Any, a: jax.Array, b: jax.Array, *, alpha: float, stabilized: bool = False, dropout: float = 0.0
) -> LowRank:
    """Returns an adapter of a linear map or embedding with these factors, divided over a mesh of devices like the map."""
    axes, layers = axes_of(linear.kernel), linear.kernel.get_metadata().get("layers")
    factors = (
        declared(a, group=GROUP, axes=(*axes[:-1], None)),
        declared(b, group=GROUP, axes=(*axes[:-2], None, axes[-1])),
    )
    for factor in factors:
        if layers is not None:
            factor.set_metadata(layers=layers)
    return LowRank(*factors, alpha=alpha, stabilized=stabilized, dropout=dropout)


def new_adapter(linear: Any, rank: int, *, rngs: nnx.Rngs, **options: Any) -> LowRank:
    """Returns an adapter of a linear map, of stacked ones, or of an embedding, that adds nothing yet.

    Args:
      options: those of `LowRank`.

    Raises:
      ValueError: the rank is larger than that of the matrix can be.
    """
    *layers, inputs, outputs = linear.kernel.shape
    if rank > min(inputs, outputs):
        raise ValueError(
            f"rank={rank} for a matrix ({inputs}, {outputs}); expected at most {min(inputs, outputs)}"
        )
    bound = inputs**-0.5
    a = jax.random.uniform(rngs.params(), (*layers, inputs, rank), jnp.float32, -bound, bound)
    b = jnp.zeros((*layers, rank, outputs), jnp.float32)
    return adapter_of(linear, a, b, **options)
