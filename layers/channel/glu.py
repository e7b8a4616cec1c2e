"""Channel mixers: maps that act on each token separately, `y = channel(x, mask=None, key=None)` with x (b t d).

`mask` (b t) is true at real tokens: whatever stands at others reaches no average and no gradient. `key` is passed only in
training and draws the dropout inside.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from layers.dropout import dropout
from layers.options import ActivationDtype, Fraction, checked_dataclass
from layers.parameters import linear
from layers.registry import choose
from layers.segments import select_masked
from layers.typing import Array, Bool, Float, Key

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "gelu": jax.nn.gelu,
    "gelu_erf": functools.partial(jax.nn.gelu, approximate=False),
    "silu": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "identity": lambda x: x,
}


@checked_dataclass
class MLPConfig:
    """Options of `MLP` and `GLU`.

    `hidden` is the inner width: by default 4 width for `MLP`, and for `GLU`, which has three matrices instead of two,
    8/3 width rounded up to a multiple of `multiple_of`. `activation` names one of `ACTIVATIONS`; "gelu" is the approximation
    by tanh and "gelu_erf" the exact function. `scale` is a factor on the output and `gate_scale` one on the gate of `GLU` before
    its activation (Falcon-H1).
    """

    width: int
    hidden: int | None = None
    activation: str | None = None
    multiple_of: int = 8
    bias: bool = False
    scale: float = 1.0
    gate_scale: float = 1.0
    dropout: Fraction = 0.0
    dtype: ActivationDtype = jnp.float32

    def scaled(self, y: jax.Array) -> jax.Array:
        """Returns an output times its factor."""
        return y if self.scale == 1 else self.scale * y


class MLP(nnx.Module):
    """y = s W2 f(W1 x), with f = gelu by default."""

    def __init__(self, config: MLPConfig, *, rngs: nnx.Rngs):
        if config.gate_scale != 1:
            raise ValueError(
                f"gate_scale={config.gate_scale} of an mlp, which has no gate; swiglu and geglu have one"
            )
        self.config = config
        self.activation = choose("activation", ACTIVATIONS, config.activation or "gelu")
        hidden = config.hidden or 4 * config.width
        options = {"bias": config.bias, "dtype": config.dtype, "rngs": rngs}
        self.up = linear(config.width, hidden, axes=("embed", "mlp"), **options)
        self.down = linear(hidden, config.width, axes=("mlp", "embed"), **options)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        *,
        mask: Bool[Array, "b t"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "b t d"]:
        """Maps each token; dropout acts on the hidden features."""
        x = select_masked(x, mask)
        return self.config.scaled(self.down(dropout(self.activation(self.up(x)), self.config.dropout, key)))


class GLU(nnx.Module):
    """y = s W2 (f(s_g Wg x) * W1 x): SwiGLU with f = silu, GEGLU with gelu (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: MLPConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.activation = choose("activation", ACTIVATIONS, config.activation or "silu")
        hidden = config.hidden or -(-(8 * config.width) // (3 * config.multiple_of)) * config.multiple_of
        options = {"bias": config.bias, "dtype": config.dtype, "rngs": rngs}
        self.gate = linear(config.width, hidden, axes=("embed", "mlp"), **options)
        self.up = linear(config.width, hidden, axes=("embed", "mlp"), **options)
        self.down = linear(hidden, config.width, axes=("mlp", "embed"), **options)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        *,
        mask: Bool[Array, "b t"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "b t d"]:
        """Maps each token; dropout acts on the hidden features."""
        config, x = self.config, select_masked(x, mask)
        gate = self.gate(x) if config.gate_scale == 1 else config.gate_scale * self.gate(x)
        return config.scaled(self.down(dropout(self.activation(gate) * self.up(x), config.dropout, key)))


class GEGLU(GLU):
    """`GLU` with f = gelu."""

    def __init__(self, config: MLPConfig, *, rngs: nnx.Rngs):
        super().__init__(dataclasses.replace(config, activation=config.activation or "gelu"), rngs=rngs)
