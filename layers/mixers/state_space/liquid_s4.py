"""Liquid-S4: S4 plus products of neighboring inputs (Hasani et al. 2022, arXiv:2209.12951)."""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from flax import nnx

from layers.kernels.short_conv import short_conv
from layers.mixer import Mixer
from layers.mixers.state_space.s4 import S4, S4Config
from layers.options import ActivationDtype, checked_dataclass
from layers.segments import Segments
from layers.typing import Array, Float


@checked_dataclass
class LiquidS4Config:
    """Options of `LiquidS4`.

    Attributes:
      width: d, number of input and output features, each with its own system.
      degree: P, highest degree of the products, at least 2.
      kernel: how products act: "pb", only at their own token, or "kb", through the state.
      state_size, systems, max_length, dt_min, dt_max: those of `S4Config`.
      dtype: dtype of the activations; kernels and states are float32.
    """

    width: int
    degree: int = 2
    kernel: Literal["pb", "kb"] = "pb"
    state_size: int = 64
    systems: int = 1
    max_length: int | None = None
    dt_min: float = 0.001
    dt_max: float = 0.1
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        if self.degree < 2:
            raise ValueError(f"degree={self.degree}; expected at least 2 (1 is S4 itself)")
        _ = self.s4

    @property
    def s4(self) -> S4Config:
        """The options of the inner S4."""
        names = ("width", "state_size", "systems", "max_length", "dt_min", "dt_max", "dtype")
        return S4Config(**{name: getattr(self, name) for name in names})


class LiquidS4Carry(NamedTuple):
    """What `LiquidS4` carries: the state of the inner S4, and the last product per degree below P."""

    h: Float[Array, "b d n"]
    products: Float[Array, "b p d"]


class LiquidS4(Mixer):
    """Liquid-S4: a linearized liquid state space model, S4 with products of inputs (Hasani et al. 2022, arXiv:2209.12951).

        y_t = sum_l C a^l b x_{t-l} + D x_t + sum_{p=2}^P C b^(p) u^(p)_t                      (pb)
        y_t = sum_l C a^l b x_{t-l} + D x_t + sum_{p=2}^P sum_l C a^l b^(p) u^(p)_{t-l}        (kb)
        u^(1) = x,  u^(p)_t = u^(p-1)_t u^(p-1)_{t-1},    b^(1) = b,  b^(p) = b^(p-1) sum_n b^(p-1)_n

    with the discretized a, b and C, D of `S4`. b^(p) is b times a power of s = sum_n b_n: the term of degree p is one
    more input, s^(2^(p-1) - 1) u^(p). Some versions of the published code reverse the products in time; here a product
    acts from the token of its last factor on.
    """

    def __init__(self, config: LiquidS4Config, *, rngs: nnx.Rngs):
        self.config = config
        self.s4 = S4(config.s4, rngs=rngs)

    def initial(self, batch_size: int, max_length: int | None) -> LiquidS4Carry:
        products = jnp.zeros((batch_size, self.config.degree - 1, self.config.width), jnp.float32)
        return LiquidS4Carry(self.s4.initial(batch_size, max_length), products)

    def mix(
        self, x: Float[Array, "b t d"], carried: LiquidS4Carry | None, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], LiquidS4Carry]:
        config = self.config
        h, past = (None, None) if carried is None else carried
        x = x.astype(config.dtype)
        system = self.s4.system()
        # The other half of the modes are conjugates: the full sum is twice that of the real parts.
        total = 2 * system.b_bar[:, : config.state_size // 2].sum(1)
        liquid, products = _liquid_input(x.astype(jnp.float32), total, config.degree, past, segments)
        liquid = liquid.astype(config.dtype)
        if config.kernel == "pb":
            y, h = self.s4.mix(x, h, segments)
            extra = (system.c * system.b_bar).sum(1).astype(config.dtype)[None, None] * liquid
        else:
            y, h = self.s4.mix(x + liquid, h, segments)
            # The skip of the inner S4 applies to the input only.
            extra = -self.s4.d[...].astype(config.dtype)[None, None] * liquid
        return y + extra, LiquidS4Carry(h, products)


def _liquid_input(x, total, degree, past, segment_ids):
    """Returns sum_{p=2}^P s^(2^(p-1) - 1) u^(p) with s = `total` (d), and the last u^(p) for each p < P."""
    previous = jnp.broadcast_to(jnp.array([[1.0], [0.0]], jnp.float32), (2, x.shape[-1]))
    u, liquid, last = x, jnp.zeros_like(x), []
    for p in range(2, degree + 1):
        initial = None if past is None else past[:, p - 2 : p - 1]
        before, final = short_conv(u, previous, initial_state=initial, segment_ids=segment_ids)
        u = u * before
        liquid = liquid + (total ** (2 ** (p - 1) - 1))[None, None] * u
        last.append(final)
    return liquid, jnp.concatenate(last, axis=1)
