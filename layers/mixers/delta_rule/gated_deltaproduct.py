"""Gated DeltaProduct: several steps of the delta rule per token (Siems et al. 2025, arXiv:2502.10297)."""

import jax
import jax.numpy as jnp
from flax import nnx

from layers.kernels.delta_rule import delta_rule
from layers.mixer import Mixer
from layers.options import checked_dataclass
from layers.parameters import linear
from layers.parts.delta_memory import DeltaCarry, WideValuesConfig
from layers.parts.heads import HeadNorm, split_heads
from layers.parts.log_decay import SoftplusDecay
from layers.parts.short_convolution import ShortConvolution
from layers.segments import Segments
from layers.typing import Array, Float


@checked_dataclass
class GatedDeltaProductConfig(WideValuesConfig):
    """Options of `GatedDeltaProduct`: those of `WideValuesConfig` and more.

    Attributes:
      negative_eigenvalues: whether writing strengths lie in (0, 2) instead of (0, 1), so that a step may be a reflection.
      householders: n, number of steps of the delta rule per token.
      decay: whether the memory decays before each token; DeltaProduct if False.
    """

    negative_eigenvalues: bool = True
    householders: int = 2
    decay: bool = True


class GatedDeltaProduct(Mixer):
    """Gated DeltaProduct: a product of n generalized Householder steps per token (Siems et al. 2025, arXiv:2502.10297).

        q, k_j, v_j = silu(conv(W_q x)), silu(conv(W_k x)), silu(conv(W_v x)),   then q and k_j of norm 1;   j = 1 ... n
        beta_j = 2 sigmoid(W_b x),  log alpha = -exp(a) softplus(W_a x + c)
        S_{t,0} = alpha_t S_{t-1,n},   S_{t,j} = S_{t,j-1} + beta_j k_j (v_j - S_{t,j-1}^T k_j)^T
        o_t = S_{t,n}^T q_t / sqrt(K),   y = W_o (RMSNorm(o) * silu(W_g x))          norm per head

    The transition of a token is a product of n reflections: with n = 2 it may be a rotation. The steps run as n tokens, of
    which the first decays and the last is read.
    """

    def __init__(self, config: GatedDeltaProductConfig, *, rngs: nnx.Rngs):
        self.config = config
        key_dim, value_dim = config.sizes
        steps, keys, values = config.householders, config.heads * key_dim, config.outputs * value_dim
        options = {"axes": ("embed", "heads"), "bias": False, "dtype": config.dtype, "rngs": rngs}
        features = keys + steps * (keys + values)
        self.projection = linear(config.width, features, **options)
        self.convolution = ShortConvolution(features, config.taps, dtype=config.dtype, rngs=rngs)
        self.strength = linear(config.width, steps * config.outputs, **options)
        self.rate = linear(config.width, config.outputs, **options) if config.decay else None
        self.decay = SoftplusDecay(config.outputs, rates=(0.01, 16.0), rngs=rngs) if config.decay else None
        self.gate = linear(config.width, values, **options)
        self.norm = HeadNorm(value_dim, gate="silu", epsilon=config.epsilon, dtype=config.dtype, rngs=rngs)
        self.output = linear(values, config.width, **options | {"axes": ("heads", "embed")})

    def initial(self, batch_size: int, max_length: int | None) -> DeltaCarry:
        memory = (batch_size, self.config.outputs, *self.config.sizes)
        return DeltaCarry(jnp.zeros(memory, jnp.float32), self.convolution.init_state(batch_size))

    def mix(
        self, x: Float[Array, "b t d"], carried: DeltaCarry | None, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], DeltaCarry]:
        config = self.config
        memory, inputs = (None, None) if carried is None else carried
        features, inputs = self.convolution(self.projection(x), inputs, segment_ids=segments)
        steps, keys = config.householders, config.heads * config.sizes[0]
        q, k, v = jnp.split(features, [keys, keys + steps * keys], axis=-1)
        strength = jax.nn.sigmoid(self.strength(x).astype(jnp.float32))
        log_decay = None if self.decay is None else self._at(0, self.decay(self.rate(x)))
        o, memory = delta_rule(
            self._at(steps - 1, split_heads(q, config.heads)),
            split_heads(self._as_tokens(k), config.heads),
            split_heads(self._as_tokens(v), config.outputs),
            (2.0 if config.negative_eigenvalues else 1.0) * self._as_tokens(strength),
            log_decay=log_decay,
            normalize_qk=True,
            initial_state=memory,
            segment_ids=None if segments is None else _repeated(segments, steps),
        )
        o = o.reshape(*x.shape[:2], steps, *o.shape[2:])[:, :, -1]
        return self.output(self.norm(o, self.gate(x))), DeltaCarry(memory, inputs)

    def _as_tokens(self, x: Float[Array, "b t f"]) -> Float[Array, "b s g"]:
        """Returns features of n steps, one behind the other, as n tokens."""
        steps = self.config.householders
        return x.reshape(x.shape[0], x.shape[1] * steps, x.shape[2] // steps)

    def _at(self, step: int, x: Float[Array, "b t *f"]) -> Float[Array, "b s *f"]:
        """Returns n tokens per token, zero except at one step."""
        steps = self.config.householders
        around = [(0, 0)] * (x.ndim + 1)
        around[2] = (step, steps - 1 - step)
        return jnp.pad(x[:, :, None], around).reshape(x.shape[0], x.shape[1] * steps, *x.shape[2:])


def _repeated(segments: Segments, times: int) -> Segments:
    """Returns the segments of tokens that each stand `times` times."""
    ids = jnp.repeat(segments.ids, times, axis=1)
    return Segments.of(ids, padding=segments.padding, packed=segments.packed)
