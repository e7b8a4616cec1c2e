"""Embeddings: maps from inputs to vectors."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from layers.indices import check_indices
from layers.kernels.forward_mode import no_forward_mode, reverse_mode_only
from layers.norms import LayerNorm, LayerNormConfig
from layers.parameters import NO_DECAY, linear, parameter
from layers.positions import sinusoidal
from layers.reduction import HashEmbedding, HashEmbeddingConfig
from layers.segments import Place, SegmentIds, Segments, initial_place, select_real, visit
from layers.typing import Array, Float, Int, Num
from seqmodels.config import InputConfig

# Number of rows. For 18 rows, an H100 adds 100,000 gradients of 128 features in 0.27 ms, and multiplies in under 0.08 ms.
SMALL_TABLE = 64


class Embedding(nnx.Module):
    """Maps token ids (b, t) by look-up, or vectors (b, t, c) linearly, to (b, t, d), and adds absolute positions and types.

    Attributes:
      adapter: what adds low-rank vectors to those of the tokens (see `layers.adapters`), or None. A head that is tied to the table
        reads the table alone.
    """

    def __init__(self, config: InputConfig, width: int, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        if config.hashes is not None:
            hashed = HashEmbeddingConfig(width, config.hashes, config.buckets, dtype)
            self.hashed = HashEmbedding(hashed, rngs=rngs)
        elif config.vocab_size is not None:
            stddev = 1 / math.sqrt(width) if config.embedding_stddev is None else config.embedding_stddev
            self.table = parameter(
                rngs, nnx.initializers.normal(stddev), (config.vocab_size, width), axes=("vocab", "embed")
            )
        else:
            self.map = linear(config.input_size, width, axes=(None, "embed"), dtype=dtype, rngs=rngs)
        self.adapter = nnx.data(None)
        norm = LayerNormConfig(width, config.embedding_norm_epsilon, dtype=dtype)
        self.norm = LayerNorm(norm, rngs=rngs) if config.embedding_norm else None
        small = {"axes": (None, "embed"), **NO_DECAY}
        if config.absolute_positions == "learned":
            init = nnx.initializers.normal(0.02)
            self.positions = parameter(rngs, init, (config.max_positions, width), **small)
        if config.token_types is not None:
            self.types = parameter(rngs, nnx.initializers.normal(0.02), (config.token_types, width), **small)
        if config.embedding_map:
            self.projection = linear(width, width, axes=("embed", None), dtype=dtype, rngs=rngs)

    @property
    def kernel(self) -> nnx.Param:
        """The table, as the matrix of a linear map of tokens."""
        return self.table

    @property
    def matrix(self) -> jax.Array:
        """The table and what the adapter adds to it."""
        return self.table[...] if self.adapter is None else self.table[...] + self.adapter.product

    def init_state(self, batch_size: int) -> Place | None:
        """Returns the place of rows before their first token; None if positions are not added."""
        return None if self.config.absolute_positions == "none" else initial_place(batch_size)

    def __call__(
        self,
        inputs: Num[Array, "b t *c"],
        place: Place | None = None,
        *,
        segment_ids: SegmentIds = None,
        types: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t d"], Place | None]:
        """Returns the embedded inputs, with positions and types added if so configured, and the new place.

        Args:
          inputs: token ids or vectors.
          place: place of the rows in their segments; None for their start.
          segment_ids: positions count the real tokens of a segment.
          types: types of the tokens, where the config has `token_types`; all 0 if None.

        Returns:
          The vectors, and the new place if one was passed.

        Raises:
          ValueError: the rank or dtype of the inputs does not match the config, or a token id or type that is not traced is
            out of range; traced ones give NaN.
        """
        segments = Segments.of(segment_ids)
        x, place = self._placed(self._embed(inputs, segments), place, segments)
        if self.config.token_types is not None:
            types = jnp.zeros(inputs.shape, jnp.int32) if types is None else jnp.asarray(types)
            if types.shape != inputs.shape or not jnp.issubdtype(types.dtype, jnp.integer):
                raise ValueError(
                    f"types are {types.dtype}{list(types.shape)}; expected integers {list(inputs.shape)}, one per token"
                )
            types = select_real(types, segments)
            check_indices("types", types, self.config.token_types, of="token_types")
            x = x + look_up(self.types[...], types, self.dtype)
        elif types is not None:
            raise ValueError("types are given, but the model has none; expected token_types in its config")
        if self.norm is not None and self.config.embedding_norm_place == "sum":
            x = self.norm(x)
        return (self.projection(x) if self.config.embedding_map else x), place

    def _placed(self, x, place, segments):
        """Returns embedded inputs with their positions, and the new place."""
        if self.config.absolute_positions == "none":
            return x, place
        here = visit(initial_place(x.shape[0]) if place is None else place, segments, x.shape[1])
        positions = jnp.where(here.numbers == 0, 0, here.positions)
        if self.config.absolute_positions == "learned":
            first = self.config.first_position
            added = (
                self.positions[...]
                .at[first + positions]
                .get(mode="fill", fill_value=jnp.nan)
                .astype(self.dtype)
            )
        else:
            added = sinusoidal(positions, x.shape[2]).astype(self.dtype)
            if self.config.vocab_size is not None:
                x = x * math.sqrt(x.shape[2])
        return x + added, None if place is None else here.place

    def _embed(self, inputs, segments):
        if self.config.vocab_size is not None:
            if inputs.ndim != 2 or not jnp.issubdtype(inputs.dtype, jnp.integer):
                raise ValueError(
                    f"inputs are {inputs.dtype}{list(inputs.shape)}; expected integer token ids (b, t)"
                )
            inputs = select_real(inputs, segments)
            check_indices("inputs", inputs, self.config.vocab_size, of="vocab_size")
            if self.config.hashes is not None:
                x = self.hashed(inputs)
            else:
                x = look_up(self.table[...], inputs, self.dtype)
            if self.adapter is not None:
                x = x + self.adapter.rows(inputs, self.dtype)
            if self.config.embedding_scale is not None:
                x = x * self.config.embedding_scale
            own = self.norm is not None and self.config.embedding_norm_place == "tokens"
            return self.norm(x) if own else x
        if inputs.ndim != 3 or inputs.shape[-1] != self.config.input_size:
            raise ValueError(f"inputs have shape {inputs.shape}; expected (b, t, {self.config.input_size})")
        return self.map(select_real(inputs, segments))


def look_up(table: Float[Array, "v d"], ids: Int[Array, "b t"], dtype: jnp.dtype) -> Float[Array, "b t d"]:
    """Returns rows of a float32 table, converted to `dtype` afterwards: their gradients are summed in float32.

    In bfloat16, a sum over many occurrences of a token stops growing. An id that is no row gives NaN.
    """
    if table.shape[0] > SMALL_TABLE:
        return _look_up(table, ids, dtype)
    message = no_forward_mode(f"an embedding of at most {SMALL_TABLE} rows", "a fixed embedding")
    return _look_up_few(reverse_mode_only(table, message), ids, dtype)


def _look_up(table, ids, dtype):
    rows = table.at[ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    return rows.astype(dtype)


# With few rows, scattered additions to the same row are serialized: here they are one matrix product.
_look_up_few = jax.custom_vjp(_look_up, nondiff_argnums=(2,))


def _forward(table, ids, dtype):
    return _look_up(table, ids, dtype), (table, ids)


def _backward(_, residuals, d):
    table, ids = residuals
    chosen = jax.nn.one_hot(ids, table.shape[0], dtype=d.dtype)
    return jnp.einsum("btv,btd->vd", chosen, d, preferred_element_type=table.dtype), None


_look_up_few.defvjp(_forward, _backward)
