"""The channel mixing of RWKV, which also reads the token before (Peng et al. 2023, arXiv:2305.13048)."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers.mixer import Mixer
from layers.options import ActivationDtype, Count, checked_dataclass
from layers.parameters import NO_DECAY, declared, linear
from layers.parts.token_shift import token_shift
from layers.segments import Segments
from layers.typing import Array, Float


@checked_dataclass
class RWKVChannelConfig:
    """Options of `RWKVChannel`.

    Attributes:
      width: d, number of input and output features.
      version: which RWKV: 4 and 6 gate the output, and 4 weighs the token itself where 6 and 7 weigh the one before.
      hidden: m, number of features inside; 4 width if None, or 3.5 width rounded down to a multiple of 32 in version 6.
      zero_init: whether the matrices of values and receptance start at zero, as in the authors' training; otherwise they
        start orthogonal, like that of keys.
      layer, depth: index of the layer, from 0, and number of layers of the model; they set the initial mixing weights.
      dtype: dtype of the activations.
    """

    width: int
    version: Literal[4, 6, 7] = 7
    hidden: int | None = None
    zero_init: bool = True
    layer: Count = 0
    depth: int = 1
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        if not 0 <= self.layer < self.depth:
            raise ValueError(f"layer={self.layer}, depth={self.depth}; expected 0 <= layer < depth")

    @property
    def size(self) -> int:
        """m."""
        if self.hidden is not None:
            return self.hidden
        return max(32, 7 * self.width // 64 * 32) if self.version == 6 else 4 * self.width


class RWKVChannel(Mixer):
    """The channel mixing of RWKV-4 (arXiv:2305.13048), RWKV-6 (arXiv:2404.05892) and RWKV-7 (arXiv:2503.14456).

        y = sigmoid(W_r m_r(x)) * W_v relu(W_k m_k(x))^2          versions 4 and 6
        y = W_v relu(W_k m_k(x))^2                                version 7
        m(x)_t = mu * x_t + (1 - mu) * x_{t-1}                    version 4
        m(x)_t = x_t + mu * (x_{t-1} - x_t)                       versions 6 and 7

    It follows the time mixing in each layer and carries the last token, and is therefore a mixer: a model of RWKV has twice as
    many blocks as layers, with the pattern ("rwkv7+none", "rwkv_channel+none").
    """

    def __init__(self, config: RWKVChannelConfig, *, rngs: nnx.Rngs):
        self.config = config
        orthogonal = nnx.initializers.orthogonal()
        last = nnx.initializers.zeros_init() if config.zero_init else orthogonal
        options = {"bias": False, "dtype": config.dtype, "rngs": rngs}
        self.key = linear(config.width, config.size, axes=("embed", "inner"), init=orthogonal, **options)
        self.value = linear(config.size, config.width, axes=("inner", "embed"), init=last, **options)
        self.receptance = (
            linear(config.width, config.width, axes=("embed", "inner"), init=last, **options)
            if config.version != 7
            else None
        )
        mixing = jnp.asarray(_initial_mixing(config), jnp.float32)
        self.mixing = declared(mixing, axes=(None, "embed"), **NO_DECAY)

    def initial(self, batch_size: int, max_length: int | None) -> Float[Array, "b 1 d"]:
        return jnp.zeros((batch_size, 1, self.config.width), jnp.float32)

    def mix(
        self, x: Float[Array, "b t d"], carried: Float[Array, "b 1 d"] | None, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b 1 d"]]:
        x = x.astype(self.config.dtype)
        before, token = token_shift(x, carried, segment_ids=segments)
        mu = self.mixing[...].astype(self.config.dtype)[:, None, None]
        x, before = x[None], before[None]
        mixed = mu * x + (1 - mu) * before if self.config.version == 4 else x + mu * (before - x)
        y = self.value(jnp.square(jax.nn.relu(self.key(mixed[0]))))
        if self.receptance is not None:
            y = jax.nn.sigmoid(self.receptance(mixed[1])) * y
        return y, token


def _initial_mixing(config: RWKVChannelConfig) -> np.ndarray:
    """Returns the mixing weights of keys and receptance per channel, as in the authors' code."""
    early = 1 - config.layer / config.depth
    share = (np.arange(config.width) / config.width) ** (early**4 if config.version == 7 else early)
    return np.stack([share if config.version == 4 else 1 - share] * (1 if config.version == 7 else 2))
