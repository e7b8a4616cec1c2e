"""VMamba: a selective state space that reads an image in four directions (Liu et al. 2024, arXiv:2401.10166)."""

import jax
import jax.numpy as jnp
from flax import nnx

from layers.mixer import Mixer
from layers.norms import LayerNorm, LayerNormConfig
from layers.options import ActivationDtype, NonNegative, checked_dataclass
from layers.parameters import linear
from layers.parts.images import CROSS, ImageFilter, check_orders, scans
from layers.parts.projection import project
from layers.parts.selective_scans import SelectiveScans
from layers.parts.state_space import SelectiveSizes, check_steps
from layers.segments import Segments
from layers.typing import Array, Float


@checked_dataclass
class VMambaConfig(SelectiveSizes):
    """Options of `VMamba`.

    Attributes:
      width: d, number of input and output features.
      columns: pixels in a row of the image.
      orders: scan orders, see `layers.parts.images.scan_places`; each has parameters of its own.
      window: width of the windows of the order "window", in pixels.
      state_size: n, number of states per channel.
      expand: number of channels of the state space as a multiple of width.
      taps: width of the convolution over both axes, odd.
      dt_rank: rank of the maps to step sizes; width / 16, rounded up, if None.
      dt_min, dt_max: range of the initial step sizes, log-uniform.
      dt_floor: lower bound of the initial step sizes.
      epsilon: epsilon of the norm.
      gate: whether a gate multiplies the outputs; later versions of VMamba have none.
      dtype: dtype of the activations.
    """

    width: int
    columns: int = 32
    orders: tuple[str, ...] = CROSS
    window: int = 4
    state_size: int = 16
    expand: int = 2
    taps: int = 3
    dt_rank: int | None = None
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_floor: NonNegative = 1e-4
    epsilon: NonNegative = 1e-5
    gate: bool = True
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        check_steps(self.dt_min, self.dt_max)
        check_orders(self)
        if self.taps % 2 == 0:
            raise ValueError(f"taps={self.taps}; expected an odd number, for a filter centred at the pixel")


class VMamba(Mixer):
    """VMamba: a selective state space that reads an image in four directions, SS2D (Liu et al. 2024, arXiv:2401.10166).

        [u, z] = W_in x                                            (e, e)
        u      = silu(w * u + b)                                   over both axes of the image, every channel by itself
        y      = W_out (LayerNorm(sum_k P_k^-1 S_k(P_k u)) silu(z))

    with e = expand d channels, permutations P_k of the pixels, by default along rows and columns and both reversed, and a
    selective state space S_k of Mamba for each; all run in one scan. The tokens of a segment are the pixels of an image in rows
    of `columns`, of which the last may be shorter; packed images cost one convolution per segment of the fullest row. Not causal.
    """

    patterns = ("noncausal_self",)
    causal = False

    def __init__(self, config: VMambaConfig, *, rngs: nnx.Rngs):
        self.config = config
        channels, taps = config.channels, config.taps
        options = {"bias": False, "dtype": config.dtype, "rngs": rngs}
        self.input = linear(config.width, (1 + config.gate) * channels, axes=("embed", "inner"), **options)
        self.filter = ImageFilter(channels, taps, rngs=rngs)
        self.scans = SelectiveScans(
            len(config.orders),
            channels,
            config.state_size,
            config.rank,
            steps=(config.dt_min, config.dt_max, config.dt_floor),
            dtype=config.dtype,
            rngs=rngs,
        )
        self.norm = LayerNorm(LayerNormConfig(channels, config.epsilon, dtype=config.dtype), rngs=rngs)
        self.output = linear(channels, config.width, axes=("inner", "embed"), **options)

    def mix(
        self, x: Float[Array, "b t d"], carried: None, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], None]:
        config = self.config
        u, *gate = project(self.input, x, (config.channels,) * (1 + config.gate))
        u = jax.nn.silu(self.filter.tokens(u, config.columns, segments))
        found, ordered = scans(config.orders, x.shape[1], config.columns, segments, config.window)
        y = self.scans(jnp.stack([scan.read(u) for scan in found], axis=2), ordered)
        y = self.norm(sum(scan.restore(y[:, :, number]) for number, scan in enumerate(found)))
        return self.output(y * jax.nn.silu(gate[0]) if config.gate else y), None
