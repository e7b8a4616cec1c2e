"""Hyena: gates and long convolutions in turn, with filters made from positions (Poli et al. 2023, arXiv:2302.10866)."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from layers.parameters import linear, parameter
from layers.parts.carry import check_inputs, continues, enter
from layers.parts.implicit_filter import ImplicitFilter
from layers.parts.past_inputs import PastInputs, filter_next, no_inputs, resume
from layers.parts.segmented_convolution import convolve
from layers.parts.short_convolution import ShortConvolution
from layers.segments import SegmentIds
from layers.typing import Array, Float


@dataclasses.dataclass(frozen=True)
class HyenaConfig:
    """Options of `Hyena`.

    Attributes:
      width: d, features in and out.
      order: p, gates; p - 1 long convolutions; at least 2.
      max_length: L, taps of the filters, whose positions and decay are relative to it; what is further back is not seen.
      taps: taps of the short convolution of the projections.
      filter_features: features of a position, odd, at least 3.
      filter_width: hidden units of the network of the filters.
      sine_frequency: initial factor in its sines.
      window_shift: what is added to the decaying window of the filters.
      dtype: type of activations; filters are float32.
    """

    width: int
    order: int = 2
    max_length: int = 1024
    taps: int = 3
    filter_features: int = 33
    filter_width: int = 64
    sine_frequency: float = 14.0
    window_shift: float = 0.0
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if self.order < 2:
            raise ValueError(f"order={self.order}; expected at least 2, for one convolution")
        if self.filter_features < 3 or self.filter_features % 2 == 0:
            raise ValueError(
                f"filter_features={self.filter_features}; expected an odd number from 3: the position and pairs of waves"
            )
        if self.max_length < 1:
            raise ValueError(f"max_length={self.max_length}; expected at least 1")


class HyenaState(NamedTuple):
    """The last inputs of the short convolution, and those of the long ones."""

    short: Float[Array, "b w d"]
    past: PastInputs


class Hyena(nnx.Module):
    """Hyena: an order-p recurrence of gates and implicit long convolutions (Poli et al. 2023, arXiv:2302.10866).

        x_0, ..., x_{p-1}, v = split(short_conv(W_in x + b_in))
        v <- k_i * (x_{p-1-i} v) + beta_i x_{p-1-i} v    for i = 0 .. p-2
        y = W_out (x_0 v) + b_out

    with products elementwise and filters k_i (d x L) from `ImplicitFilter`. Its state holds the last L - 1 inputs of every
    long convolution.
    """

    def __init__(self, config: HyenaConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.causal = True
        total, filters = (config.order + 1) * config.width, config.order - 1
        self.input = linear(config.width, total, dtype=config.dtype, rngs=rngs)
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
        self.beta = parameter(rngs, nnx.initializers.normal(1.0), (filters, config.width))
        self.output = linear(config.width, config.width, dtype=config.dtype, rngs=rngs)

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> HyenaState:
        """No inputs yet.

        Args:
          batch_size: rows.
          max_length: the most tokens that a segment will have, if less than `config.max_length`; outputs of tokens
            beyond are NaN.
        """
        config = self.config
        past = no_inputs(
            batch_size,
            filters=config.order - 1,
            taps=config.max_length,
            width=config.width,
            max_length=max_length,
        )
        return HyenaState(self.convolution.init_state(batch_size), past)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        state: HyenaState | None = None,
        *,
        segment_ids: SegmentIds = None,
    ) -> tuple[Float[Array, "b t d"], HyenaState | None]:
        """Mixes along time; see the contract of mixers in CONTRIBUTING.md."""
        config, shape = self.config, x.shape[:2]
        check_inputs("Hyena", x, config.width, segment_ids)
        short = None
        if state is not None:
            short = enter(state.short, continues(state.past.place.segment, segment_ids))
        projected, short = self.convolution(self.input(x), short, segment_ids=segment_ids)
        *gates, v = jnp.split(projected, config.order + 1, axis=-1)
        if state is None:
            taps = max(1, min(shape[1], config.max_length))
        else:
            past, lost = resume(state.past, config.max_length, segment_ids, shape)
            taps = past.inputs.shape[2] + 1
        # Channels vary slowest in the network's output, as in the paper's code.
        filters = self.filter(taps).reshape(config.width, config.order - 1, taps)
        kept = []
        for i, gate in enumerate(reversed(gates[1:])):
            u = gate * v
            if state is None:
                v = convolve(u, filters[:, i], segment_ids=segment_ids)
            else:
                v, inputs = filter_next(u, filters[:, i], past.inputs[:, i], segment_ids)
                kept.append(inputs)
            v = v + self.beta[i].astype(u.dtype)[None, None] * u
        y = self.output(gates[0] * v)
        if state is None:
            return y, None
        past = past._replace(inputs=jnp.stack(kept, axis=1))
        return jnp.where(lost[..., None], jnp.nan, y), HyenaState(short, past)
