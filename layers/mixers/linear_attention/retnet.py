"""RetNet: retention, linear attention with rotations and a fixed decay per head (Sun et al. 2023, arXiv:2307.08621)."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers.kernels.gated_linear_attention import gated_linear_attention
from layers.mixer import Mixer
from layers.options import ActivationDtype, NonNegative, checked_dataclass
from layers.parameters import linear, xavier_uniform
from layers.parts.heads import HeadNorm, SharedHeads, head_size, split_heads
from layers.positions import rotary
from layers.segments import Segments, Visit, initial_place, keep_where, visit
from layers.typing import Array, Float


@checked_dataclass
class RetNetConfig(SharedHeads):
    """Options of `RetNet`.

    Attributes:
      width: d, number of input and output features.
      heads: h, number of query heads.
      kv_heads: g, number of heads of keys and values; divides h. If None, equals h. Head i of h uses head i // (h / g).
      key_dim: K, features per query and key head; even; width / heads if None.
      value_dim: V, features per value head; 2 width / heads if None.
      rope_base: base of the rotations: the slowest pair of features turns once in about 2 pi rope_base tokens, the
        fastest in 2 pi.
      affine: whether the norm of the heads has a scale; W_o can replace it.
      epsilon: epsilon of that norm.
      dtype: dtype of the activations; decays and state are float32.
    """

    width: int
    heads: int = 4
    kv_heads: int | None = None
    key_dim: int | None = None
    value_dim: int | None = None
    rope_base: float = 10_000.0
    affine: bool = False
    epsilon: NonNegative = 1e-6
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        _ = self.groups
        key_dim, _ = self.sizes
        if key_dim % 2:
            raise ValueError(f"key_dim={key_dim} is odd; rotations need an even one")
        if self.rope_base <= 1:
            raise ValueError(f"rope_base={self.rope_base}; expected more than 1")

    @property
    def sizes(self) -> tuple[int, int]:
        """K and V."""
        return head_size("key_dim", self.key_dim, self), head_size("value_dim", self.value_dim, self, 2.0)

    @property
    def base(self) -> float:
        """Base of RoPE with which pair i of n = K / 2 turns by rope_base^(-i / (n - 1)) per token, in place of -i / n."""
        key_dim, _ = self.sizes
        return self.rope_base ** (key_dim / (key_dim - 2)) if key_dim > 2 else self.rope_base


class RetNet(Mixer):
    """RetNet: multi-scale retention with rotations, group norm and gate (Sun et al. 2023, arXiv:2307.08621).

        q, k, v = W_q x, W_k x, W_v x;   q and k rotated by angles that grow with the position
        S_t = (1 - 2^(-5-h)) S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t / sqrt(K)       in head h = 0, 1, ...
        y = W_o (RMSNorm(o) * silu(W_g x))                                          norm per head, the paper's group norm

    The rotated pairs are features i and i + K / 2. The divisions of scores and decays in the authors' parallel form are
    left out: they multiply o by a positive number, which the norm removes up to its epsilon. All projections
    start Xavier-uniform, with gain 2^-2.5 except W_o, as in the authors' code.
    """

    keeps_segments = True  # The rotations need positions over all calls.

    def __init__(self, config: RetNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        key_dim, value_dim = config.sizes
        values = config.heads * value_dim
        options = {"axes": ("embed", "heads"), "bias": False, "dtype": config.dtype, "rngs": rngs}
        small = xavier_uniform(2**-2.5)
        self.query = linear(config.width, config.heads * key_dim, init=small, **options)
        self.key = linear(config.width, config.groups * key_dim, init=small, **options)
        self.value = linear(config.width, config.groups * value_dim, init=small, **options)
        self.gate = linear(config.width, values, init=small, **options)
        self.norm = HeadNorm(
            value_dim,
            gate="silu",
            affine=config.affine,
            epsilon=config.epsilon,
            dtype=config.dtype,
            rngs=rngs,
        )
        self.output = linear(
            values, config.width, init=xavier_uniform(), **options | {"axes": ("heads", "embed")}
        )

    def initial(self, batch_size: int, max_length: int | None) -> Float[Array, "b h k v"]:
        return jnp.zeros((batch_size, self.config.heads, *self.config.sizes), jnp.float32)

    def mix(
        self,
        x: Float[Array, "b t d"],
        carried: Float[Array, "b h k v"] | None,
        segments: Segments | None,
        here: Visit | None,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b h k v"]]:
        config = self.config
        if here is None:
            here = visit(initial_place(x.shape[0]), segments, x.shape[1])
        if carried is not None:
            carried = keep_where(here.continues, carried, self.initial(x.shape[0], None))
        o, memory = gated_linear_attention(
            rotary(split_heads(self.query(x), config.heads), here.positions, config.base),
            rotary(split_heads(self.key(x), config.groups), here.positions, config.base),
            split_heads(self.value(x), config.groups),
            log_decay=jnp.asarray(np.log1p(-(2.0 ** (-5.0 - np.arange(config.heads)))), jnp.float32),
            initial_state=carried,
            segment_ids=segments,
        )
        return self.output(self.norm(o, self.gate(x))), memory
