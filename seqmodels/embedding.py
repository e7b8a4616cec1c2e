"""From inputs to vectors."""

import math

import jax.numpy as jnp
from flax import nnx

from layers.parameters import linear, parameter
from layers.typing import Array, Float, Num
from seqmodels.config import InputConfig


class Embedding(nnx.Module):
    """Token ids (b, t) by look-up, or vectors (b, t, c) by a linear map, to (b, t, d)."""

    def __init__(self, config: InputConfig, width: int, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        if config.vocab_size is not None:
            stddev = 1 / math.sqrt(width) if config.embedding_stddev is None else config.embedding_stddev
            self.table = parameter(rngs, nnx.initializers.normal(stddev), (config.vocab_size, width))
        else:
            self.map = linear(config.input_size, width, dtype=dtype, rngs=rngs)

    def __call__(self, inputs: Num[Array, "b t *c"]) -> Float[Array, "b t d"]:
        """Embeds inputs.

        Raises:
          ValueError: the rank or type of the inputs is not what the config says.
        """
        if self.config.vocab_size is not None:
            if inputs.ndim != 2 or not jnp.issubdtype(inputs.dtype, jnp.integer):
                raise ValueError(
                    f"inputs are {inputs.dtype}{list(inputs.shape)}; expected integer token ids (b, t)"
                )
            return self.table[...].astype(self.dtype)[inputs]
        if inputs.ndim != 3 or inputs.shape[-1] != self.config.input_size:
            raise ValueError(f"inputs have shape {inputs.shape}; expected (b, t, {self.config.input_size})")
        return self.map(inputs)

    def logits(self, x: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """Float32 scores of every token: x times the transposed table."""
        table = self.table[...].astype(self.dtype)
        return jnp.einsum("btd,vd->btv", x, table, preferred_element_type=jnp.float32)
