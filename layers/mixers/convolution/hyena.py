"""Hyena: gates and long convolutions in turn, with filters made from positions (Poli et al. 2023, arXiv:2302.10866)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from layers.kernels.long_conv.sparse import check_sparse, sparse_kernel
from layers.mixer import Mixer
from layers.options import ActivationDtype, checked_dataclass
from layers.parameters import NO_DECAY, linear, parameter
from layers.parts.past_inputs import enter_call, filter_next, no_inputs
from layers.parts.segmented_convolution import convolve
from layers.parts.short_convolution import ShortConvolution
from layers.segments import Segments, Visit, keep_where
from layers.typing import Array, Float

# Channels decay to 1% within these fractions of max_length, from the slowest channel to the fastest.
SLOW, FAST, TARGET = 1.5, 0.3, 1e-2


@checked_dataclass
class HyenaConfig:
    """Options of `Hyena`.

    Attributes:
      width: d, number of input and output features.
      order: p, number of gates, at least 2; there are p - 1 long convolutions.
      max_length: L, number of taps of the filters, whose positions and decay are relative to it; earlier inputs are not
        seen.
      taps: number of taps of the short convolution of the projections.
      filter_features: number of features per position, odd, at least 3.
      filter_width: number of hidden units of the network that computes the filters.
      sine_frequency: initial frequency of the sines of that network.
      window_shift: number added to the decaying window of the filters.
      partial: number of taps that count, the first of the filters, 1 to L; all if None. Earlier inputs are not seen.
      frequencies: number of frequencies that the filters keep, 1 to L + 1, see `sparse_kernel`; all if None.
      dtype: dtype of the activations; filters are float32.
    """

    width: int
    order: int = 2
    max_length: int = 1024
    taps: int = 3
    filter_features: int = 33
    filter_width: int = 64
    sine_frequency: float = 14.0
    window_shift: float = 0.0
    partial: int | None = None
    frequencies: int | None = None
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        if self.order < 2:
            raise ValueError(f"order={self.order}; expected at least 2, for one convolution")
        if self.filter_features < 3 or self.filter_features % 2 == 0:
            raise ValueError(
                f"filter_features={self.filter_features}; expected an odd number from 3: the position and pairs of waves"
            )
        check_sparse(self.max_length, self.partial, self.frequencies)

    @property
    def reach(self) -> int:
        """Number of taps that count."""
        return self.max_length if self.partial is None else self.partial


class ImplicitFilter(nnx.Module):
    """Hyena's filters (Poli et al. 2023, arXiv:2302.10866).

        k_l = (exp(-tau |delta|) + shift) * (W_3 sin(w (W_2 sin(w (W_1 sin(w (W_0 z_l + b_0)) + b_1)) + b_2)))
        z_l = [tau, cos(f theta), -sin(f theta)],  tau = l / (L - 1),  theta = 2 pi l / L

    with frequencies f from 1e-4 to K - 1, (features - 1) / 2 = K of them; w, one per hidden unit, is shared by the three
    sines and trained; the decays delta are fixed, evenly spaced over the channels. The optimizer applies no weight decay
    here.

    Weights start normal with deviation 0.02 and biases at zero, as in the authors' models for all linear maps, filters
    included. Drawn from +-1/sqrt(inputs) and with w = 14, gradients of W_0 are about a hundred times those of the rest of
    a model: each sine multiplies them by w.
    """

    def __init__(
        self,
        channels: int,
        length: int,
        *,
        features: int,
        hidden: int,
        sine_frequency: float,
        shift: float,
        rngs: nnx.Rngs,
    ):
        self.channels, self.length, self.features, self.shift = channels, length, features, shift
        sizes = [features, hidden, hidden, hidden]
        normal, zeros = nnx.initializers.normal(0.02), nnx.initializers.zeros_init()
        self.weights = nnx.List(
            parameter(rngs, normal, (a, b), axes=(None, axis), **NO_DECAY)
            for a, b, axis in zip(sizes, [hidden] * 3 + [channels], [None] * 3 + ["inner"], strict=True)
        )
        self.biases = nnx.List(parameter(rngs, zeros, (hidden,), **NO_DECAY) for _ in range(3))
        self.frequency = parameter(rngs, nnx.initializers.constant(sine_frequency), (hidden,), **NO_DECAY)

    def __call__(self, length: int) -> Float[Array, "d l"]:
        """Returns the first `length` taps per channel, float32."""
        h = self.positions(length)
        for weight, bias in zip(self.weights[:3], self.biases, strict=True):
            h = jnp.matmul(h, weight[...], precision=jax.lax.Precision.HIGHEST) + bias[...][None]
            h = jnp.sin(self.frequency[...][None] * h)
        h = jnp.matmul(h, self.weights[3][...], precision=jax.lax.Precision.HIGHEST)
        slow, fast = math.log(TARGET) / SLOW, math.log(TARGET) / FAST
        decay = jnp.abs(jnp.linspace(slow, fast, self.channels, dtype=jnp.float32))[None]
        return (h * (jnp.exp(-self._share(length) * decay) + self.shift)).T

    def positions(self, length: int) -> Float[Array, "l f"]:
        """Returns z_l for l < `length`."""
        count = (self.features - 1) // 2
        frequencies = 2 * math.pi * jnp.linspace(1e-4, count - 1, count, dtype=jnp.float32)
        turn = jnp.arange(length, dtype=jnp.float32)[:, None] / self.length * frequencies[None]
        return jnp.concatenate([self._share(length), jnp.cos(turn), -jnp.sin(turn)], axis=1)

    def _share(self, length):
        """Returns tau per token, as a column."""
        return jnp.arange(length, dtype=jnp.float32)[:, None] / max(1, self.length - 1)


class HyenaCarry(NamedTuple):
    """What `Hyena` carries: the last inputs of the short convolution, and those of the long ones."""

    short: Float[Array, "b w d"]
    past: Float[Array, "b f s d"]


class Hyena(Mixer):
    """Hyena: an order-p recurrence of gates and implicit long convolutions (Poli et al. 2023, arXiv:2302.10866).

        x_0, ..., x_{p-1}, v = split(short_conv(W_in x + b_in))
        v <- k_i * (x_{p-1-i} v) + beta_i x_{p-1-i} v    for i = 0 .. p-2
        y = W_out (x_0 v) + b_out

    with products elementwise and filters k_i (d x L) from `ImplicitFilter`, of which options leave the first taps or the lowest
    frequencies. The state holds the last L - 1 inputs of each long convolution, those that taps reach. If `init_state` gets a
    smaller `max_length`, it holds as many inputs as segments of that length need, and outputs of later tokens are NaN.
    """

    keeps_segments = True

    def __init__(self, config: HyenaConfig, *, rngs: nnx.Rngs):
        self.config = config
        total, filters = (config.order + 1) * config.width, config.order - 1
        self.input = linear(config.width, total, axes=("embed", "inner"), dtype=config.dtype, rngs=rngs)
        self.convolution = ShortConvolution(
            total, config.taps, bias=True, activation=None, dtype=config.dtype, rngs=rngs
        )
        self.filter = ImplicitFilter(
            config.width * filters,
            config.max_length,
            features=config.filter_features,
            hidden=config.filter_width,
            sine_frequency=config.sine_frequency,
            shift=config.window_shift,
            rngs=rngs,
        )
        self.beta = parameter(
            rngs, nnx.initializers.normal(1.0), (filters, config.width), axes=(None, "inner"), **NO_DECAY
        )
        self.output = linear(
            config.width, config.width, axes=("inner", "embed"), dtype=config.dtype, rngs=rngs
        )

    def _taps(self, taps: int) -> Float[Array, "d l"]:
        """Returns the first taps of the filters. Their spectrum is that of all taps, whatever the length of a call."""
        if self.config.frequencies is None:
            return self.filter(taps)
        return sparse_kernel(
            self.filter(self.config.max_length), partial=taps, frequencies=self.config.frequencies
        )

    def initial(self, batch_size: int, max_length: int | None) -> HyenaCarry:
        config = self.config
        sizes = {"filters": config.order - 1, "taps": config.reach, "width": config.width}
        past = no_inputs(batch_size, **sizes, max_length=max_length)
        return HyenaCarry(self.convolution.init_state(batch_size), past)

    def mix(
        self,
        x: Float[Array, "b t d"],
        carried: HyenaCarry | None,
        segments: Segments | None,
        visit: Visit | None,
    ) -> tuple[Float[Array, "b t d"], HyenaCarry | None]:
        config, short = self.config, None
        taps = max(1, min(x.shape[1], config.reach))
        if carried is not None:
            short = keep_where(visit.continues, carried.short, jnp.zeros_like(carried.short))
            past, lost = enter_call(carried.past, config.reach, visit)
            taps = past.shape[2] + 1
        projected, short = self.convolution(self.input(x), short, segment_ids=segments)
        *gates, v = jnp.split(projected, config.order + 1, axis=-1)
        # Channels vary slowest in the network's output, as in the paper's code.
        filters = self._taps(taps).reshape(config.width, config.order - 1, taps)
        kept = []
        for i, gate in enumerate(reversed(gates[1:])):
            u = gate * v
            if carried is None:
                v = convolve(u, filters[:, i], segment_ids=segments)
            else:
                v, inputs = filter_next(u, filters[:, i], past[:, i], segments)
                kept.append(inputs)
            v = v + self.beta[i].astype(u.dtype)[None, None] * u
        y = self.output(gates[0] * v)
        if carried is None:
            return y, None
        return jnp.where(lost[..., None], jnp.nan, y), HyenaCarry(short, jnp.stack(kept, axis=1))
