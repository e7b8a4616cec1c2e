"""Lightweight and dynamic convolution: a normalised window a head, fixed or predicted (Wu et al. 2019, arXiv:1901.10430)."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from layers.parameters import linear, parameter
from layers.parts.carry import check_inputs, continues, enter, next_segment
from layers.parts.segmented_convolution import remember
from layers.parts.window import window_sum
from layers.segments import SegmentIds
from layers.typing import Array, Float, Int

_xavier = nnx.initializers.xavier_uniform()


@dataclasses.dataclass(frozen=True)
class LightweightConvConfig:
    """Options of `LightweightConv` and `DynamicConv`.

    Attributes:
      width: d, features in and out.
      heads: h, windows; divides the width.
      taps: w, tokens that a window covers, the current one included.
      dtype: type of activations; weights of windows and the state are float32.
    """

    width: int
    heads: int = 8
    taps: int = 31
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(f"heads={self.heads} does not divide width={self.width}")
        if self.taps < 1:
            raise ValueError(f"taps={self.taps}; expected at least 1")


class WindowState(NamedTuple):
    """The last w - 1 inputs of the window, the latest last, and the segment that they belong to."""

    inputs: Float[Array, "b s d"]
    segment: Int[Array, "b"]


class LightweightConv(nnx.Module):
    """LightweightConv: a softmax-normalised depthwise convolution (Wu et al. 2019, arXiv:1901.10430).

        g = (W_1 x + b_1) * sigmoid(W_2 x + b_2)
        y_t = W_o sum_{j<w} softmax(W_h)_j g_{t-(w-1)+j} + b_o

    with one row W_h (w) for the d / h neighbouring channels of a head. The softmax is over all taps, those before the start
    of the segment included, where g counts as zero. The paper drops normalised weights at random in training; this does not.
    """

    def __init__(self, config: LightweightConvConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.causal = True
        self.input, self.output = _projections(config, rngs)
        self.weight = parameter(rngs, _window_init, (config.heads, config.taps))

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> WindowState:
        """No inputs yet; the size does not depend on the length."""
        return _no_inputs(self.config, batch_size)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        state: WindowState | None = None,
        *,
        segment_ids: SegmentIds = None,
    ) -> tuple[Float[Array, "b t d"], WindowState | None]:
        """Mixes along time; see the contract of mixers in CONTRIBUTING.md."""
        check_inputs("LightweightConv", x, self.config.width, segment_ids)
        gated = _glu(self.input(x))
        weights = jax.nn.softmax(self.weight[...])[None, None]
        y, state = _slide(self.config, gated, weights, state, segment_ids)
        return self.output(y), state


class DynamicConv(nnx.Module):
    """DynamicConv: a lightweight convolution whose weights every token predicts (Wu et al. 2019, arXiv:1901.10430).

        g = (W_1 x + b_1) * sigmoid(W_2 x + b_2)
        y_t = W_o sum_{j<w} softmax(W_h g_t)_j g_{t-(w-1)+j} + b_o

    with W_h (w x d) for the d / h neighbouring channels of a head; otherwise as `LightweightConv`.
    """

    def __init__(self, config: LightweightConvConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.causal = True
        self.input, self.output = _projections(config, rngs)
        self.weight = linear(
            config.width, config.heads * config.taps, bias=False, dtype=config.dtype, init=_xavier, rngs=rngs
        )

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> WindowState:
        """No inputs yet; the size does not depend on the length."""
        return _no_inputs(self.config, batch_size)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        state: WindowState | None = None,
        *,
        segment_ids: SegmentIds = None,
    ) -> tuple[Float[Array, "b t d"], WindowState | None]:
        """Mixes along time; see the contract of mixers in CONTRIBUTING.md."""
        check_inputs("DynamicConv", x, self.config.width, segment_ids)
        gated = _glu(self.input(x))
        logits = self.weight(gated).reshape(*x.shape[:2], self.config.heads, self.config.taps)
        weights = jax.nn.softmax(logits.astype(jnp.float32))
        y, state = _slide(self.config, gated, weights, state, segment_ids)
        return self.output(y), state


def _projections(config, rngs):
    options = {"dtype": config.dtype, "init": _xavier, "rngs": rngs}
    return linear(config.width, 2 * config.width, **options), linear(config.width, config.width, **options)


def _glu(x):
    value, gate = jnp.split(x, 2, axis=-1)
    return value * jax.nn.sigmoid(gate)


def _window_init(key, shape, dtype):
    # Xavier's bound for torch's shape (heads, 1, taps), whose fans are taps and heads taps.
    bound = math.sqrt(6 / (shape[1] + math.prod(shape)))
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def _no_inputs(config, batch_size):
    inputs = jnp.zeros((batch_size, config.taps - 1, config.width), jnp.float32)
    return WindowState(inputs, jnp.zeros(batch_size, jnp.int32))


def _slide(config, x, weights, state, segment_ids):
    """The windows over x as it follows the state, and the next state."""
    begin = _no_inputs(config, x.shape[0]) if state is None else state
    past = enter(begin.inputs, continues(begin.segment, segment_ids))
    y = window_sum(x, weights, past, segment_ids=segment_ids).astype(config.dtype)
    if state is None:
        return y, None
    segment = next_segment(state.segment, segment_ids, x.shape[1])
    return y, WindowState(remember(past, x, segment_ids), segment)
