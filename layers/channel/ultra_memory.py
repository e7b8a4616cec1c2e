"""UltraMemV2: a memory whose values two factored grids of scores weigh, with a gate of the token for each (arXiv:2508.18756)."""

import jax
import jax.numpy as jnp
from flax import nnx

from layers.channel.product_key import best_pairs
from layers.dropout import dropout
from layers.norms import NormConfig, RMSNorm
from layers.options import ActivationDtype, Fraction, NonNegative, checked_dataclass
from layers.parameters import NO_DECAY, Constant, linear, parameter
from layers.segments import select_masked
from layers.typing import Array, Bool, Float, Key


@checked_dataclass
class UltraMemoryConfig:
    """Options of `UltraMemory`.

    Attributes:
      width: d, number of input and output features.
      keys: n, number of keys in each of the two lists; there are n^2 values.
      heads: h, number of queries per token, each with keys of its own; they share the values.
      key_dim: features of a key, and of each half of a query.
      value_dim: features of a value, which `parts` divides.
      gate_dim: features of the vector with which a value meets the token.
      top_k: number of values that a query reads.
      rank: r, vectors per key.
      parts: p, parts of a value, each with a grid of scores.
      gelu: whether a GELU acts on what a value makes of the token.
      epsilon: epsilon of the norms of queries and keys.
      shared_table: whether all layers of a stack with this option read one table of values and of gates.
      dropout: dropout rate of the output, in training.
      dtype: dtype of the activations; scores are float32.
    """

    width: int
    keys: int = 128
    heads: int = 1
    key_dim: int = 128
    value_dim: int = 128
    gate_dim: int = 64
    top_k: int = 32
    rank: int = 2
    parts: int = 2
    gelu: bool = False
    epsilon: NonNegative = 1e-5
    shared_table: bool = False
    dropout: Fraction = 0.0
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        if self.top_k > self.keys:
            raise ValueError(f"top_k={self.top_k}; expected at most keys={self.keys}")
        if self.value_dim % self.parts:
            raise ValueError(f"parts={self.parts} does not divide value_dim={self.value_dim}")
        # Float32 has every whole number up to its square.
        if self.shared_table and self.keys > 4096:
            raise ValueError(f"keys={self.keys} with shared_table=True; expected at most 4096")


