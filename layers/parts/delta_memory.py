"""Parts shared by DeltaNet and its gated variants: options, short convolutions, writing strengths and the delta rule."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from layers.kernels.delta_rule import delta_rule
from layers.options import ActivationDtype, NonNegative, checked_dataclass
from layers.parameters import linear
from layers.parts.heads import head_size, split_heads
from layers.parts.short_convolution import ShortConvolution
from layers.segments import SegmentIds
from layers.typing import Array, Float


@checked_dataclass
class DeltaRuleConfig:
    """Options of mixers with a `DeltaMemory`.

    Attributes:
      width: d, number of input and output features.
      heads: g, number of query and key heads.
      taps: number of taps of the short convolution, 2 to 8.
      negative_eigenvalues: whether writing strengths lie in (0, 2) instead of (0, 1), so that a token may flip a sign
        (Grazzi et al. 2024, arXiv:2411.12537).
      epsilon: epsilon of the norm per head.
      dtype: dtype of the activations; decays and state are float32.
    """

    width: int
    heads: int = 4
    taps: int = 4
    negative_eigenvalues: bool = False
    epsilon: NonNegative = 1e-5
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        _ = self.sizes, self.outputs

    @property
    def sizes(self) -> tuple[int, int]:
        """K and V, the features per key head and per value head."""
        raise NotImplementedError(f"{type(self).__name__} defines no sizes")

    @property
    def outputs(self) -> int:
        """Number of value heads, h."""
        return self.heads


@checked_dataclass
class SharedKeysConfig(DeltaRuleConfig):
    """Options of delta rules in which several value heads may share a query and key head.

    Attributes:
      value_heads: h, number of value heads, a multiple of g. If None, equals g. Value head i reads query and key head i
        // (h / g).
    """

    value_heads: int | None = None

    @property
    def outputs(self) -> int:
        """Number of value heads, h."""
        if self.value_heads is None:
            return self.heads
        if self.value_heads % self.heads:
            raise ValueError(f"value_heads={self.value_heads} is not a multiple of heads={self.heads}")
        return self.value_heads


@checked_dataclass
class WideValuesConfig(SharedKeysConfig):
    """Options of delta rules whose values are by default twice as wide as keys.

    Attributes:
      key_dim: K, features per query and key head; 3/4 width / heads if None.
      value_dim: V, features per value head; 2 K if None.
    """

    key_dim: int | None = None
    value_dim: int | None = None

    @property
    def sizes(self) -> tuple[int, int]:
        """K and V."""
        key_dim = head_size("key_dim", self.key_dim, self, 0.75)
        given = 2 * key_dim if self.value_dim is None else self.value_dim
        return key_dim, head_size("value_dim", given, self)


class DeltaCarry(NamedTuple):
    """What a `DeltaMemory` carries: the matrix memory per head, float32, and the last inputs of its convolution."""

    memory: Float[Array, "b h k v"]
    inputs: Float[Array, "b w-1 n"]


class DeltaMemory(nnx.Module):
    """The delta rule together with its input projections.

        q, k, v = silu(conv(W_q x)), silu(conv(W_k x)), silu(conv(W_v x)),   then q and k of norm 1
        beta = sigmoid(W_b x)                                                (h)
        S' = Diag(alpha_t) S_{t-1},   S_t = S' + beta_t k_t (v_t - S'^T k_t)^T,  o_t = S_t^T q_t / sqrt(K)

    q, k and v come from one projection and one convolution, in this order. With `negative_eigenvalues`, beta is doubled.
    """

    def __init__(self, config: DeltaRuleConfig, *, rngs: nnx.Rngs):
        self.key_heads, self.value_heads = config.heads, config.outputs
        self.key_dim, self.value_dim = config.sizes
        self.largest = 2.0 if config.negative_eigenvalues else 1.0
        features = 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim
        options = {"axes": ("embed", "heads"), "bias": False, "dtype": config.dtype, "rngs": rngs}
        self.projection = linear(config.width, features, **options)
        self.convolution = ShortConvolution(features, config.taps, dtype=config.dtype, rngs=rngs)
        self.strength = linear(config.width, self.value_heads, **options)

    def initial(self, batch_size: int) -> DeltaCarry:
        """Returns the zero state."""
        memory = jnp.zeros((batch_size, self.value_heads, self.key_dim, self.value_dim), jnp.float32)
        return DeltaCarry(memory, self.convolution.init_state(batch_size))

    def __call__(
        self,
        x: Float[Array, "b t d"],
        carried: DeltaCarry | None,
        *,
        log_decay: Float[Array, "b t h"] | Float[Array, "b t h k"] | None = None,
        segment_ids: SegmentIds,
    ) -> tuple[Float[Array, "b t h v"], DeltaCarry]:
        """Returns what the queries read, and the carry after the last token."""
        memory, inputs = (None, None) if carried is None else carried
        features, inputs = self.convolution(self.projection(x), inputs, segment_ids=segment_ids)
        keys = self.key_heads * self.key_dim
        q, k, v = jnp.split(features, [keys, 2 * keys], axis=-1)
        o, memory = delta_rule(
            split_heads(q, self.key_heads),
            split_heads(k, self.key_heads),
            split_heads(v, self.value_heads),
            self.largest * jax.nn.sigmoid(self.strength(x).astype(jnp.float32)),
            log_decay=log_decay,
            normalize_qk=True,
            initial_state=memory,
            segment_ids=segment_ids,
        )
        return o, DeltaCarry(memory, inputs)
