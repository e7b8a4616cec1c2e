"""RWKV-7: a generalized delta rule with token shift and learned rates per channel (Peng et al. 2025, arXiv:2503.14456)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers.kernels.delta_rule import dplr_delta_rule
from layers.mixer import Mixer
from layers.options import ActivationDtype, Count, NonNegative, checked_dataclass
from layers.parameters import NO_DECAY, declared, linear
from layers.parts.heads import HeadLayerNorm, join_heads, split_heads
from layers.parts.low_rank import LowRank
from layers.parts.token_shift import token_shift
from layers.segments import Segments
from layers.typing import Array, Float

STREAMS = ("r", "w", "k", "v", "a", "g")


@checked_dataclass
class RWKV7Config:
    """Options of `RWKV7`.

    Attributes:
      width: d, number of input and output features.
      head_dim: K, features per head; divides the width.
      decay_rank, rate_rank, gate_rank: ranks of the maps that compute w, a and g. If None, 2.5, 2.5 and 5 times the root
        of the width, rounded to a multiple of 32, at least 32.
      value_residual: whether values are mixed with those of the first RWKV-7 layer of the stack, as in all but that layer of the
        authors' models.
      value_rank: rank of the map that computes the share of the first layer's values; if None, 1.7 times the root of the
        width, rounded likewise.
      zero_init: whether the output matrix and the first factors of those maps start at zero, as in the authors' training;
        otherwise normal with variance 1 / inputs.
      epsilon: epsilon of the norm per head, for each of its features.
      layer, depth: index of the layer, from 0, and number of layers of the model; they set the initial mixing weights,
        decays and scale of the norm.
      dtype: dtype of the activations; decays and state are float32.
    """

    width: int
    head_dim: int = 64
    decay_rank: int | None = None
    rate_rank: int | None = None
    gate_rank: int | None = None
    value_residual: bool = False
    value_rank: int | None = None
    zero_init: bool = True
    epsilon: NonNegative = 1e-5
    layer: Count = 0
    depth: int = 1
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        if self.head_dim < 2 or self.width % self.head_dim:
            raise ValueError(
                f"head_dim={self.head_dim} does not divide width={self.width} into heads of two features or more"
            )
        if not 0 <= self.layer < self.depth:
            raise ValueError(f"layer={self.layer}, depth={self.depth}; expected 0 <= layer < depth")

    @property
    def heads(self) -> int:
        """h."""
        return self.width // self.head_dim

    @property
    def ranks(self) -> tuple[int, int, int, int]:
        """Ranks of the maps that compute w, a, g and the share of the first layer's values."""
        ranks = (self.decay_rank, self.rate_rank, self.gate_rank, self.value_rank)
        given = zip(ranks, (2.5, 2.5, 5.0, 1.7), strict=True)
        return tuple(
            max(32, 32 * round(factor * math.sqrt(self.width) / 32)) if rank is None else rank
            for rank, factor in given
        )


class RWKV7Carry(NamedTuple):
    """What `RWKV7` carries: the last token, and the matrix memory per head, float32."""

    token: Float[Array, "b 1 d"]
    memory: Float[Array, "b h k v"]


