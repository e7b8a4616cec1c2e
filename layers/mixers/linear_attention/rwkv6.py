"""RWKV-6 (Finch): a decay per channel that depends on the input, and a bonus for the current token (arXiv:2404.05892)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers.kernels.gated_linear_attention import gated_linear_attention
from layers.mixer import Mixer
from layers.options import ActivationDtype, Count, NonNegative, checked_dataclass
from layers.parameters import NO_DECAY, declared, linear, parameter
from layers.parts.heads import HeadLayerNorm, split_heads
from layers.parts.low_rank import LowRank
from layers.parts.token_shift import token_shift
from layers.segments import Segments
from layers.typing import Array, Float

STREAMS = ("w", "k", "v", "r", "g")


@checked_dataclass
class RWKV6Config:
    """Options of `RWKV6`.

    Attributes:
      width: d, number of input and output features.
      head_dim: K, features per head; divides the width.
      mix_rank: rank of the map that moves each mixing weight with the input.
      decay_rank: rank of the map that moves the decay with the input.
      zero_init: whether the output matrix and the first factors of those maps start at zero, as in the authors' training;
        otherwise normal with variance 1 / inputs.
      epsilon: epsilon of the norm per head; the authors divide the heads by 8 before a norm with epsilon 1e-5.
      layer, depth: index of the layer, from 0, and number of layers of the model; they set the initial mixing weights,
        decays and bonuses.
      dtype: dtype of the activations; decays and state are float32.
    """

    width: int
    head_dim: int = 64
    mix_rank: int = 32
    decay_rank: int = 64
    zero_init: bool = True
    epsilon: NonNegative = 64e-5
    layer: Count = 0
    depth: int = 1
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        if self.width % self.head_dim:
            raise ValueError(f"head_dim={self.head_dim} does not divide width={self.width}")
        if not 0 <= self.layer < self.depth:
            raise ValueError(f"layer={self.layer}, depth={self.depth}; expected 0 <= layer < depth")

    @property
    def heads(self) -> int:
        """h."""
        return self.width // self.head_dim


class RWKV6Carry(NamedTuple):
    """What `RWKV6` carries: the last token, and the matrix memory per head, float32."""

    token: Float[Array, "b 1 d"]
    memory: Float[Array, "b h k v"]


class RWKV6(Mixer):
    """RWKV-6, or Finch: time mixing by linear attention with a decay per channel and step (Peng et al. 2024, arXiv:2404.05892).

        dx_t = x_{t-1} - x_t
        x_s = x + (mu_s + tanh((x + mu_x * dx) A_s) B_s) * dx                for s = w, k, v, r, g
        r, k, v, g = W_r x_r, W_k x_k, W_v x_v, W_g x_g
        w = exp(-exp(w_0 + tanh(x_w D_1) D_2))                               decays, per channel
        o_t = (S_{t-1} + Diag(u) k_t v_t^T)^T r_t,   S_t = Diag(w_t) S_{t-1} + k_t v_t^T
        y = W_o (GroupNorm(o) * silu(g))                                     norm per head

    The state is read before it decays and before the token is written. Mixing weights, decays and bonuses start as in the
    authors' code, by channel and layer; the matrices of r, k, v and g start orthogonal.
    """

    def __init__(self, config: RWKV6Config, *, rngs: nnx.Rngs):
        self.config = config
        width, heads, rank = config.width, config.heads, config.mix_rank
        values = _initial_values(config)
        self.mixing = declared(jnp.asarray(values["mixing"], jnp.float32), axes=(None, "embed"), **NO_DECAY)
        first = nnx.initializers.zeros_init() if config.zero_init else nnx.initializers.lecun_normal()
        self.mix_in = parameter(rngs, first, (width, len(STREAMS) * rank), axes=("embed", None), **NO_DECAY)
        mix_out = (len(STREAMS), rank, width)
        self.mix_out = parameter(rngs, _small, mix_out, axes=(None, None, "embed"), **NO_DECAY)
        options = {"axes": ("embed", "heads"), "bias": False, "dtype": config.dtype, "rngs": rngs}
        orthogonal = nnx.initializers.orthogonal()
        self.receptance, self.key, self.value, self.gate = (
            linear(width, width, init=orthogonal, **options) for _ in range(4)
        )
        self.output = linear(width, width, init=first, **options | {"axes": ("heads", "embed")})
        self.decay = LowRank(
            *(width, config.decay_rank, width),
            activation=jnp.tanh,
            init=(first, _small),
            dtype=config.dtype,
            rngs=rngs,
            **NO_DECAY,
        )
        self.decay.outer.bias[...] = jnp.asarray(values["decay"], jnp.float32)
        bonus = jnp.asarray(values["bonus"].reshape(heads, config.head_dim), jnp.float32)
        self.bonus = declared(bonus, axes=("heads", None), **NO_DECAY)
        self.norm = HeadLayerNorm(heads, config.head_dim, epsilon=config.epsilon, rngs=rngs)

    def initial(self, batch_size: int, max_length: int | None) -> RWKV6Carry:
        config = self.config
        memory = (batch_size, config.heads, config.head_dim, config.head_dim)
        return RWKV6Carry(
            jnp.zeros((batch_size, 1, config.width), jnp.float32), jnp.zeros(memory, jnp.float32)
        )

    def mix(
        self, x: Float[Array, "b t d"], carried: RWKV6Carry | None, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], RWKV6Carry]:
        config = self.config
        token, memory = (None, None) if carried is None else carried
        x = x.astype(config.dtype)
        before, token = token_shift(x, token, segment_ids=segments)
        stream = dict(zip(STREAMS, self._mixed(x, before - x), strict=True))
        r, k, v = self.receptance(stream["r"]), self.key(stream["k"]), self.value(stream["v"])
        log_decay = -jnp.exp(self.decay(stream["w"]))
        r, k, v, log_decay = (split_heads(part, config.heads) for part in (r, k, v, log_decay))
        o, memory = gated_linear_attention(
            r,
            k,
            v,
            log_decay=log_decay,
            bonus=self.bonus[...],
            scale=1.0,
            initial_state=memory,
            segment_ids=segments,
        )
        y = self.norm(o) * jax.nn.silu(self.gate(stream["g"]).astype(jnp.float32))
        return self.output(y.astype(config.dtype)), RWKV6Carry(token, memory)

    def _mixed(self, x: jax.Array, dx: jax.Array) -> jax.Array:
        """Returns the inputs of the five streams, (5, b, t, d)."""
        config = self.config
        mixing, *weights = (part.astype(config.dtype) for part in (self.mixing[...], self.mix_in[...]))
        inner = jnp.tanh((x + mixing[0][None, None] * dx) @ weights[0])
        inner = inner.reshape(*x.shape[:2], len(STREAMS), config.mix_rank)
        moved = jnp.einsum("btsr,srd->sbtd", inner, self.mix_out[...].astype(config.dtype))
        return x[None] + (mixing[1:, None, None] + moved) * dx[None]


def _small(key, shape, dtype):
    """Initializer of second factors: uniform within 0.01."""
    return jax.random.uniform(key, shape, dtype, -0.01, 0.01)


def _initial_values(config: RWKV6Config) -> dict[str, np.ndarray]:
    """Returns the initial values that differ per channel and layer, as in the authors' code."""
    early, late = 1 - config.layer / config.depth, config.layer / max(config.depth - 1, 1)
    channel = np.arange(config.width)
    share, place = channel / config.width, channel / max(config.width - 1, 1)
    slow, fast = 1 - share**early, 1 - share ** (0.5 * early)
    zigzag = 0.1 * ((channel + 1) % 3 - 1)
    return {
        # Of the common input, then of w, k, v, r and g.
        "mixing": np.stack([slow, slow, slow, slow - 0.3 * late, fast, fast]),
        "decay": -6 + 5 * place ** (0.7 + 1.3 * late),
        "bonus": late * (1 - place) + zigzag,
    }