class UltraMemory(nnx.Module):
    """A memory of n^2 values, of which every token reads h top_k, in factored grids of scores (Huang et al. 2025, arXiv:2508.18756).

        q_1, q_2 = norm(W_q x);   s_ia = q_1 . norm(c_ia),  s'_ja = q_2 . norm(c'_ja)             per head; a <= r
        s^m_ij = sum_ab s_ia C^m_ab s'_jb,   I = the top_k pairs (i, j) of the largest sum_m s^m_ij    m <= p
        y = W_o [ sum_{heads} sum_{ij in I} s^m_ij (u_ij . W_u x) v^m_ij ]_m                      v_ij has the parts v^1_ij to v^p_ij

    Pairs are looked for among the top_k of sum_a s_ia f_a and the top_k of sum_b s'_jb g_b, where f g^T is the best approximation of
    sum_m C^m by a matrix of rank 1, taken without gradient and with a positive sum: pairs that it misrates are missed. There is no
    softmax. These are the equations of the authors' code, with an RMS norm. Values have no weight decay, as in `product_key`; their matrices
    start normal, with standard deviation 0.02, the grids C uniform in [0, 1], and the factors of the norms at key_dim^(-0.4).

    With `shared_table`, u and v are those of the first such layer of the stack in all of them, and the pair ij reads their row
    P(i n + j), with a random permutation P of each layer that training does not change. Their code lets the table grow with the number
    of layers; here `keys` alone says how large it is.
    """

    def __init__(self, config: UltraMemoryConfig, *, rngs: nnx.Rngs):
        self.config = config
        normal, inside = nnx.initializers.normal, {"bias": False, "dtype": config.dtype, "rngs": rngs}
        features, small = 2 * config.heads * config.key_dim, normal(config.key_dim**-0.5)
        self.query = linear(config.width, features, axes=("embed", "mlp"), init=small, **inside)
        shape = (config.heads, 2, config.keys, config.rank, config.key_dim)
        self.keys = parameter(rngs, small, shape, axes=(None, None, "mlp", None, None))
        self.query_norm, self.key_norm = (self._norm(rngs) for _ in range(2))
        shape = (config.parts, config.heads, config.rank, config.rank)
        self.grids = parameter(rngs, nnx.initializers.uniform(1.0), shape)
        table = {"axes": ("mlp", None), **NO_DECAY}
        self.values = parameter(rngs, normal(0.02), (config.keys**2, config.value_dim), **table)
        self.gates = parameter(rngs, normal(0.02), (config.keys**2, config.gate_dim), **table)
        self.order = (
            Constant(jax.random.permutation(rngs.params(), config.keys**2).astype(jnp.float32))
            if config.shared_table
            else None
        )
        self.gate = linear(
            config.width, config.gate_dim, axes=("embed", None), init=normal(config.width**-0.5), **inside
        )
        self.output = linear(
            config.value_dim,
            config.width,
            axes=(None, "embed"),
            init=normal(config.value_dim**-0.5),
            **inside,
        )

    def share(self, first: "UltraMemory") -> None:
        """Makes this layer read the table of another one."""
        self.values, self.gates = first.values, first.gates

    def _norm(self, rngs: nnx.Rngs) -> RMSNorm:
        config = self.config
        norm = RMSNorm(NormConfig(config.key_dim, config.epsilon, dtype=jnp.float32), rngs=rngs)
        norm.scale[...] = config.key_dim**-0.4 * norm.scale[...]
        return norm

    def __call__(
        self,
        x: Float[Array, "b t d"],
        *,
        mask: Bool[Array, "b t"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "b t d"]:
        """Maps each token; dropout acts on the output."""
        config, x = self.config, select_masked(x, mask)
        highest = {"precision": jax.lax.Precision.HIGHEST}
        q = self.query_norm(self.query(x).reshape(*x.shape[:2], config.heads, 2, config.key_dim))
        scores = jnp.einsum("bthsk,hsnrk->hbtsnr", q, self.key_norm(self.keys[...]), **highest)
        left, right = self._directions()
        lists = jnp.einsum("hbtsnr,hsr->hbtsn", scores, jnp.stack([left, right], axis=1), **highest)
        _, index = jax.lax.top_k(lists, config.top_k)
        first, second = (
            jnp.take_along_axis(scores[:, :, :, side], index[..., side, :, None], axis=3) for side in (0, 1)
        )
        grids = jnp.einsum("hbtia,mhac,hbtjc->mhbtij", first, self.grids[...], second, **highest)
        _, pair, chosen = best_pairs(grids.sum(0), index, config.keys)
        chosen = chosen if self.order is None else self.order[...].astype(jnp.int32)[chosen]
        weights = jnp.take_along_axis(grids.reshape(*grids.shape[:4], -1), pair[None], axis=-1)
        tables, token = (self.values[...], self.gates[...]), self.gate(x)

        @jax.checkpoint
        def add(total, head):
            weights, chosen = head
            values, gates = (table[chosen].astype(config.dtype) for table in tables)
            gate = jnp.einsum("btg,btkg->btk", token, gates, preferred_element_type=jnp.float32)
            weights = (weights * (jax.nn.gelu(gate) if config.gelu else gate)[None]).astype(config.dtype)
            values = values.reshape(*values.shape[:3], config.parts, -1)
            read = jnp.einsum("mbtk,btkmv->btmv", weights, values, preferred_element_type=jnp.float32)
            return total + read.reshape(total.shape), None

        # Head by head, so that the values of one alone are in memory.
        zeros = jnp.zeros((*x.shape[:2], config.value_dim), jnp.float32)
        read, _ = jax.lax.scan(add, zeros, (jnp.moveaxis(weights, 1, 0), chosen))
        return dropout(self.output(read.astype(config.dtype)), config.dropout, key)

    def _directions(self) -> tuple[Float[Array, "h r"], Float[Array, "h r"]]:
        """Returns f and g, those of the largest singular value of the sum of the grids, with a positive sum together."""
        u, _, v = jnp.linalg.svd(jax.lax.stop_gradient(self.grids[...].sum(0)))
        left, right = u[:, :, 0], v[:, 0]
        sign = jnp.where((left + right).sum(-1, keepdims=True) < 0, -1.0, 1.0)
        return sign * left, sign * right
