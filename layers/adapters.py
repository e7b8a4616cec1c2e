"""Low-rank adapters of linear maps (Hu et al. 2021, arXiv:2106.09685), which are trained where the maps are not."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.parameters import Linear, axes_of, declared
from layers.typing import Array, Float

# The optimizer group of all factors.
GROUP = "lora"


def scale_of(alpha: float, rank: int, stabilized: bool) -> float:
    """Returns the scale s of an adapter; see `LowRank`."""
    return alpha / (math.sqrt(rank) if stabilized else rank)


def alpha_of(scale: float, rank: int, stabilized: bool) -> float:
    """Returns the alpha of an adapter of the scale, without what rounding adds; the inverse of `scale_of`."""
    return float(f"{scale * (math.sqrt(rank) if stabilized else rank):.12g}")


class LowRank(nnx.Module):
    """What a linear map W (inputs, outputs) gains: the matrix s A B of the rank r.

        y = x W + s (x A) B,     s = alpha / r, or alpha / sqrt(r) if it is rank-stabilized

    A (inputs, r) starts uniform in +-1 / sqrt(inputs) and B (r, outputs) at zero, so that the map starts as it was. Both are
    float32; products are in the type of the map's outputs. The factors of stacked layers are stacked like their maps.
    Rank-stabilized: Kalajdzievski 2023 (arXiv:2312.03732).

    Attributes:
      a, b: the factors.
      alpha: numerator of the scale.
      stabilized: whether the scale is that of rank stabilization.
    """

    def __init__(self, a: nnx.Param, b: nnx.Param, *, alpha: float, stabilized: bool):
        self.a, self.b = a, b
        self.alpha, self.stabilized = alpha, stabilized

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
        """The matrix s A B in float32."""
        return self.scale * jnp.matmul(self.a[...], self.b[...], precision=jax.lax.Precision.HIGHEST)

    def __call__(self, x: Float[Array, "*rows inputs"], dtype: Any) -> Float[Array, "*rows outputs"]:
        """Returns s (x A) B in `dtype`."""
        inner = x.astype(dtype) @ self.a[...].astype(dtype)
        return self.scale * (inner @ self.b[...].astype(dtype))


def adapter_of(
    linear: Linear, a: jax.Array, b: jax.Array, *, alpha: float, stabilized: bool = False
) -> LowRank:
    """Returns an adapter of a linear map with these factors, divided over a mesh of devices like the map."""
    axes, layers = axes_of(linear.kernel), linear.kernel.get_metadata().get("layers")
    factors = (
        declared(a, group=GROUP, axes=(*axes[:-1], None)),
        declared(b, group=GROUP, axes=(*axes[:-2], None, axes[-1])),
    )
    for factor in factors:
        if layers is not None:
            factor.set_metadata(layers=layers)
    return LowRank(*factors, alpha=alpha, stabilized=stabilized)


def new_adapter(linear: Linear, rank: int, *, alpha: float, stabilized: bool, rngs: nnx.Rngs) -> LowRank:
    """Returns an adapter of a linear map, or of stacked ones, that adds nothing yet.

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
    return adapter_of(linear, a, b, alpha=alpha, stabilized=stabilized)
