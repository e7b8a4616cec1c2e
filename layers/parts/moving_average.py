"""The damped exponential moving average inside MEGA: several averages per channel, summed."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.kernels.ssm_kernel import ssm_kernel
from layers.parameters import NO_DECAY, parameter
from layers.parts.segmented_convolution import convolve
from layers.parts.state_space import run_modes
from layers.segments import SegmentIds
from layers.typing import Array, Float


class MovingAverage(nnx.Module):
    """Multi-dimensional damped EMA (Ma et al. 2022, arXiv:2209.10655), per channel.

        h_t = (1 - alpha delta) * h_{t-1} + alpha beta x_t            (n averages, 0 < alpha, delta < 1)
        y_t = silu(eta . h_t / sqrt(n) + omega x_t)

    With `bidirectional` another such average runs from the end; both include the current token, as in the authors' code,
    whose parameters are (alpha, delta) -> (delta, alpha), beta and gamma -> eta, omega. Without a state the
    averages are one convolution, whose kernel is as long as the sequence; with a state they run token by token.

    Part of a mixer rather than a mixer: the mixer that owns it carries its state h.
    """

    def __init__(
        self,
        width: int,
        averages: int,
        *,
        bidirectional: bool = False,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.bidirectional, self.dtype = bidirectional, dtype
        shape, normal = (2 if bidirectional else 1, width, averages), nnx.initializers.normal
        axes = (None, "embed", "state")
        self.alpha = parameter(rngs, normal(0.2), shape, axes=axes, **NO_DECAY)
        self.delta = parameter(rngs, normal(0.2), shape, axes=axes, **NO_DECAY)
        self.beta = parameter(rngs, _alternating, shape, axes=axes)
        self.eta = parameter(rngs, normal(1.0), shape, axes=axes)
        self.omega = parameter(rngs, normal(1.0), (width,), axes=("embed",), **NO_DECAY)

    def init_state(self, batch_size: int) -> Float[Array, "b d n"]:
        """Returns the zero state."""
        return jnp.zeros((batch_size, *self.eta.shape[1:]), jnp.float32)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        h: Float[Array, "b d n"] | None = None,
        *,
        segment_ids: SegmentIds = None,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b d n"] | None]:
        """Returns the averages of x and the last h; an h that is passed must belong to the first segment."""
        alpha, delta = jax.nn.sigmoid(self.alpha[...]), jax.nn.sigmoid(self.delta[...])
        lost, written = alpha * delta, alpha * self.beta[...]
        read = self.eta[...] / self.eta.shape[-1] ** 0.5
        x = x.astype(self.dtype)
        if h is None:
            kernel, *back = (_kernel(*parts, x.shape[1]) for parts in zip(lost, written, read, strict=True))
            ahead = None
            if back:
                kernel, ahead = kernel.at[:, :1].add(back[0][:, :1]), back[0][:, 1:]
            y = convolve(x, kernel, ahead=ahead, segment_ids=segment_ids)
        else:
            y, state = run_modes(
                1 - lost[0], written[0], read[0], x, h.astype(jnp.complex64), segment_ids=segment_ids
            )
            h = state.real
        y = y.astype(jnp.float32) + self.omega[...][None, None] * x
        return jax.nn.silu(y).astype(self.dtype), h


def _kernel(lost, written, read, length):
    """Returns K_l = sum_n read_n (1 - lost_n)^l written_n per channel."""
    log_kept = jnp.log1p(-lost)
    # Zero-order hold with a step of 1 multiplies the input by ((1 - lost) - 1) / log(1 - lost).
    steps = jnp.ones(lost.shape[0], jnp.float32)
    b = -written * log_kept / lost
    return ssm_kernel(log_kept, b, read, steps, length=length, conjugate_pairs=False)


def _alternating(key, shape, dtype):
    """Initializer of beta: 1, -1, 1, ... over the averages, with a little noise."""
    sign = 1 - 2 * (jnp.arange(shape[-1]) % 2)
    return 0.02 * jax.random.normal(key, shape, dtype) + jnp.broadcast_to(sign, shape).astype(dtype)
