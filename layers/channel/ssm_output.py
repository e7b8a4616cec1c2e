"""Output maps that S4, S5, LRU and related models apply after the state space model, in the same residual branch.

With g = gelu(x), sigma the logistic function, and dropout after g and after y that is tied over time (one draw for all
tokens):

    gelu        y = g
    half_glu1   y = g * sigma(W g)
    half_glu2   y = x * sigma(W g)
    full_glu    y = (W1 g) * sigma(W2 g)

(Smith et al. 2023, arXiv:2208.04933, and its code.)
"""

import jax
import jax.numpy as jnp
from flax import nnx

from layers.dropout import dropout
from layers.options import ActivationDtype, Fraction, checked_dataclass
from layers.parameters import linear
from layers.segments import select_masked
from layers.typing import Array, Bool, Float, Key


@checked_dataclass
class OutputConfig:
    """Options of the output maps."""

    width: int
    dropout: Fraction = 0.0
    dtype: ActivationDtype = jnp.float32


class Gelu(nnx.Module):
    """y = gelu(x)."""

    def __init__(self, config: OutputConfig, *, rngs: nnx.Rngs):
        self.config = config

    def __call__(
        self,
        x: Float[Array, "b t d"],
        *,
        mask: Bool[Array, "b t"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "b t d"]:
        """Maps each token."""
        return dropout(jax.nn.gelu(select_masked(x, mask)), self.config.dropout, key, shared_axes=(1,))


class _Gated(nnx.Module):
    """Gated maps: sigma(W g) times `gated(x, g)` of the subclass."""

    def __init__(self, config: OutputConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.gate = linear(config.width, config.width, axes=("embed", None), dtype=config.dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        *,
        mask: Bool[Array, "b t"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "b t d"]:
        """Maps each token."""
        inner, outer = (None, None) if key is None else jax.random.split(key)
        x = select_masked(x, mask)
        g = dropout(jax.nn.gelu(x), self.config.dropout, inner, shared_axes=(1,))
        y = self.gated(x, g) * jax.nn.sigmoid(self.gate(g))
        return dropout(y, self.config.dropout, outer, shared_axes=(1,))


class HalfGLU1(_Gated):
    """y = g * sigma(W g)."""

    def gated(self, x: jax.Array, g: jax.Array) -> jax.Array:
        """Returns the activation."""
        return g


class HalfGLU2(_Gated):
    """y = x * sigma(W g)."""

    def gated(self, x: jax.Array, g: jax.Array) -> jax.Array:
        """Returns the input without activation."""
        return x


class FullGLU(_Gated):
    """y = (W1 g) * sigma(W2 g)."""

    def __init__(self, config: OutputConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.value = linear(config.width, config.width, axes=("embed", None), dtype=config.dtype, rngs=rngs)

    def gated(self, x: jax.Array, g: jax.Array) -> jax.Array:
        """Returns a second linear map of the activation."""
        return self.value(g)
