"""Comba: a delta rule with feedback of the memory to itself and to the output (Hu et al. 2025, arXiv:2506.02475)."""

import jax
import jax.numpy as jnp
from flax import nnx

from layers.kernels.delta_rule import delta_rule
from layers.mixer import Mixer
from layers.options import checked_dataclass
from layers.parameters import NO_DECAY, linear, parameter
from layers.parts.delta_memory import DeltaCarry, DeltaMemory, WideValuesConfig
from layers.parts.heads import HeadNorm, split_heads
from layers.parts.log_decay import SoftplusDecay
from layers.segments import Segments
from layers.typing import Array, Float


@checked_dataclass
class CombaConfig(WideValuesConfig):
    """Options of `Comba`: those of `WideValuesConfig` and more.

    Attributes:
      correction: initial value of the weight d of the output correction, 1 or, for small models, 0.02.
      weaker_feedback: whether tokens erase less than they write, by the factor b, as in the paper. The authors' kernels
        normalize what is erased, after which b is in the output correction alone.
    """

    correction: float = 1.0
    weaker_feedback: bool = False


class Comba(Mixer):
    """Comba: a bilinear recurrence in closed-loop control (Hu et al. 2025, arXiv:2506.02475).

        q', k', v = silu(conv(W_q x)), silu(conv(W_k x)), silu(conv(W_v x))
        k = k' / |k'|,   q = (q' - d b k') / |q' - d b k'|,   b = sigmoid(r)            d, r: one number per key head
        beta = sigmoid(W_b x),  log alpha = -exp(a) softplus(W_a x + c)                 (h)
        S' = alpha_t S_{t-1},   S_t = S' + beta_t k_t (v_t - S'^T p_t)^T,   o_t = S_t^T q_t / sqrt(K)
        y = W_o (RMSNorm(o) * sigmoid(W_g x))                                           norm per head

    where p = k, or b k with `weaker_feedback`. The latter is a delta rule with the strength b beta, whose memory is b times
    this one.
    """

    def __init__(self, config: CombaConfig, *, rngs: nnx.Rngs):
        self.config = config
        _, value_dim = config.sizes
        values = config.outputs * value_dim
        options = {"axes": ("embed", "heads"), "bias": False, "dtype": config.dtype, "rngs": rngs}
        self.memory = DeltaMemory(config, rngs=rngs)
        by_head = {"axes": ("heads",), **NO_DECAY}
        self.feedback = parameter(rngs, nnx.initializers.ones_init(), (config.heads,), **by_head)
        start = nnx.initializers.constant(config.correction)
        self.correction = parameter(rngs, start, (config.heads,), **by_head)
        self.rate = linear(config.width, config.outputs, **options)
        self.decay = SoftplusDecay(config.outputs, rates=(0.01, 16.0), rngs=rngs)
        self.gate = linear(config.width, values, **options)
        self.norm = HeadNorm(value_dim, gate="sigmoid", epsilon=config.epsilon, dtype=config.dtype, rngs=rngs)
        self.output = linear(values, config.width, **options | {"axes": ("heads", "embed")})

    def initial(self, batch_size: int, max_length: int | None) -> DeltaCarry:
        return self.memory.initial(batch_size)

    def mix(
        self, x: Float[Array, "b t d"], carried: DeltaCarry | None, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], DeltaCarry]:
        config, parts = self.config, self.memory
        state, inputs = (None, None) if carried is None else carried
        features, inputs = parts.convolution(parts.projection(x), inputs, segment_ids=segments)
        keys = config.heads * config.sizes[0]
        q, k, v = jnp.split(features, [keys, 2 * keys], axis=-1)
        q, k = (split_heads(part, config.heads).astype(jnp.float32) for part in (q, k))
        feedback = jax.nn.sigmoid(self.feedback[...])
        q = q - (self.correction[...] * feedback)[None, None, :, None] * k
        strength = parts.largest * jax.nn.sigmoid(parts.strength(x).astype(jnp.float32))
        if config.weaker_feedback:
            weaker = jnp.repeat(feedback, config.outputs // config.heads)[None, None]
            strength = strength * weaker
        o, state = delta_rule(
            q.astype(config.dtype),
            k.astype(config.dtype),
            split_heads(v, config.outputs),
            strength,
            log_decay=self.decay(self.rate(x)),
            normalize_qk=True,
            initial_state=state,
            segment_ids=segments,
        )
        if config.weaker_feedback:
            o = o / weaker[..., None].astype(o.dtype)
        return self.output(self.norm(o, self.gate(x))), DeltaCarry(state, inputs)
