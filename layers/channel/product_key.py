"""Product-key memory: a few of very many values, found by two short lists of keys (Lample et al. 2019, arXiv:1907.05242)."""

import jax
import jax.numpy as jnp
from flax import nnx

from layers.dropout import dropout
from layers.norms import LayerNorm, LayerNormConfig
from layers.options import ActivationDtype, Fraction, NonNegative, checked_dataclass
from layers.parameters import NO_DECAY, linear, parameter
from layers.segments import select_masked
from layers.typing import Array, Bool, Float, Int, Key


@checked_dataclass
class ProductKeyConfig:
    """Options of `ProductKeyMemory`.

    Attributes:
      width: d, number of input and output features.
      keys: n, number of keys in each of the two lists; there are n^2 values.
      heads: h, number of queries per token; they share the values.
      key_dim: features of a query, even: half of them meet each list.
      top_k: number of values that a query reads.
      epsilon: epsilon of the norm of queries.
      dropout: dropout rate of the output, in training.
      dtype: dtype of the activations; scores are float32.
    """

    width: int
    keys: int = 128
    heads: int = 4
    key_dim: int = 128
    top_k: int = 32
    epsilon: NonNegative = 1e-6
    dropout: Fraction = 0.0
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        if self.key_dim % 2:
            raise ValueError(
                f"key_dim={self.key_dim}; expected an even number, one half for each list of keys"
            )
        if self.top_k > self.keys:
            raise ValueError(f"top_k={self.top_k}; expected at most keys={self.keys}")


class ProductKeyMemory(nnx.Module):
    """A memory of n^2 values, of which every token reads h top_k (Lample et al. 2019, arXiv:1907.05242).

        [q_1, q_2] = LayerNorm(W_q x)                                    per head
        s_ij = q_1 . c_i + q_2 . c'_j,   I = the top_k pairs (i, j) of the largest s
        y = sum_{heads} sum_{ij in I} softmax_I(s_ij) v_ij

    As a pair among the best has both of its keys among the best top_k of their lists, 2 n + top_k^2 scores find it. The norm
    of queries, here over the features of a head, is over the batch in the paper, where outputs would depend on later tokens.
    Values have no weight decay, so that those which are not read stay. They start normal with standard deviation d^(-1/2).
    """

    def __init__(self, config: ProductKeyConfig, *, rngs: nnx.Rngs):
        self.config = config
        half, features = config.key_dim // 2, config.heads * config.key_dim
        options = {"bias": False, "dtype": config.dtype, "rngs": rngs}
        self.query = linear(config.width, features, axes=("embed", "mlp"), **options)
        self.norm = LayerNorm(LayerNormConfig(config.key_dim, config.epsilon, dtype=jnp.float32), rngs=rngs)
        shape, uniform = (config.heads, 2, config.keys, half), nnx.initializers.uniform(2 * half**-0.5)
        self.keys = parameter(
            rngs,
            lambda key, shape, dtype: uniform(key, shape, dtype) - half**-0.5,
            shape,
            axes=(None, None, "mlp", None),
        )
        normal, shape = nnx.initializers.normal(config.width**-0.5), (config.keys**2, config.width)
        self.values = parameter(rngs, normal, shape, axes=("mlp", "embed"), **NO_DECAY)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        *,
        mask: Bool[Array, "b t"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "b t d"]:
        """Maps each token; dropout acts on the output."""
        config, x = self.config, select_masked(x, mask)
        q = self.query(x).reshape(*x.shape[:2], config.heads, config.key_dim)
        q = self.norm(q).reshape(*q.shape[:3], 2, config.key_dim // 2)
        scores = jnp.einsum("bthsk,hsnk->hbtsn", q, self.keys[...], precision=jax.lax.Precision.HIGHEST)
        best, index = jax.lax.top_k(scores, config.top_k)
        pairs = best[..., 0, :, None] + best[..., 1, None, :]
        best, _, chosen = best_pairs(pairs, index, config.keys)
        weights = jax.nn.softmax(best, axis=-1).astype(config.dtype)
        values = self.values[...]

        @jax.checkpoint
        def add(total, head):
            weights, chosen = head
            read = values[chosen].astype(config.dtype)
            return total + jnp.einsum(
                "btk,btkd->btd", weights, read, preferred_element_type=jnp.float32
            ), None

        # Head by head, so that the values of one alone are in memory.
        zeros = jnp.zeros((*x.shape[:2], config.width), jnp.float32)
        y, _ = jax.lax.scan(add, zeros, (weights, chosen))
        return dropout(y.astype(config.dtype), config.dropout, key)


def best_pairs(
    scores: Float[Array, "h b t k k"], index: Int[Array, "h b t 2 k"], keys: int
) -> tuple[Float[Array, "h b t k"], Int[Array, "h b t k"], Int[Array, "h b t k"]]:
    """Returns the k largest scores of the pairs of two short lists of keys, their places among the pairs, and their values' numbers.

    Args:
      scores: those of all pairs.
      index: the numbers of the keys in either list.
      keys: n; the value of keys i and j has the number i n + j.
    """
    k = index.shape[-1]
    best, pair = jax.lax.top_k(scores.reshape(*scores.shape[:3], k * k), k)
    rows = jnp.take_along_axis(index[..., 0, :], pair // k, axis=-1)
    columns = jnp.take_along_axis(index[..., 1, :], pair % k, axis=-1)
    return best, pair, rows * keys + columns
