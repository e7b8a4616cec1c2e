"""Low-rank maps, from which mixers compute gates, decays and learning rates."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.parameters import Initializer, linear
from layers.typing import Array, Float

_lecun_normal = nnx.initializers.lecun_normal()


class LowRank(nnx.Module):
    """y = activation(x W_1) W_2 + b with W_1 (d, rank) and W_2 (rank, outputs).

    `axes` are the logical axes of inputs and outputs; the rank has none. The first product is computed in `dtype`. The
    second, small product and the result are float32, for gates whose logarithm is near zero.
    """

    def __init__(
        self,
        width: int,
        rank: int,
        outputs: int,
        *,
        activation: Callable[[jax.Array], jax.Array] | None = None,
        bias: bool = True,
        init: tuple[Initializer, Initializer] = (_lecun_normal, _lecun_normal),
        group: str = "default",
        axes: tuple[str | None, str | None] = ("embed", "heads"),
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        self.inner = linear(
            width, rank, axes=(axes[0], None), bias=False, init=init[0], group=group, dtype=dtype, rngs=rngs
        )
        self.outer = linear(
            rank, outputs, axes=(None, axes[1]), bias=bias, init=init[1], group=group, rngs=rngs
        )

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t n"]:
        """Returns the map of each token."""
        inner = self.inner(x).astype(jnp.float32)
        return self.outer(inner if self.activation is None else self.activation(inner))
