"""MesaNet: a matrix memory that solves a regularized regression at every token (von Oswald et al. 2025, arXiv:2506.05233)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from layers.kernels.gated_linear_attention import gated_linear_attention
from layers.mixer import Mixer
from layers.options import ActivationDtype, NonNegative, checked_dataclass
from layers.parameters import NO_DECAY, linear, parameter
from layers.parts.heads import HeadNorm, head_size, split_heads, unit
from layers.parts.short_convolution import ShortConvolution
from layers.segments import Segments
from layers.typing import Array, Float


@checked_dataclass
class MesaNetConfig:
    """Options of `MesaNet`.

    Attributes:
      width: d, number of input and output features.
      heads: h, number of heads.
      head_dim: K, features per head; width / heads if None.
      steps: most steps of conjugate gradients; K of them are exact but for rounding.
      least: lower bound of the regularization.
      gate: whether silu(W_g x) gates the output.
      taps: number of taps of the short convolutions of queries and keys, 2 to 8.
      epsilon: epsilon of the norm per head.
      dtype: dtype of the activations; gates, states and the regression are float32.
    """

    width: int
    heads: int = 4
    head_dim: int | None = None
    steps: int = 30
    least: float = 0.25
    gate: bool = False
    taps: int = 4
    epsilon: NonNegative = 1e-5
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}; expected at least 1")
        if not 0 < self.least < 1:
            raise ValueError(f"least={self.least}; expected 0 < least < 1, where the regularization starts")
        _ = self.size

    @property
    def size(self) -> int:
        """K."""
        return head_size("head_dim", self.head_dim, self)


class MesaNetCarry(NamedTuple):
    """What `MesaNet` carries, float32: the last inputs of its convolution, and the sums H and S."""

    inputs: Float[Array, "b w-1 n"]
    keys: Float[Array, "b h k k"]
    values: Float[Array, "b h k v"]


class MesaNet(Mixer):
    """MesaNet: reads the values by the solution of a regression (von Oswald et al. 2025, arXiv:2506.05233).

        q, k = silu(conv(W_q x)), silu(conv(W_k x)),  each of norm 1,   v = W_v x
        beta = sigmoid(W_b x + c_b),   log alpha = log_sigmoid(W_a x + c_a)            (h)
        H_t = alpha_t H_{t-1} + beta_t k_t k_t^T,   S_t = alpha_t S_{t-1} + beta_t k_t v_t^T
        o_t = S_t^T (H_t + Diag(lambda))^{-1} q_t,   lambda = least + softplus(l)      (K per head)
        y = W_o RMSNorm(o)                                                             norm per head; gated with `gate`

    S_t^T (H_t + Diag(lambda))^{-1} is the linear map from keys to values with the least squared error, weighted by beta and decays, and
    with the penalty lambda. Conjugate gradients solve for all tokens at once: the products with H_t are linear attention of
    the search directions to the keys. The backward pass solves once more. lambda starts at 1.
    """

    def __init__(self, config: MesaNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        heads, size = config.heads, config.size
        features = heads * size
        options = {"axes": ("embed", "heads"), "bias": False, "dtype": config.dtype, "rngs": rngs}
        self.projection = linear(config.width, 2 * features, **options)
        self.convolution = ShortConvolution(
            2 * features, config.taps, axis="heads", dtype=config.dtype, rngs=rngs
        )
        self.value = linear(config.width, features, **options)
        self.strength = linear(config.width, heads, **options | {"bias": True})
        self.decay = linear(config.width, heads, **options | {"bias": True})
        start = nnx.initializers.constant(math.log(math.expm1(1 - config.least)))
        self.penalty = parameter(rngs, start, (heads, size), axes=("heads", None), **NO_DECAY)
        self.gate = linear(config.width, features, **options) if config.gate else None
        silu = "silu" if config.gate else None
        self.norm = HeadNorm(size, gate=silu, epsilon=config.epsilon, dtype=config.dtype, rngs=rngs)
        self.output = linear(features, config.width, **options | {"axes": ("heads", "embed")})

    def initial(self, batch_size: int, max_length: int | None) -> MesaNetCarry:
        sums = jnp.zeros((batch_size, self.config.heads, self.config.size, self.config.size), jnp.float32)
        return MesaNetCarry(self.convolution.init_state(batch_size), sums, sums)

    def mix(
        self, x: Float[Array, "b t d"], carried: MesaNetCarry | None, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], MesaNetCarry]:
        config = self.config
        inputs, keys, values = (None, None, None) if carried is None else carried
        features, inputs = self.convolution(self.projection(x), inputs, segment_ids=segments)
        q, k = (unit(split_heads(part, config.heads)) for part in jnp.split(features, 2, axis=-1))
        v = split_heads(self.value(x), config.heads).astype(jnp.float32)
        strength = jax.nn.sigmoid(self.strength(x).astype(jnp.float32))
        log_decay = jax.nn.log_sigmoid(self.decay(x).astype(jnp.float32))
        penalty = (config.least + jax.nn.softplus(self.penalty[...]))[None, None]
        # The regression amplifies what is rounded: its operands are float32 whatever the activations are.
        written = strength[..., None] * k

        def attend(queries, what, state):
            return gated_linear_attention(
                queries,
                written,
                what,
                log_decay=log_decay,
                scale=1.0,
                initial_state=state,
                segment_ids=segments,
            )

        def product(direction):
            return attend(direction, k, keys)[0] + penalty * direction

        def solve(matrix, target):
            return _conjugate_gradients(matrix, target, config.steps)

        solved = jax.lax.custom_linear_solve(product, q, solve, symmetric=True)
        o, values = attend(solved, v, values)
        _, keys = attend(q, k, keys)
        y = self.norm(o, None if self.gate is None else self.gate(x))
        return self.output(y), MesaNetCarry(inputs, keys, values)


def _conjugate_gradients(product, target, steps):
    """The solution of A x = target for the positive definite matrix A of every token, `product` being x -> A x.

    A token whose residual is zero stays as it is.
    """

    def dot(a, b):
        return (a * b).sum(-1, keepdims=True)

    def quotient(above, below):
        fit = below > 0
        return jnp.where(fit, above / jnp.where(fit, below, 1), 0)

    def step(_, state):
        x, residual, direction, norm = state
        image = product(direction)
        length = quotient(norm, dot(direction, image))
        x, residual = x + length * direction, residual - length * image
        left = dot(residual, residual)
        return x, residual, residual + quotient(left, norm) * direction, left

    start = jnp.zeros_like(target), target, target, dot(target, target)
    return jax.lax.fori_loop(0, steps, step, start)[0]
