"""The Triton kernel that lays out the input of `long_conv` by channel: one pass gates, transposes, checks and measures it.

It reads two numbers per token and channel, or one without a gate, and writes one.
"""

from typing import Any

import jax
import jax.numpy as jnp

from layers.kernels.pallas_triton import launch, pl, pltriton

TILE = 64  # tokens and channels per program


def by_channel(
    x: jax.Array, gate: jax.Array | None, dropped: jax.Array | None, tokens: int, *, cleaned: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns gate x as (b, d, tokens), bfloat16, zeros at the end; its largest size (b, d), float32; and what is not finite.

    Args:
      x, gate: (b, t, d).
      dropped: (b, t), flags of tokens that count as zeros, int32.
      tokens: at least t, a multiple of `TILE`.
      cleaned: whether numbers that are not finite are written as zeros.

    Returns:
      The third result has a flag (b, t) at tokens with a number that is not finite.
    """
    batch, time, width = x.shape
    parts, spans = pl.cdiv(width, TILE), tokens // TILE

    def body(*, x, gate, dropped, out, peaks, flags):
        part, span, row = (pl.program_id(axis) for axis in range(3))
        first, channel = span * TILE, part * TILE
        step, lane = first + jnp.arange(TILE), channel + jnp.arange(TILE)
        inside = (step < time)[:, None] & (lane < width)[None]

        def tile_of(ref: Any) -> jax.Array:
            view = ref.at[row, pl.ds(first, TILE), pl.ds(channel, TILE)]
            return pltriton.load(view, mask=inside, other=0).astype(jnp.float32)

        tile = tile_of(x)
        if gate is not None:
            tile = tile * tile_of(gate)
        if dropped is not None:
            drop = pltriton.load(dropped.at[row, pl.ds(first, TILE)], mask=step < time, other=1)
            tile = jnp.where((drop != 0)[:, None], 0.0, tile)
        fit = jnp.abs(tile) < jnp.inf
        pltriton.store(flags.at[row, part, pl.ds(first, TILE)], jnp.where(fit, 0, 1).max(1))
        if cleaned:
            tile = jnp.where(fit, tile, 0.0)
        tile = tile.astype(out.dtype)
        pltriton.store(
            peaks.at[row, span, pl.ds(channel, TILE)],
            jnp.abs(tile.astype(jnp.float32)).max(0),
            mask=lane < width,
        )
        pltriton.store(
            out.at[row, pl.ds(channel, TILE), pl.ds(first, TILE)], tile.T, mask=(lane < width)[:, None]
        )

    found = launch(
        body,
        name="long_conv_layout",
        grid=(parts, spans, batch),
        inputs={"x": x, "gate": gate, "dropped": dropped},
        outputs={
            "out": jax.ShapeDtypeStruct((batch, width, tokens), jnp.bfloat16),
            "peaks": jax.ShapeDtypeStruct((batch, spans, width), jnp.float32),
            "flags": jax.ShapeDtypeStruct((batch, parts, tokens), jnp.int32),
        },
    )
    return found["out"], found["peaks"].max(1), found["flags"].max(1)[:, :time] != 0
