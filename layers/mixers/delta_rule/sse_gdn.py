"""SSE-GDN: Gated DeltaNet whose tokens write to a few of many partitions of the state (Pan et al. 2025, arXiv:2507.16577)."""

import jax
import jax.numpy as jnp
from flax import nnx

from layers.kernels.delta_rule import delta_rule
from layers.mixers.linear_attention.sse import ExpandedState, ExpandedStateConfig, side_by_side
from layers.options import checked_dataclass
from layers.parameters import linear
from layers.parts.log_decay import SoftplusDecay


@checked_dataclass
class SSEGatedDeltaNetConfig(ExpandedStateConfig):
    """Options of `SSEGatedDeltaNet`, and those of `ExpandedStateConfig`.

    Attributes:
      negative_eigenvalues: whether writing strengths lie in (0, 2) instead of (0, 1), as in `gated_deltanet`.
    """

    negative_eigenvalues: bool = False


class SSEGatedDeltaNet(ExpandedState):
    """SSE-GDN: the gated delta rule in a few of many partitions of the state (Pan et al. 2025, arXiv:2507.16577).

        q^0, q, k^0, k, v, e, T of `ExpandedState`, then silu of queries and keys, each divided by its norm
        beta = sigmoid(W_b x),   log alpha = -exp(a) softplus(W_a x + c)                (h), and beta^0, alpha^0 by maps of their own
        S' = alpha^0_t S^0_{t-1},   S^0_t = S' + beta^0_t k^0_t (v_t - S'^T k^0_t)^T
        S' = alpha_t S^i_{t-1},     S^i_t = S' + e_ti beta_t k_t (v_t - S'^T k_t)^T   for i in T_t,   S^i_t = S^i_{t-1} for other i
        o_t = (S^0_t^T q^0_t + sum_{i in T_t} e_ti S^i_t^T q_t) / sqrt(K)
        y = W_o (RMSNorm(o) * silu(B_g A_g x))                                          norm per head

    In the authors' code e multiplies queries and keys before their norms, which divide it out again, so that only the loss of
    balance trains the router. That e stands at beta and at what is read is our reading, which keeps its meaning in `sse`. There is no
    short convolution, as in their defaults. Every partition is computed for every token, with beta = 0 and alpha = 1 where it is not
    chosen. The state has (N + 1) h K V numbers.
    """

    def __init__(self, config: SSEGatedDeltaNetConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        options = {"axes": ("embed", "heads"), "bias": False, "dtype": config.dtype, "rngs": rngs}
        self.shared_strength, self.strength, self.shared_rate, self.rate = (
            linear(config.width, config.heads, **options) for _ in range(4)
        )
        self.shared_decay, self.decay = (
            SoftplusDecay(config.heads, rates=(0.01, 16.0), rngs=rngs) for _ in range(2)
        )

    def remember(self, x, q, k, v, chance, chosen, carried, segments):
        largest = 2.0 if self.config.negative_eigenvalues else 1.0
        beta, sparse_beta = (
            largest * jax.nn.sigmoid(strength(x).astype(jnp.float32))[..., None]
            for strength in (self.shared_strength, self.strength)
        )
        decay = self.shared_decay(self.shared_rate(x))[..., None]
        sparse_decay = self.decay(self.rate(x))[..., None]
        partitions = (*v.shape[:3], chance.shape[3])

        def everywhere(first, sparse):
            wide = jnp.broadcast_to(sparse[:, :, :, None], (*partitions, sparse.shape[-1]))
            return side_by_side(first, wide)

        # Where a partition is not chosen it is neither written nor decayed: its time stands still.
        sparse_decay = jnp.where(chosen, sparse_decay[:, :, :, None], 0)
        share = jnp.where(chosen, chance, 0)
        read, memory = delta_rule(
            everywhere(*map(jax.nn.silu, q)),
            everywhere(*map(jax.nn.silu, k)),
            everywhere(v, v),
            side_by_side(beta, share * sparse_beta[:, :, :, None])[..., 0],
            log_decay=side_by_side(decay, sparse_decay)[..., 0],
            normalize_qk=True,
            initial_state=carried,
            segment_ids=segments,
        )
        shares = side_by_side(
            jnp.ones_like(beta), jnp.broadcast_to(share, (*partitions, 1)).astype(beta.dtype)
        )
        return jnp.where(shares > 0, shares * read, 0), memory
