"""MSVMamba: VMamba with three of its four directions at half the resolution (Shi et al. 2024, arXiv:2405.14174)."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from layers.mixer import Mixer
from layers.mixers.image.vmamba import VMambaConfig
from layers.norms import LayerNorm, LayerNormConfig
from layers.options import checked_dataclass
from layers.parameters import linear
from layers.parts.each_segment import is_within
from layers.parts.images import ImageFilter, as_grid, as_tokens, on_images, scans
from layers.parts.projection import project
from layers.parts.selective_scans import SelectiveScans
from layers.segments import Segments
from layers.typing import Array, Bool, Float

# The directions at half resolution, as the authors order them.
COARSE = ("row_reversed", "column", "column_reversed")


@checked_dataclass
class MSVMambaConfig(VMambaConfig):
    """Options of `MSVMamba`, and those of `VMambaConfig` but for the orders.

    Attributes:
      coarse_taps: width of the convolution to half the resolution, odd.
      joined: whether the three directions at half resolution are one sequence, whose state passes from each to the next, as
        in the authors' code; otherwise each starts from zero, as the paper draws them.
    """

    coarse_taps: int = 7
    joined: bool = True

    def __post_init__(self) -> None:
        for name in ("orders", "window"):
            given, default = getattr(self, name), getattr(VMambaConfig, name)
            if given != default:
                raise ValueError(f"{name}={given}; msvmamba has its own directions, leave it out")
        super().__post_init__()
        if self.coarse_taps % 2 == 0:
            raise ValueError(f"coarse_taps={self.coarse_taps}; expected an odd number")


class MSVMamba(Mixer):
    """MSVMamba: VMamba with three of its four directions at half the resolution (Shi et al. 2024, arXiv:2405.14174).

        [u, z] = W_in x                                                 (e, e)
        a      = S_1(silu(w_1 * u + b_1))                               along rows
        c      = silu(w_2 *_2 u + b_2)                                  with stride 2
        b      = sum_k P_k^-1 S_2(P_k c)                                rows reversed, columns, columns reversed
        y      = W_out (LayerNorm(a + up(b)) silu(z))

    with e = expand d channels, selective state spaces S_1 and S_2 of Mamba, and `up` the bilinear interpolation between
    centres of pixels. Tokens are pixels as in `VMamba`, and an image whose last row is shorter has those coarse pixels whose
    centre it has. Packed images cost one pass per segment of the fullest row. The channel mixer with a convolution that the
    authors put behind it is not here. Not causal.
    """

    patterns = ("noncausal_self",)
    causal = False

    def __init__(self, config: MSVMambaConfig, *, rngs: nnx.Rngs):
        self.config = config
        channels, steps = config.channels, (config.dt_min, config.dt_max, config.dt_floor)
        options = {"bias": False, "dtype": config.dtype, "rngs": rngs}
        self.input = linear(config.width, (1 + config.gate) * channels, axes=("embed", "inner"), **options)
        self.filter = ImageFilter(channels, config.taps, rngs=rngs)
        self.coarse_filter = ImageFilter(channels, config.coarse_taps, stride=2, rngs=rngs)
        sizes = (1, channels, config.state_size, config.rank)
        self.scan = SelectiveScans(*sizes, steps=steps, dtype=config.dtype, rngs=rngs)
        self.coarse_scan = SelectiveScans(*sizes, steps=steps, dtype=config.dtype, rngs=rngs)
        self.norm = LayerNorm(LayerNormConfig(channels, config.epsilon, dtype=config.dtype), rngs=rngs)
        self.output = linear(channels, config.width, axes=("inner", "embed"), **options)

    def mix(
        self, x: Float[Array, "b t d"], carried: None, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], None]:
        graph, variables = nnx.split(self)
        return on_images(partial(_mix, graph), variables, x, segments), None

    def images(self, x: Float[Array, "b t d"], lengths: jax.Array | None) -> Float[Array, "b t d"]:
        """Returns the outputs of one image per row, of these numbers of pixels; None if all have t."""
        config, (b, t, _) = self.config, x.shape
        u, *gate = project(self.input, x, (config.channels,) * (1 + config.gate))
        grid = as_grid(u, config.columns)
        real = None if lengths is None else _segments(is_within(lengths, t))
        fine = as_tokens(jax.nn.silu(self.filter(grid)), t)
        fine = self.scan(fine[:, :, None], real)[:, :, 0]
        coarse = jax.nn.silu(self.coarse_filter(grid))
        if lengths is None and t == grid.shape[1] * config.columns:
            seen = None
        else:
            count = jnp.full(b, t, jnp.int32) if lengths is None else lengths
            seen = is_within(count, grid.shape[1] * config.columns)
            seen = seen.reshape(b, *grid.shape[1:3])[:, ::2, ::2]
        back = self._coarse(coarse, seen)
        rows = grid.shape[1] if lengths is None else -(-lengths // config.columns)
        up = as_tokens(enlarged(back, seen, (grid.shape[1], config.columns), rows), t)
        y = self.norm(fine + up.astype(fine.dtype))
        return self.output(y * jax.nn.silu(gate[0]) if config.gate else y)

    def _coarse(
        self, grid: Float[Array, "b r c d"], seen: Bool[Array, "b r c"] | None
    ) -> Float[Array, "b r c d"]:
        """Returns the sum of the three directions at half resolution."""
        b, rows, columns, channels = grid.shape
        count = rows * columns
        segments = None if seen is None else _segments(seen.reshape(b, count))
        found, ordered = scans(COARSE, count, columns, segments)
        tokens = grid.reshape(b, count, channels)
        orders = jnp.stack([scan.read(tokens) for scan in found], axis=1)
        joined = self.config.joined
        shape = (b, len(COARSE) * count, 1, channels) if joined else (b * len(COARSE), count, 1, channels)
        if ordered is not None:
            times = (1, len(COARSE)) if joined else (len(COARSE), 1)
            ids = jnp.tile(ordered.ids, times) if joined else jnp.repeat(ordered.ids, len(COARSE), axis=0)
            ordered = Segments.of(ids, padding="anywhere" if joined else "end", packed=False)
        y = self.coarse_scan(orders.reshape(shape), ordered).reshape(orders.shape)
        return sum(scan.restore(y[:, number]) for number, scan in enumerate(found)).reshape(grid.shape)


def enlarged(
    x: Float[Array, "b p q d"],
    seen: Bool[Array, "b p q"] | None,
    size: tuple[int, int],
    rows: int | jax.Array,
) -> Float[Array, "b r c d"]:
    """Returns images enlarged by bilinear interpolation between centres of pixels, in float32.

    Args:
      x: images of half the size.
      seen: the pixels of x that an image has, None for all; others have no weight.
      size: rows and columns to return.
      rows: rows that each image has, a number or (b).
    """
    rows = jnp.broadcast_to(jnp.asarray(rows), x.shape[:1])
    vertical = _between(size[0], x.shape[1], rows)
    horizontal = _between(size[1], x.shape[2], jnp.full(1, size[1]))[0]
    seen = jnp.ones(x.shape[:3], bool) if seen is None else seen
    x = jnp.where(seen[..., None], x.astype(jnp.float32), 0)
    total = jnp.einsum("brp,cq,bpqd->brcd", vertical, horizontal, x, precision=jax.lax.Precision.HIGHEST)
    weight = jnp.einsum("brp,cq,bpq->brc", vertical, horizontal, seen.astype(jnp.float32))
    return total / jnp.maximum(weight, 1e-6)[..., None]


def _between(size, coarse, actual):
    """Weights (b, size, coarse) of the coarse pixels along one axis, for images of `actual` pixels in place of `size`."""
    halved, actual = (-(-actual // 2)).astype(jnp.float32), jnp.maximum(actual, 1).astype(jnp.float32)
    centre = (jnp.arange(size, dtype=jnp.float32)[None] + 0.5) * (halved / actual)[:, None] - 0.5
    return jnp.maximum(
        0.0, 1 - jnp.abs(centre[..., None] - jnp.arange(coarse, dtype=jnp.float32)[None, None])
    )


def _segments(real):
    return Segments.of(real.astype(jnp.int32), padding="end", packed=False)


def _mix(graph, variables, x, lengths):
    return nnx.merge(graph, variables, copy=True).images(x, lengths)