class RWKV7(Mixer):
    """RWKV-7: time mixing by a generalized delta rule (Peng et al. 2025, arXiv:2503.14456).

        x_s = x_t + mu_s * (x_{t-1} - x_t)                                  for s = r, w, k, v, a, g
        r, k, v = W_r x_r, W_k x_k, W_v x_v
        w = exp(-e^(-1/2) sigmoid(w_0 + tanh(x_w W_1) W_2))                 decays, per channel
        a = sigmoid(a_0 + x_a A_1 A_2),   g = sigmoid(x_g G_1) G_2          learning rates, gate
        kappa = k * k_k, per head over its norm,   k~ = k * (1 + (a - 1) * k_a)
        S_t = (Diag(w_t) - (a_t * kappa_t) kappa_t^T) S_{t-1} + k~_t v_t^T,   o_t = S_t^T r_t
        y = W_o (g * (GroupNorm(o) + (r . (r_k * k~)) v))                   norm and product per head

    With `value_residual`, the values are mixed with those of the first layer, v^1, before they are written:

        v <- v + sigmoid(n_0 + x_v N_1 N_2) * (v^1 - v)

    The initial values are the authors' and depend on the layer and the number of layers.
    """

    shares_values = True

    def __init__(self, config: RWKV7Config, *, rngs: nnx.Rngs):
        self.config = config
        width, heads = config.width, config.heads
        values = _initial_values(config)
        self.mixing = _declared(values["mixing"], None, "embed")
        options = {"axes": ("embed", "heads"), "bias": False, "dtype": config.dtype, "rngs": rngs}
        self.receptance = linear(width, width, init=_uniform(0.5 / math.sqrt(width)), **options)
        self.key = linear(width, width, init=_uniform(0.05 / math.sqrt(width)), **options)
        self.value = linear(width, width, init=_uniform(0.5 / math.sqrt(width)), **options)
        first = nnx.initializers.zeros_init() if config.zero_init else nnx.initializers.lecun_normal()
        self.output = linear(width, width, init=first, **options | {"axes": ("heads", "embed")})
        low_rank = {"init": (first, _orthogonal), "dtype": config.dtype, "rngs": rngs, **NO_DECAY}
        decay_rank, rate_rank, gate_rank, value_rank = config.ranks
        self.decay = LowRank(width, decay_rank, width, activation=jnp.tanh, **low_rank)
        self.rate = LowRank(width, rate_rank, width, **low_rank)
        self.gate = LowRank(width, gate_rank, width, activation=jax.nn.sigmoid, bias=False, **low_rank)
        self.decay.outer.bias[...] = jnp.asarray(values["decay"], jnp.float32)
        self.rate.outer.bias[...] = jnp.asarray(values["rate"], jnp.float32)
        self.takes_values = config.value_residual
        self.share = LowRank(width, value_rank, width, **low_rank) if config.value_residual else None
        if self.share is not None:
            self.share.outer.bias[...] = jnp.asarray(values["share"], jnp.float32)
        self.removal = _declared(values["removal"], "heads")
        self.replacement = _declared(np.full(width, 1.02), "heads")
        self.bonus = _declared(np.full((heads, config.head_dim), -0.04), "heads", None)
        self.norm = HeadLayerNorm(heads, config.head_dim, epsilon=config.epsilon * config.head_dim, rngs=rngs)
        self.norm.scale[...] *= ((config.layer + 1) / config.depth) ** 0.7

    def initial(self, batch_size: int, max_length: int | None) -> RWKV7Carry:
        config = self.config
        return RWKV7Carry(
            jnp.zeros((batch_size, 1, config.width), jnp.float32),
            jnp.zeros((batch_size, config.heads, config.head_dim, config.head_dim), jnp.float32),
        )

    def mix(
        self, x: Float[Array, "b t d"], carried: RWKV7Carry | None, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], RWKV7Carry]:
        y, carried, _ = self.mix_sharing(x, carried, segments, None)
        return y, carried

    def mix_sharing(
        self,
        x: Float[Array, "b t d"],
        carried: RWKV7Carry | None,
        segments: Segments | None,
        values: Float[Array, "b t d"] | None,
    ) -> tuple[Float[Array, "b t d"], RWKV7Carry, Float[Array, "b t d"]]:
        """Returns the outputs, what to carry, and the values of the first layer: those given, or its own."""
        config = self.config
        if self.takes_values and values is None:
            raise ValueError(
                "value_residual=True reads the values of an earlier layer, and there is none; in the pattern, let a mixer 'rwkv7' "
                "that has value_residual=False come first, and none with it stand inside another mixer"
            )
        token, memory = (None, None) if carried is None else carried
        x = x.astype(config.dtype)
        before, token = token_shift(x, token, segment_ids=segments)
        mixed = x[None] + self.mixing[...].astype(config.dtype)[:, None, None] * (before - x)[None]
        stream = dict(zip(STREAMS, mixed, strict=True))
        r, v = self.receptance(stream["r"]), self.value(stream["v"])
        values = v if values is None else values
        if self.share is not None:
            share = jax.nn.sigmoid(self.share(stream["v"]))
            v = (v + share * (values - v)).astype(config.dtype)
        k = self.key(stream["k"]).astype(jnp.float32)
        log_decay = -math.exp(-0.5) * jax.nn.sigmoid(self.decay(stream["w"]))
        rate = jax.nn.sigmoid(self.rate(stream["a"]))
        kappa = split_heads(k * self.removal[...][None, None], config.heads)
        # Keeps the argument of the root above zero: its derivative is finite where a key vanishes.
        kappa = kappa * jax.lax.rsqrt(jnp.maximum(jnp.square(kappa).sum(-1, keepdims=True), 1e-24))
        k = k * (1 + (rate - 1) * self.replacement[...][None, None])
        r, k, v, rate, log_decay = (split_heads(u, config.heads) for u in (r, k, v, rate, log_decay))
        o, memory = dplr_delta_rule(
            r,
            k.astype(config.dtype),
            v,
            (-kappa).astype(config.dtype),
            (rate * kappa).astype(config.dtype),
            log_decay=log_decay,
            scale=1.0,
            initial_state=memory,
            segment_ids=segments,
        )
        own = (r.astype(jnp.float32) * k * self.bonus[...][None, None]).sum(-1, keepdims=True)
        y = (self.norm(o) + join_heads(own * v.astype(jnp.float32))) * self.gate(stream["g"])
        return self.output(y.astype(config.dtype)), RWKV7Carry(token, memory), values


def _declared(value: np.ndarray, *axes: str | None) -> nnx.Param:
    return declared(jnp.asarray(value, jnp.float32), axes=axes, **NO_DECAY)


def _uniform(bound: float):
    """Initializer: uniform between -bound and bound."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def _orthogonal(key, shape, dtype):
    """Initializer of second factors: orthogonal with gain 0.1 sqrt(inputs / outputs), at least 0.1."""
    gain = 0.1 * max(1.0, math.sqrt(shape[0] / shape[1]))
    return nnx.initializers.orthogonal(gain)(key, shape, dtype)


def _initial_values(config: RWKV7Config) -> dict[str, np.ndarray]:
    """Returns the initial values that differ per channel and layer, as in the authors' code."""
    early = 1 - config.layer / config.depth
    late = config.layer / max(config.depth - 1, 1)
    channel = np.arange(config.width)
    place = channel / (config.width - 1)
    middle = (config.head_dim - 1) / 2
    zigzag = (channel % config.head_dim - middle) / middle
    zigzag *= np.abs(zigzag)
    powers = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
    return {
        "mixing": np.stack([1 - (channel / config.width) ** (powers[s] * early) for s in STREAMS]),
        "decay": -5.5 + 6 * place ** (1 + late**0.3) + 2.5 * zigzag,
        "rate": -0.19 + 0.3 * zigzag + 0.4 * (place - 0.5),
        "share": 0.73 - 0.4 * (place - 0.5),
        "removal": 0.71 - 0.1 * (place - 0.5),
    }
