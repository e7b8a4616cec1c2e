"""HGRN2: gated linear attention whose keys are what the decay leaves (Qin et al. 2024, arXiv:2404.07904)."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers.kernels.gated_linear_attention import gated_linear_attention
from layers.mixer import Mixer
from layers.norms import NormConfig, RMSNorm
from layers.options import ActivationDtype, Count, NonNegative, checked_dataclass
from layers.parameters import NO_DECAY, Constant, declared, linear
from layers.parts.heads import head_size, join_heads, split_heads
from layers.parts.running_maximum import EMPTY
from layers.segments import Segments
from layers.typing import Array, Float


@checked_dataclass
class HGRN2Config:
    """Options of `HGRN2`.

    Attributes:
      width: d, number of input and output features.
      heads: h, number of heads.
      key_dim: K, features per query and decay head, the factor by which the state is larger than that of HGRN; width / heads
        if None. The authors use 128.
      bounded: whether decays have lower bounds, in all layers but the first.
      epsilon: epsilon of the norm.
      layer, depth: index of the layer, from 0, and number of layers of the model; the lower bound of the decay starts at
        layer / depth.
      dtype: dtype of the activations; decays and state are float32.
    """

    width: int
    heads: int = 4
    key_dim: int | None = None
    bounded: bool = True
    epsilon: NonNegative = 1e-5
    layer: Count = 0
    depth: int = 1
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        _ = self.sizes
        if not 0 <= self.layer < self.depth:
            raise ValueError(f"layer={self.layer}, depth={self.depth}; expected 0 <= layer < depth")

    @property
    def sizes(self) -> tuple[int, int]:
        """K and V."""
        return head_size("key_dim", self.key_dim, self), head_size("heads", None, self)


class HGRN2(Mixer):
    """HGRN2: a gated recurrence with outer products as states (Qin et al. 2024, arXiv:2404.07904).

        alpha_t = bound + (1 - bound) sigmoid(W_f x_t)                        (h, K)
        S_t = Diag(alpha_t) S_{t-1} + (1 - alpha_t) (W_i x_t)^T               (K x V per head)
        o_t = S_t^T silu(W_q x_t) / sqrt(K),   y_t = W_o RMSNorm(o_t)         one norm over all heads

    The paper computes the bounds of all layers from one matrix, by a softmax and a cumulative sum over depth. Here, as in
    `hgrn`, each layer has its own bound, sigmoid(bound_logit), with the paper's initial values: 0 in the first layer, where
    it is fixed, and layer / depth in the others. Without bounds they are 0 everywhere.
    """

    def __init__(self, config: HGRN2Config, *, rngs: nnx.Rngs):
        self.config = config
        key_dim, value_dim = config.sizes
        keys, values = config.heads * key_dim, config.heads * value_dim
        options = {"axes": ("embed", "heads"), "bias": False, "dtype": config.dtype, "rngs": rngs}
        self.query = linear(config.width, keys, **options)
        self.forget = linear(config.width, keys, **options)
        self.input = linear(config.width, values, **options)
        self.norm = RMSNorm(NormConfig(values, config.epsilon, dtype=config.dtype), rngs=rngs)
        self.output = linear(values, config.width, **options | {"axes": ("heads", "embed")})
        if not config.bounded:
            self.bound_logit = self.bounded = None
            return
        # The first layer has no bound but keeps the same parameters as the others.
        start = max(config.layer, 1) / max(config.depth, 2)
        logit = jnp.full(keys, np.log(start / (1 - start)), jnp.float32)
        self.bound_logit = declared(logit, axes=("heads",), **NO_DECAY)
        self.bounded = Constant(jnp.float32(config.layer > 0))

    def initial(self, batch_size: int, max_length: int | None) -> Float[Array, "b h k v"]:
        return jnp.zeros((batch_size, self.config.heads, *self.config.sizes), jnp.float32)

    def mix(
        self, x: Float[Array, "b t d"], carried: Float[Array, "b h k v"] | None, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b h k v"]]:
        config = self.config
        forget = self.forget(x).astype(jnp.float32)
        log_decay, log_rest = jax.nn.log_sigmoid(forget), 0.0
        if self.bounded is not None:
            logit, bounded = self.bound_logit[...][None, None], self.bounded[...] > 0
            log_bound = jnp.where(bounded, jax.nn.log_sigmoid(logit), EMPTY)
            log_rest = jnp.where(bounded, jax.nn.log_sigmoid(-logit), 0)
            log_decay = jnp.logaddexp(log_bound, log_rest + log_decay)
        # Computes 1 - alpha as a product: a difference loses precision where alpha is near 1.
        key = jnp.exp(log_rest + jax.nn.log_sigmoid(-forget)).astype(config.dtype)
        q, k, v = jax.nn.silu(self.query(x)), key, self.input(x)
        q, k, v, log_decay = (split_heads(part, config.heads) for part in (q, k, v, log_decay))
        o, memory = gated_linear_attention(
            q, k, v, log_decay=jnp.minimum(log_decay, 0), initial_state=carried, segment_ids=segments
        )
        return self.output(self.norm(join_heads(o))), memory
