"""H3: a shift and a diagonal state space model between two products (Fu et al. 2023, arXiv:2212.14052)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from layers.mixer import Mixer
from layers.mixers.state_space.s4d import S4D, S4DConfig
from layers.options import ActivationDtype, checked_dataclass
from layers.parameters import declared, linear, parameter
from layers.parts.segmented_convolution import convolve, last_inputs
from layers.parts.state_space import check_steps
from layers.segments import Segments
from layers.typing import Array, Complex, Float


@checked_dataclass
class H3Config:
    """Options of `H3`.

    Attributes:
      width: d, number of input and output features.
      head_dim: features per head, whose keys and values are multiplied as an outer product; divides the width.
      state_size: N, number of keys that the shift sees, and state size of each diagonal system (N / 2 conjugate pairs).
      dt_min, dt_max: range of the initial step sizes, in units of one token; log-uniform, one per head.
      dtype: dtype of the activations; kernels and states are float32 and complex64.
    """

    width: int
    head_dim: int = 1
    state_size: int = 64
    dt_min: float = 0.001
    dt_max: float = 0.1
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        if self.width % self.head_dim:
            raise ValueError(f"head_dim={self.head_dim} does not divide width={self.width}")
        if self.state_size < 2 or self.state_size % 2:
            raise ValueError(f"state_size={self.state_size}; expected an even number, for conjugate pairs")
        check_steps(self.dt_min, self.dt_max)

    @property
    def heads(self) -> int:
        """Number of heads."""
        return self.width // self.head_dim


class H3Carry(NamedTuple):
    """What `H3` carries.

    Attributes:
      keys: the last N - 1 keys of the segment, latest last.
      h: the modes per head, for each pair of a key feature and a value feature.
    """

    keys: Float[Array, "b s d"]
    h: Complex[Array, "b k v h n"]


class H3(Mixer):
    """H3: two state space models between multiplicative gates (Fu et al. 2023, arXiv:2212.14052).

        q, k, v = W_q x + b_q, W_k x + b_k, W_v x + b_v
        y = W_o (q * SSM_diag(SSM_shift(k) * v)) + b_o

    SSM_shift is a skip and a filter of N taps, C (S^l B) with S the shift matrix and initially B = e_1, so that the taps
    are C. SSM_diag is S4D with Lin eigenvalues and its own skip, one system per head. With heads of r > 1 features the
    products are an outer product and its contraction, o_j = sum_i q_i SSM_diag(k_i v_j).
    """

    def __init__(self, config: H3Config, *, rngs: nnx.Rngs):
        self.config = config
        options = {"axes": ("embed", "heads"), "dtype": config.dtype, "rngs": rngs}
        self.query = linear(config.width, config.width, **options)
        self.key = linear(config.width, config.width, **options)
        self.value = linear(config.width, config.width, **options)
        self.output = linear(config.width, config.width, **options | {"axes": ("heads", "embed")})
        shape, bound = (config.width, config.state_size), 1 / math.sqrt(config.state_size)
        first = jnp.zeros(shape, jnp.float32).at[:, 0].set(1.0)
        output, normal = {"group": "ssm_output"}, nnx.initializers.normal(1.0)
        self.shift_b = declared(first, group="ssm/b", axes=("heads", None))
        self.shift_c = parameter(rngs, _uniform(bound), shape, axes=("heads", None), **output)
        self.shift_d = parameter(rngs, normal, shape[:1], axes=("heads",), **output)
        self.ssm = S4D(
            S4DConfig(
                config.heads,
                state_size=config.state_size,
                init="lin",
                systems=config.heads,
                dt_min=config.dt_min,
                dt_max=config.dt_max,
            ),
            axis="heads",
            rngs=rngs,
        )

    def initial(self, batch_size: int, max_length: int | None) -> H3Carry:
        config = self.config
        shape = (batch_size, config.head_dim, config.head_dim, config.heads, config.state_size // 2)
        keys = jnp.zeros((batch_size, config.state_size - 1, config.width), jnp.float32)
        return H3Carry(keys, jnp.zeros(shape, jnp.complex64))

    def mix(
        self, x: Float[Array, "b t d"], carried: H3Carry | None, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], H3Carry | None]:
        past, h = (None, None) if carried is None else carried
        k = self.key(x)
        shifted = convolve(k, self._shift_taps(), past=past, segment_ids=segments)
        shifted = shifted + self.shift_d[...].astype(k.dtype)[None, None] * k
        q, shifted, v = (self._split(part) for part in (self.query(x), shifted, self.value(x)))
        y, h = self._attend(q, shifted, v, h, segments)
        y = self.output(y.reshape(x.shape).astype(self.config.dtype))
        return y, None if carried is None else H3Carry(last_inputs(past, k, segments), h)

    def _attend(self, q, k, v, h, segments):
        """Returns o_tj = sum_i q_ti SSM_diag(k_i v_j)_t; each pair (i, j) is a row of the state space model."""
        rows, time, heads, size = q.shape
        pairs = size * size
        products = jnp.einsum("bthi,bthj->bijth", k.astype(jnp.float32), v.astype(jnp.float32))
        segments = jax.tree.map(lambda field: jnp.repeat(field, pairs, axis=0), segments)
        before = None if h is None else h.reshape(rows * pairs, heads, h.shape[-1])
        y, after = self.ssm.mix(products.reshape(rows * pairs, time, heads), before, segments)
        o = jnp.einsum("bthi,bijth->bthj", q.astype(jnp.float32), y.reshape(rows, size, size, time, heads))
        return o, None if h is None else after.reshape(h.shape)

    def _split(self, x):
        return x.reshape(*x.shape[:2], self.config.heads, self.config.head_dim)

    def _shift_taps(self):
        """Returns C S^l B = sum_n B_n C_{n+l}, for l < N."""
        size = self.config.state_size
        b, c = (jnp.fft.rfft(v[...], 2 * size) for v in (self.shift_b, self.shift_c))
        return jnp.fft.irfft(b.conj() * c, 2 * size)[:, :size]


def _uniform(bound):
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
