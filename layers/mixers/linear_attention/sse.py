"""SSE: gated linear attention whose tokens write to a few of many partitions of the state (Pan et al. 2025, arXiv:2507.16577)."""

import jax
import jax.numpy as jnp
from flax import nnx

from layers.adapters import in_training
from layers.kernels.gated_linear_attention import gated_linear_attention
from layers.mixer import Mixer
from layers.options import ActivationDtype, NonNegative, Positive, checked_dataclass
from layers.parameters import AuxiliaryLoss, linear
from layers.parts.heads import HeadNorm, head_size, split_heads
from layers.parts.low_rank import LowRank
from layers.segments import Segments
from layers.typing import Array, Bool, Float


@checked_dataclass
class ExpandedStateConfig:
    """Options of mixers of the base class `ExpandedState`.

    Attributes:
      width: d, number of input and output features.
      heads: h, number of heads.
      key_dim: K, features per query and key head, and rows of a partition; width / heads if None.
      value_dim: V, features per value head, and the rank of the changes of queries and keys; width / heads if None.
      partitions: N, sparse partitions of the state, beside the one that every token writes and reads.
      top_k: partitions that a token writes and reads, fewer than N.
      balance: factor of the router's loss in training, which is 1 where partitions are chosen equally often.
      epsilon: epsilon of the norm per head.
      dtype: dtype of the activations; decays, router and state are float32.
    """

    width: int
    heads: int = 4
    key_dim: int | None = None
    value_dim: int | None = None
    partitions: int = 4
    top_k: int = 2
    balance: NonNegative = 0.01
    epsilon: NonNegative = 1e-5
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        if self.top_k >= self.partitions:
            raise ValueError(f"top_k={self.top_k}; expected fewer than partitions={self.partitions}")
        _ = self.sizes

    @property
    def sizes(self) -> tuple[int, int]:
        """K and V."""
        return head_size("key_dim", self.key_dim, self), head_size("value_dim", self.value_dim, self)


