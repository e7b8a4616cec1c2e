"""LSTM: the classic gated nonlinear recurrence (Hochreiter and Schmidhuber 1997, doi:10.1162/neco.1997.9.8.1735)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from layers.mixer import Mixer
from layers.options import ActivationDtype, checked_dataclass
from layers.parameters import NO_DECAY, declared, linear, parameter
from layers.segments import Segments, keep_where
from layers.typing import Array, Float


@checked_dataclass
class LSTMConfig:
    """Options of `LSTM`.

    Attributes:
      width: d, number of input and output features.
      state_size: e, number of cells. If None, equals width and there is no output projection.
      forget_bias: initial bias of the forget gate.
      dtype: dtype of the activations; the state is float32.
    """

    width: int
    state_size: int | None = None
    forget_bias: float = 1.0
    dtype: ActivationDtype = jnp.float32

    @property
    def cells(self) -> int:
        """Number of cells."""
        return self.state_size or self.width


class LSTMCarry(NamedTuple):
    """What `LSTM` carries: the output h and the cells c after the last token, float32."""

    h: Float[Array, "b e"]
    c: Float[Array, "b e"]


class LSTM(Mixer):
    """LSTM: long short-term memory, one layer run token by token (Hochreiter and Schmidhuber 1997).

        [i, f, g, o] = W x_t + R h_{t-1} + b                               (e each)
        c_t = sigmoid(f) * c_{t-1} + sigmoid(i) * tanh(g)
        h_t = sigmoid(o) * tanh(c_t),    y_t = h_t, or W_o h_t

    The forget gate is that of Gers et al. 2000; it starts open, with a bias of 1 (Jozefowicz et al. 2015). R starts
    orthogonal.
    """

    isolates_tokens = True

    def __init__(self, config: LSTMConfig, *, rngs: nnx.Rngs):
        self.config = config
        cells, options = config.cells, {"dtype": config.dtype, "rngs": rngs}
        self.input = linear(config.width, 4 * cells, axes=("embed", "inner"), bias=False, **options)
        self.recurrent = parameter(
            rngs, nnx.initializers.orthogonal(), (cells, 4 * cells), axes=(None, "inner")
        )
        forget = jnp.where(jnp.arange(4 * cells) // cells == 1, config.forget_bias, 0)
        self.bias = declared(forget.astype(jnp.float32), axes=("inner",), **NO_DECAY)
        self.output = (
            linear(cells, config.width, axes=("inner", "embed"), **options) if config.state_size else None
        )

    def initial(self, batch_size: int, max_length: int | None) -> LSTMCarry:
        zero = jnp.zeros((batch_size, self.config.cells), jnp.float32)
        return LSTMCarry(zero, zero)

    def mix(
        self, x: Float[Array, "b t d"], carried: LSTMCarry | None, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], LSTMCarry]:
        config = self.config
        empty = self.initial(x.shape[0], None)
        # Computes all products with inputs at once; only those with outputs are sequential.
        driven = self.input(x).astype(jnp.float32) + self.bias[...][None, None]
        marks = None if segments is None else (segments.starts.T, segments.real.T)
        recurrent = self.recurrent[...].astype(config.dtype)

        def step(carried, inputs):
            driven, marks = inputs
            if marks is not None:
                carried = keep_where(~marks[0], carried, empty)
            h, c = carried
            back = jnp.dot(h.astype(config.dtype), recurrent, preferred_element_type=jnp.float32)
            i, f, g, o = jnp.split(driven + back, 4, axis=-1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            after = LSTMCarry(jax.nn.sigmoid(o) * jnp.tanh(c), c)
            if marks is not None:
                after = keep_where(marks[1], after, carried)
            return after, after.h.astype(config.dtype)

        start = empty if carried is None else carried
        carried, y = jax.lax.scan(step, start, (jnp.swapaxes(driven, 0, 1), marks))
        y = jnp.swapaxes(y, 0, 1)
        return y if self.output is None else self.output(y), carried
