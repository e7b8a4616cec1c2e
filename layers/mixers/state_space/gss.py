"""GSS: gating around a narrow diagonal state space model (Mehta et al. 2022, arXiv:2206.13947)."""

import jax
import jax.numpy as jnp
from flax import nnx

from layers.kernels.ssm_kernel import ssm_kernel, zoh
from layers.mixer import Mixer
from layers.norms import LayerNorm, LayerNormConfig
from layers.options import ActivationDtype, checked_dataclass
from layers.parameters import linear, parameter
from layers.parts.segmented_convolution import convolve
from layers.parts.state_space import as_complex, complex_normal, run_modes
from layers.segments import Segments
from layers.typing import Array, Complex, Float

STEP = 1.0


@checked_dataclass
class GSSConfig:
    """Options of `GSS`.

    Attributes:
      width: d, number of input and output features.
      gate_width: number of features of the gate; 4 d if None.
      ssm_width: number of channels of the state space model; d / 4 if None.
      state_size: N, number of complex modes, shared by all channels.
      dtype: dtype of the activations; kernels and states are float32 and complex64.
    """

    width: int
    gate_width: int | None = None
    ssm_width: int | None = None
    state_size: int = 512
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        if self.narrow < 1:
            raise ValueError(
                f"width={self.width} leaves ssm_width={self.narrow}; set ssm_width to at least 1"
            )

    @property
    def gated(self) -> int:
        """Number of features of the gate."""
        return 4 * self.width if self.gate_width is None else self.gate_width

    @property
    def narrow(self) -> int:
        """Number of channels of the state space model."""
        return self.width // 4 if self.ssm_width is None else self.ssm_width


class GSS(Mixer):
    """GSS: gated state spaces, a gate around a narrow DSS (Mehta et al. 2022, arXiv:2206.13947).

        u = LayerNorm(gelu(W_v x)),  s_t = sum_l K_l u_{t-l} + D u_t
        y = W_o (W_u s * gelu(W_g x)) + b_o,    K_l = Re sum_n C_n (exp(A_n) - 1) / A_n exp(l A_n)

    with A (N) and C (channels x N) complex: a DSS with the exponential kernel whose step size is fixed at 1 and whose
    eigenvalues are random, A = -exp(r) + i exp(w) with r, w standard normal. C and D are standard normal as well. Without
    a state it runs as a convolution, with one as the recurrence of its modes.
    """

    def __init__(self, config: GSSConfig, *, rngs: nnx.Rngs):
        self.config = config
        options = {"axes": ("embed", "inner"), "dtype": config.dtype, "rngs": rngs}
        self.gate = linear(config.width, config.gated, bias=False, **options)
        self.value = linear(config.width, config.narrow, bias=False, **options)
        self.norm = LayerNorm(LayerNormConfig(config.narrow, dtype=config.dtype), rngs=rngs)
        normal, shape = nnx.initializers.normal(1.0), (config.narrow, config.state_size)
        self.log_rate = parameter(rngs, normal, shape[1:], group="ssm", axes=("state",))
        self.log_frequency = parameter(rngs, normal, shape[1:], group="ssm", axes=("state",))
        self.c = complex_normal(rngs, shape, variance=2.0, group="ssm_output", axes=("inner", "state"))
        self.d = parameter(rngs, normal, shape[:1], group="ssm_output", axes=("inner",))
        self.expand = linear(config.narrow, config.gated, bias=False, **options | {"axes": ("inner", None)})
        self.output = linear(config.gated, config.width, **options | {"axes": ("inner", "embed")})

    def initial(self, batch_size: int, max_length: int | None) -> Complex[Array, "b d n"]:
        return jnp.zeros((batch_size, self.config.narrow, self.config.state_size), jnp.complex64)

    def mix(
        self, x: Float[Array, "b t d"], carried: Complex[Array, "b e n"] | None, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], Complex[Array, "b e n"] | None]:
        config, time, h = self.config, x.shape[1], None
        gate = jax.nn.gelu(self.gate(x), approximate=False)
        u = self.norm(jax.nn.gelu(self.value(x), approximate=False))
        a = jax.lax.complex(-jnp.exp(self.log_rate[...]), jnp.exp(self.log_frequency[...]))[None]
        c = as_complex(self.c)
        if carried is None:
            steps = jnp.full(config.narrow, STEP, jnp.float32)
            kernel = ssm_kernel(a, None, c, steps, length=max(1, time), conjugate_pairs=False)
            s = convolve(u, kernel, segment_ids=segments)
        else:
            s, h = run_modes(
                *zoh(a, jnp.full((1, 1), STEP, jnp.float32)), c, u, carried, segment_ids=segments
            )
        s = s.astype(config.dtype) + self.d[...].astype(config.dtype)[None, None] * u
        return self.output(self.expand(s) * gate), h