class ExpandedState(Mixer):
    """Base class of memories in partitions: one of all tokens, and N sparse ones of which each token writes and reads the best.

        q^0 = W_q x,  q = q^0 + B_q A_q x,   k^0 = W_k x,  k = k^0 + B_k A_k x
        v = silu(W_v x),   e = softmax(W_e x)                                      (N); T_t: the top_k of the largest e_t
        y = W_o (RMSNorm(o) * silu(B_g A_g x))                                     norm per head

    A mixer has `remember(x, q, k, v, chance, chosen, carried, segments)`, which returns what is read of each partition (b t h*(N+1) v) and the
    memory after the last token. q and k are pairs, for the shared partition and for the sparse ones, by heads. `chance` and
    `chosen` (b t 1 n 1) are e and whether a partition is in T_t. All heads of a token choose alike. Training adds balance N / top_k sum_i mean(e_i)
    mean(i in T), over real tokens.
    """

    def __init__(self, config: ExpandedStateConfig, *, rngs: nnx.Rngs):
        self.config = config
        key_dim, value_dim = config.sizes
        keys, values = config.heads * key_dim, config.heads * value_dim
        options = {"axes": ("embed", "heads"), "bias": False, "dtype": config.dtype, "rngs": rngs}
        own = {"dtype": config.dtype, "rngs": rngs}
        self.query = linear(config.width, keys, **options)
        self.key = linear(config.width, keys, **options)
        self.value = linear(config.width, values, **options)
        self.query_change = LowRank(config.width, value_dim, keys, bias=False, **own)
        self.key_change = LowRank(config.width, value_dim, keys, bias=False, **own)
        self.router = linear(config.width, config.partitions, axes=("embed", None), bias=False, rngs=rngs)
        self.gate = LowRank(config.width, value_dim, values, bias=False, **own)
        self.norm = HeadNorm(value_dim, gate="silu", epsilon=config.epsilon, **own)
        self.output = linear(values, config.width, **options | {"axes": ("heads", "embed")})
        self.auxiliary = AuxiliaryLoss(jnp.zeros((), jnp.float32))

    def initial(self, batch_size: int, max_length: int | None) -> Float[Array, "b g k v"]:
        """Returns the zero memory; the shared partition of a head and its N sparse ones stand side by side."""
        states = self.config.heads * (self.config.partitions + 1)
        return jnp.zeros((batch_size, states, *self.config.sizes), jnp.float32)

    def mix(
        self, x: Float[Array, "b t d"], carried: Float[Array, "b g k v"] | None, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b g k v"]]:
        config = self.config
        routes = (part[:, :, None, :, None] for part in self._route(x, segments))
        pairs = []
        for own, change in ((self.query, self.query_change), (self.key, self.key_change)):
            first = own(x)
            sparse = first + change(x).astype(first.dtype)
            pairs.append((split_heads(first, config.heads), split_heads(sparse, config.heads)))
        v = jax.nn.silu(split_heads(self.value(x), config.heads))
        o, memory = self.remember(x, *pairs, v, *routes, carried, segments)
        o = o.reshape(*x.shape[:2], config.heads, config.partitions + 1, config.sizes[1])
        return self.output(self.norm(o.astype(jnp.float32).sum(3), self.gate(x))), memory

    def _route(
        self, x: Float[Array, "b t d"], segments: Segments | None
    ) -> tuple[Float[Array, "b t n"], Bool[Array, "b t n"]]:
        """Returns the share of each partition of each token, and whether it is among the best; in training also writes the loss."""
        count, top_k = self.config.partitions, self.config.top_k
        logits = jnp.matmul(x.astype(jnp.float32), self.router.matrix, precision=jax.lax.Precision.HIGHEST)
        chance = jax.nn.softmax(logits, axis=-1)
        chosen = jax.nn.one_hot(jax.lax.top_k(chance, top_k)[1], count, dtype=jnp.int32).sum(2) > 0
        if in_training():
            real = jnp.ones(x.shape[:2], bool) if segments is None else segments.real
            total = jnp.maximum(real.sum(dtype=jnp.float32), 1)
            shares, load = (
                jnp.where(real[..., None], part.astype(jnp.float32), 0).sum((0, 1)) / total
                for part in (chance, chosen)
            )
            self.auxiliary[...] = self.config.balance * count / top_k * jnp.sum(shares * load)
        return chance, chosen


def side_by_side(
    shared: Float[Array, "b t h k"], sparse: Float[Array, "b t h n k"]
) -> Float[Array, "b t g k"]:
    """Returns what belongs to the shared partition of every head, followed by what belongs to its sparse ones."""
    joined = jnp.concatenate([shared[:, :, :, None], sparse], axis=3)
    rows, time, heads, parts, size = joined.shape
    return joined.reshape(rows, time, heads * parts, size)


@checked_dataclass
class SSEConfig(ExpandedStateConfig):
    """Options of `SSE`, and those of `ExpandedStateConfig`.

    Attributes:
      gate_rank: rank of the maps that compute the decays.
      temperature: tau; the decays are the tau-th root of a sigmoid, so that they start near 1.
    """

    gate_rank: int = 16
    temperature: Positive = 16.0


class SSE(ExpandedState):
    """SSE: gated linear attention to a few of many partitions of the state (Pan et al. 2025, arXiv:2507.16577).

        q^0, q, k^0, k, v, e, T of `ExpandedState`, then silu of queries, softmax of keys over K
        S^0_t = Diag(alpha^0_t) S^0_{t-1} + k^0_t v_t^T                            alpha = sigmoid(W_2 W_1 x + b)^(1 / tau)
        S^i_t = Diag(alpha_t) S^i_{t-1} + e_ti k_t v_t^T   for i in T_t,   S^i_t = S^i_{t-1} for other i
        o_t = (S^0_t^T q^0_t + sum_{i in T_t} e_ti S^i_t^T q_t) / sqrt(K)
        y = W_o (RMSNorm(o) * silu(B_g A_g x))                                     norm per head

    A softmax makes each key a choice of a row of its partition, and partitions forget by their own tokens alone. All partitions but the
    shared one have the same queries, keys and decay alpha. This is the layer of the authors' code on GLA; `sse_gdn` is that on Gated
    DeltaNet. Every partition is computed for every token, with zero keys and decays of 1 where it is not chosen, so that time
    grows with N and not with top_k. The state has (N + 1) h K V numbers.
    """

    def __init__(self, config: SSEConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        keys, own = config.heads * config.sizes[0], {"dtype": config.dtype, "rngs": rngs}
        self.shared_decay = LowRank(config.width, config.gate_rank, keys, **own)
        self.decay = LowRank(config.width, config.gate_rank, keys, **own)

    def remember(self, x, q, k, v, chance, chosen, carried, segments):
        config = self.config
        decay, sparse_decay = (
            split_heads(jax.nn.log_sigmoid(gate(x)) / config.temperature, config.heads)
            for gate in (self.shared_decay, self.decay)
        )
        q, sparse_q = (jax.nn.silu(part) for part in q)
        k, sparse_k = (jax.nn.softmax(part.astype(jnp.float32), axis=-1).astype(config.dtype) for part in k)

        def of_chosen(part, amount):
            return jnp.where(chosen, amount * part[:, :, :, None], 0).astype(part.dtype)

        return gated_linear_attention(
            side_by_side(q, of_chosen(sparse_q, chance)),
            side_by_side(k, of_chosen(sparse_k, chance)),
            v,
            # Not decayed where it is not chosen: the time of a partition stands still.
            log_decay=side_by_side(decay, of_chosen(sparse_decay, 1)),
            initial_state=carried,
            segment_ids=segments,
        )
