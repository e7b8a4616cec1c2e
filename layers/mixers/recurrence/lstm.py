"""LSTM: the classic gated nonlinear recurrence (Hochreiter and Schmidhuber 1997, doi:10.1162/neco.1997.9.8.1735)."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from layers.kernels.segments import segment_starts
from layers.parameters import NO_DECAY, linear, parameter
from layers.parts.carry import check_inputs, continues, enter, next_segment
from layers.segments import SegmentIds
from layers.typing import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class LSTMConfig:
    """Options of `LSTM`.

    Attributes:
      width: d, features in and out.
      state_size: e, cells; with a number, a projection back to width follows; width, and none, if None.
      forget_bias: where the bias of the forget gate starts.
      dtype: type of activations; the state is float32.
    """

    width: int
    state_size: int | None = None
    forget_bias: float = 1.0
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if self.state_size is not None and self.state_size < 1:
            raise ValueError(f"state_size={self.state_size}; expected at least 1, or None")

    @property
    def cells(self) -> int:
        """Cells of the recurrence."""
        return self.state_size or self.width


class LSTMState(NamedTuple):
    """The output h and the cells c after the last token, and the segment that both belong to."""

    h: Float[Array, "b e"]
    c: Float[Array, "b e"]
    segment: Int[Array, "b"]


class LSTM(nnx.Module):
    """LSTM: long short-term memory, one layer run step by step (Hochreiter and Schmidhuber 1997).

        [i, f, g, o] = W x_t + R h_{t-1} + b                               (e each)
        c_t = sigmoid(f) * c_{t-1} + sigmoid(i) * tanh(g)
        h_t = sigmoid(o) * tanh(c_t),    y_t = h_t, or W_o h_t

    The forget gate is that of Gers et al. 2000; it starts open, with a bias of 1 (Jozefowicz et al. 2015). R starts
    orthogonal.
    """

    causal = True

    def __init__(self, config: LSTMConfig, *, rngs: nnx.Rngs):
        self.config = config
        cells, options = config.cells, {"dtype": config.dtype, "rngs": rngs}
        self.input = linear(config.width, 4 * cells, bias=False, **options)
        self.recurrent = parameter(rngs, nnx.initializers.orthogonal(), (cells, 4 * cells))
        forget = jnp.where(jnp.arange(4 * cells) // cells == 1, config.forget_bias, 0)
        self.bias = nnx.Param(forget.astype(jnp.float32), **NO_DECAY)
        self.output = linear(cells, config.width, **options) if config.state_size else None

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> LSTMState:
        """The zero state; its size does not depend on the length."""
        zero = jnp.zeros((batch_size, self.config.cells), jnp.float32)
        return LSTMState(zero, zero, jnp.zeros(batch_size, jnp.int32))

    def __call__(
        self,
        x: Float[Array, "b t d"],
        state: LSTMState | None = None,
        *,
        segment_ids: SegmentIds = None,
    ) -> tuple[Float[Array, "b t d"], LSTMState | None]:
        """Mixes along time; see the contract of mixers in CONTRIBUTING.md."""
        config = self.config
        check_inputs("LSTM", x, config.width, segment_ids)
        before = self.init_state(x.shape[0]) if state is None else state
        keep = continues(before.segment, segment_ids)
        # All products with inputs at once; only those with outputs have to wait for each other.
        driven = self.input(x).astype(jnp.float32) + self.bias[...][None, None]
        marks = None
        if segment_ids is not None:
            marks = segment_starts(segment_ids).T, (segment_ids != 0).T
        recurrent = self.recurrent[...].astype(config.dtype)

        def step(carried, inputs):
            driven, marks = inputs
            h, c = carried
            if marks is not None:
                start, real = marks
                h, c = enter(h, ~start), enter(c, ~start)
            back = jnp.dot(h.astype(config.dtype), recurrent, preferred_element_type=jnp.float32)
            i, f, g, o = jnp.split(driven + back, 4, axis=-1)
            new_c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            new_h = jax.nn.sigmoid(o) * jnp.tanh(new_c)
            if marks is not None:
                new_h, new_c = jnp.where(real[:, None], new_h, h), jnp.where(real[:, None], new_c, c)
            return (new_h, new_c), new_h.astype(config.dtype)

        carried = (enter(before.h, keep), enter(before.c, keep))
        (h, c), y = jax.lax.scan(step, carried, (jnp.swapaxes(driven, 0, 1), marks))
        y = jnp.swapaxes(y, 0, 1)
        if self.output is not None:
            y = self.output(y)
        if state is None:
            return y, None
        return y, LSTMState(h, c, next_segment(state.segment, segment_ids, x.shape[1]))
