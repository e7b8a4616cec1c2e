"""sLSTM: xLSTM's scalar memory with exponential gates and recurrent maps per head (Beck et al. 2024, arXiv:2405.04517)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers.mixer import Mixer
from layers.options import ActivationDtype, Count, NonNegative, checked_dataclass
from layers.parameters import NO_DECAY, declared, parameter
from layers.parts.heads import HeadLayerNorm, head_size
from layers.parts.running_maximum import EMPTY
from layers.parts.short_convolution import ShortConvolution
from layers.segments import Segments, keep_where
from layers.typing import Array, Float


@checked_dataclass
class SLSTMConfig:
    """Options of `SLSTM`.

    Attributes:
      width: d, number of input and output features, and of cells.
      heads: h, number of heads; cells of one head see each other's outputs.
      taps: number of taps of the short convolution before the input and forget gate, 2 to 8.
      epsilon: epsilon of the norm per head.
      layer, depth: index of the layer, from 0, and number of layers of the model; they set the initial bias of the forget
        gate.
      dtype: dtype of the activations; the state is float32.
    """

    width: int
    heads: int = 4
    taps: int = 4
    epsilon: NonNegative = 1e-5
    layer: Count = 0
    depth: int = 1
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        _ = self.size
        if not 0 <= self.layer < self.depth:
            raise ValueError(f"layer={self.layer}, depth={self.depth}; expected 0 <= layer < depth")

    @property
    def size(self) -> int:
        """Cells per head."""
        return head_size("heads", None, self)


class SLSTMCells(NamedTuple):
    """Outputs, cells, normalizers and the logarithm of the scale of the latter two, by heads, float32."""

    y: Float[Array, "b h k"]
    c: Float[Array, "b h k"]
    n: Float[Array, "b h k"]
    top: Float[Array, "b h k"]


class SLSTMCarry(NamedTuple):
    """What `SLSTM` carries: the last inputs of its convolution, and its cells."""

    inputs: Float[Array, "b w-1 d"]
    cells: SLSTMCells


class SLSTM(Mixer):
    """sLSTM: cells with exponential gates and a normalizer, run token by token (Beck et al. 2024, arXiv:2405.04517).

        u = silu(conv(x))
        [i, f] = W [u] + R [y_{t-1}] + b,   [z, o] = W [x] + R [y_{t-1}] + b         block-diagonal by heads; (d) each
        c_t = sigmoid(f) c_{t-1} + exp(i) tanh(z),   n_t = sigmoid(f) n_{t-1} + exp(i)
        y_t = sigmoid(o) * c_t / n_t,   and the output is LayerNorm(y_t)              norm per head

    Cells and normalizers are kept relative to exp(m_t), m_t = max(log sigmoid(f) + m_{t-1}, i), on which y does not depend.
    R starts at zero, and the bias of the forget gate between 5 and -7, the more cells near 5 the deeper the layer, as in the
    authors' code. Their block has a gated channel mixer behind this one, and no other projection.
    """

    isolates_tokens = True

    def __init__(self, config: SLSTMConfig, *, rngs: nnx.Rngs):
        self.config = config
        heads, size = config.heads, config.size
        self.convolution = ShortConvolution(
            config.width, config.taps, bias=True, dtype=config.dtype, rngs=rngs
        )
        small, by_head = nnx.initializers.normal((2 / (5 * config.width)) ** 0.5), ("heads", None, None)
        # Of input gate, forget gate, cell and output gate.
        self.input = parameter(rngs, small, (4, heads, size, size), axes=(None, *by_head))
        zeros = nnx.initializers.zeros_init()
        self.recurrent = parameter(rngs, zeros, (4, heads, size, size), axes=(None, *by_head))
        late = config.layer / max(config.depth - 1, 1)
        place = np.arange(size) / max(size - 1, 1)
        bias = np.zeros((4, heads, size), np.float32)
        bias[1] = 5 - 12 * place ** (0.3 + 1.3 * late)
        self.bias = declared(jnp.asarray(bias), axes=(None, "heads", None), **NO_DECAY)
        self.norm = HeadLayerNorm(heads, size, epsilon=config.epsilon, bias=False, rngs=rngs)

    def initial(self, batch_size: int, max_length: int | None) -> SLSTMCarry:
        zero = jnp.zeros((batch_size, self.config.heads, self.config.size), jnp.float32)
        cells = SLSTMCells(zero, zero, zero, jnp.full_like(zero, EMPTY))
        return SLSTMCarry(self.convolution.init_state(batch_size), cells)

    def mix(
        self, x: Float[Array, "b t d"], carried: SLSTMCarry | None, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], SLSTMCarry]:
        config = self.config
        empty = self.initial(x.shape[0], None)
        inputs, cells = empty if carried is None else carried
        x = x.astype(config.dtype)
        u, inputs = self.convolution(x, inputs, segment_ids=segments)
        by_head = jnp.stack([u, u, x, x]).reshape(4, *x.shape[:2], config.heads, config.size)
        # Computes all products with inputs at once; only those with outputs are sequential.
        driven = jnp.einsum(
            "gbthi,ghij->tgbhj",
            by_head,
            self.input[...].astype(config.dtype),
            preferred_element_type=jnp.float32,
        )
        driven = driven + self.bias[...][None, :, None]
        marks = None if segments is None else (segments.starts.T, segments.real.T)
        recurrent = self.recurrent[...].astype(config.dtype)

        def step(cells, inputs):
            driven, marks = inputs
            if marks is not None:
                cells = keep_where(~marks[0], cells, empty.cells)
            back = jnp.einsum(
                "bhi,ghij->gbhj",
                cells.y.astype(config.dtype),
                recurrent,
                preferred_element_type=jnp.float32,
            )
            after = _advance(cells, driven + back)
            if marks is not None:
                after = keep_where(marks[1], after, cells)
            return after, after.y

        cells, y = jax.lax.scan(step, cells, (driven, marks))
        return self.norm(jnp.swapaxes(y, 0, 1)).astype(config.dtype), SLSTMCarry(inputs, cells)


def _advance(cells: SLSTMCells, gates: Float[Array, "g b h k"]) -> SLSTMCells:
    """Returns the cells after one token."""
    i, f, z, o = gates
    kept = jax.nn.log_sigmoid(f)
    # The output does not depend on the scale: it is a constant.
    top = jax.lax.stop_gradient(jnp.maximum(kept + cells.top, i))
    forget, write = jnp.exp(kept + cells.top - top), jnp.exp(i - top)
    c, n = forget * cells.c + write * jnp.tanh(z), forget * cells.n + write
    return SLSTMCells(jax.nn.sigmoid(o) * c / n, c, n, top)
