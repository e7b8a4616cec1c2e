"""The Triton kernels of `long_conv`: both passes, with Fourier transforms fused with what is between them.

The kernel h is cut into blocks of T taps and the input into blocks of T tokens. With F the Fourier transform of size n = 2T,

    y_i = the first T of F^-1 sum_{j <= i} H_{i-j} U_j,    U_j = F(u_j, then T zeros),
    H_m = F(h_{mT}, ..., h_{mT+T-1}, h_{mT-T}, ..., h_{mT-1}),    h = 0 before its first tap and after its last,

in which a block y_i depends on no later block. With G_i = F(dy_i, then T zeros) the gradients are

    du_j = the first T of F^-1 sum_{i >= j} conj(H_{i-j}) G_i,    dH_m = sum_i conj(U_{i-m}) G_i.

Two rows are one complex row, since h is real. In conj(U) G the part that mixes the rows is imaginary in time and is dropped.

Spectra are float16. Powers of two, one per row and channel, keep |u| <= 1/8, so that |U| <= n / 5, and |H| <= 1/8. Errors are thus
about 5e-4 of the largest numbers of a row, and within a block outputs have this error of later inputs too.

The matrix units take 4 (n1 + 2 n2) multiplications per token and channel forward and 6 (n1 + 2 n2) backward, 1024 and 1536 in blocks
of 4096: 0.4 and 0.6 TFLOP at 64 x 4096 x 768, where the direct product of a triangular Toeplitz matrix takes 0.8 and 1.6. Besides, there
is a product of complex numbers per frequency for every two blocks. The kernels read u, dy and H and write y, du and dH once; spectra
of a row's other blocks stay in the second-level cache.
"""

from typing import Any

import jax
import jax.numpy as jnp

from layers.kernels import mosaic_gpu
from layers.kernels.long_conv.gpu.transforms import (
    Plan,
    Transforms,
    conjugate_times,
    load_parts,
    spectra_of_taps,
    tables,
    taps_of_spectra,
    times,
)
from layers.kernels.pallas_triton import launch, pl, pltriton

PROGRAMS = 264  # programs that fill the GPU
FREQUENCIES = 1024  # per program of sums over pairs


def _fence() -> None:
    """Lets all warps of a program see what they have written to memory."""
    if not mosaic_gpu.is_interpreted():
        pltriton.debug_barrier()


def _window(x: Any, pair: Any, channel: Any, block: Any) -> tuple[Any, jax.Array]:
    """The part of an array (b, d, blocks, n1/2, n2) that the tile (n1, n2) of a pair covers, and its rows.

    Where the number of rows is odd, the last one stands for the one that is missing.
    """
    half, inner = x.shape[3:]
    step, column = jnp.arange(2 * half)[:, None], jnp.arange(inner)[None]
    row = 2 * pair + step // half
    return x.at[jnp.minimum(row, x.shape[0] - 1), channel, block, step % half, column], row


def _load_pair(x: Any, pair: Any, channel: Any, block: Any) -> jax.Array:
    """A block of both rows of a pair."""
    return pltriton.load(_window(x, pair, channel, block)[0])


def _scaled(tile: jax.Array, scale: Any, pair: Any, channel: Any) -> jax.Array:
    """A tile of a pair in float16, each row times its scale."""
    row = 2 * pair + jnp.arange(tile.shape[0])[:, None] // (tile.shape[0] // 2)
    return (tile.astype(jnp.float32) * _of_rows(scale, row, pair, channel)).astype(jnp.float16)


def _of_rows(scale: Any, row: jax.Array, pair: Any, channel: Any) -> jax.Array:
    return jnp.where(row == 2 * pair, scale[2 * pair, channel], scale[2 * pair + 1, channel])


def _store_pair(x: Any, tile: jax.Array, scale: Any, pair: Any, channel: Any, block: Any) -> None:
    view, row = _window(x, pair, channel, block)
    pltriton.store(view, (tile * _of_rows(scale, row, pair, channel)).astype(x.dtype))


def _store_parts(x: Any, spectrum: Any, *index: Any) -> None:
    for part, tile in enumerate(spectrum):
        x[*index, part] = tile.astype(x.dtype)


def _sum(a: Any, b: Any) -> tuple[jax.Array, jax.Array]:
    return a[0] + b[0], a[1] + b[1]


def _divided(rows: int, width: int) -> tuple[int, int]:
    """The number of pairs of rows, and of programs per channel that share them."""
    pairs = pl.cdiv(rows, 2)
    return pairs, max(1, min(pairs, PROGRAMS // width))


PREFETCH = True


def _walk(rows: int, splits: int, blocks: int, load: Any, run: Any) -> None:
    """Calls run(pair, block, load(pair, block)) for the blocks of the pairs of this program, with the next block's loads under way."""
    split = pl.program_id(1)
    turns = (pl.cdiv(rows, 2) - split + splits - 1) // splits * blocks

    def place(turn):
        turn = jnp.minimum(turn, turns - 1)
        return split + turn // blocks * splits, turn % blocks

    def step(turn, tiles):
        if not PREFETCH:
            run(*place(turn), load(*place(turn)))
            return 0
        coming = load(*place(turn + 1))
        run(*place(turn), tiles)
        return coming

    jax.lax.fori_loop(0, turns, step, load(*place(0)) if PREFETCH else 0)


def _scales(scale: jax.Array) -> jax.Array:
    """Scales (b, d) with one of 0 for a row that an odd number of rows lacks."""
    return jnp.pad(scale, ((0, scale.shape[0] % 2), (0, 0)))


def convolve(u: jax.Array, scale: jax.Array, taps: jax.Array, plan: Plan) -> jax.Array:
    """Returns the convolution (b, d, blocks T) of u with taps, in the type of u.

    Args:
      u: (b, d, blocks T).
      scale: (b, d), float32, powers of two that bring the rows of u to at most 1/8.
      taps: (d, l), float32.
    """
    rows, width, _ = u.shape
    _, splits = _divided(rows, width)
    spectra, carried = spectra_of_taps(taps, plan)

    def body(*, u, scale, back, spectra, y, kept=None, **tables):
        channel, split = pl.program_id(0), pl.program_id(1)
        transforms = Transforms.load(**tables)

        def load(pair, block):
            return _load_pair(u, pair, channel, block)

        def run(pair, block, tile):
            spectrum = transforms.forward(_scaled(tile, scale, pair, channel))
            if kept is not None:
                _store_parts(kept, spectrum, channel, split, block)
                _fence()

            def add(earlier, total):
                taken = load_parts(kept, channel, split, earlier)
                return _sum(total, times(load_parts(spectra, channel, block - earlier), taken))

            total = times(load_parts(spectra, channel, 0), spectrum)
            if plan.lags > 1:
                total = jax.lax.fori_loop(jnp.maximum(0, block - plan.lags + 1), block, add, total)
            _store_pair(y, transforms.backward(total), back, pair, channel, block)

        _walk(rows, splits, plan.blocks, load, run)

    return _launch(
        body,
        "long_conv",
        plan,
        (width, splits),
        {"u": u, "scale": scale, "spectra": spectra},
        1 / (scale * carried[None]),
        {"y": jax.ShapeDtypeStruct(u.shape, u.dtype)},
    )["y"][:rows].reshape(u.shape)


def gradients(
    u: jax.Array, u_scale: jax.Array, g: jax.Array, g_scale: jax.Array, taps: jax.Array, plan: Plan
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of `convolve`: du in the type of u, and those of the taps, float32, for the gradients g (b, d, blocks T)."""
    rows, width, _ = u.shape
    pairs, splits = _divided(rows, width)
    spectra, carried = spectra_of_taps(taps, plan)
    # Both rows of a pair need one weight in the sum, that of the row with larger numbers, which then keeps its scale.
    both = _scales(u_scale * g_scale).reshape(pairs, 2, width)
    least = jnp.where(both == 0, jnp.inf, both).min(1)
    shared = jnp.repeat(least, 2, axis=0)[:rows] / g_scale

    def body(*, g, scale, back, spectra, u, shared, du, inputs, outputs, **tables):
        channel = pl.program_id(0)
        transforms = Transforms.load(**tables)

        def load(pair, turn):
            block = plan.blocks - 1 - turn
            return _load_pair(g, pair, channel, block), _load_pair(u, pair, channel, block)

        def run(pair, turn, tiles):
            block = plan.blocks - 1 - turn
            given = transforms.forward(_scaled(tiles[1], shared, pair, channel))
            _store_parts(inputs, given, pair, channel, block)
            spectrum = transforms.forward(_scaled(tiles[0], scale, pair, channel))
            _store_parts(outputs, spectrum, pair, channel, block)
            total = conjugate_times(load_parts(spectra, channel, 0), spectrum)

            def add(lag, total):
                later = load_parts(outputs, pair, channel, block + lag)
                return _sum(total, conjugate_times(load_parts(spectra, channel, lag), later))

            if plan.lags > 1:
                _fence()
                total = jax.lax.fori_loop(1, jnp.minimum(turn + 1, plan.lags), add, total)
            _store_pair(du, transforms.backward(total), back, pair, channel, block)

        _walk(rows, splits, plan.blocks, load, run)

    kept = jax.ShapeDtypeStruct((pairs, width, plan.blocks, 2, *plan.whole), jnp.float16)
    found = _launch(
        body,
        "long_conv_gradients",
        plan,
        (width, splits),
        {"g": g, "scale": g_scale, "spectra": spectra, "u": u, "shared": shared},
        1 / (g_scale * carried[None]),
        {"du": jax.ShapeDtypeStruct(u.shape, u.dtype), "inputs": kept, "outputs": kept},
    )
    parts = _correlated(found["inputs"], found["outputs"], 1 / least, plan)
    return found["du"][:rows].reshape(u.shape), taps_of_spectra(parts, taps.shape[1], plan)


def _correlated(inputs: jax.Array, outputs: jax.Array, weights: jax.Array, plan: Plan) -> jax.Array:
    """Returns dH_m, (d, lags, 2, n1, n2), float32: the sums over pairs and blocks of weights (pairs, d) times conj(U) G."""
    pairs, width, blocks, *_ = inputs.shape
    size = plan.outer * plan.inner
    tile = min(size, FREQUENCIES)

    def body(*, inputs, outputs, weights, sums):
        lag, part, channel = (pl.program_id(axis) for axis in range(3))
        count, window = blocks - lag, pl.ds(part * tile, tile)

        def load(x, *index):
            return [x[*index, part, window].astype(jnp.float32) for part in range(2)]

        def add(turn, total):
            pair, block = turn // count, turn % count
            product = conjugate_times(
                load(inputs, pair, channel, block), load(outputs, pair, channel, block + lag)
            )
            return _sum(total, [weights[pair, channel] * part for part in product])

        nothing = jnp.zeros((tile,), jnp.float32)
        for part_, total in enumerate(jax.lax.fori_loop(0, pairs * count, add, (nothing, nothing))):
            sums[channel, lag, part_, window] = total

    found = launch(
        body,
        name="long_conv_correlation",
        grid=(plan.lags, size // tile, width),
        inputs={
            "inputs": inputs.reshape(*inputs.shape[:4], size),
            "outputs": outputs.reshape(*outputs.shape[:4], size),
            "weights": weights,
        },
        outputs={"sums": jax.ShapeDtypeStruct((width, plan.lags, 2, size), jnp.float32)},
    )
    return found["sums"].reshape(width, plan.lags, 2, *plan.whole)


def _launch(
    body: Any,
    name: str,
    plan: Plan,
    grid: tuple[int, int],
    inputs: dict[str, jax.Array],
    back: jax.Array,
    outputs: dict[str, jax.ShapeDtypeStruct],
) -> dict[str, jax.Array]:
    """Runs a kernel on series cut into blocks, with scales for pairs, factors of transforms, and room for spectra of blocks."""

    def cut(shape):
        return (*shape[:2], plan.blocks, *plan.halves)

    given = {k: v.reshape(cut(v.shape)) if k in ("u", "g") else v for k, v in inputs.items()}
    given |= {k: _scales(v) for k, v in inputs.items() if k in ("scale", "shared")}
    given |= {"back": _scales(back / (plan.outer * plan.inner))}
    given |= {k: jnp.asarray(v) for k, v in tables(plan).items()}
    # Rows are written in pairs.
    room = {
        k: jax.ShapeDtypeStruct((2 * pl.cdiv(v.shape[0], 2), *cut(v.shape)[1:]), v.dtype)
        if k in ("y", "du")
        else v
        for k, v in outputs.items()
    }
    if plan.lags > 1 and "y" in outputs:
        room["kept"] = jax.ShapeDtypeStruct((*grid, plan.blocks, 2, *plan.whole), jnp.float16)
    # The factors fill shared memory, so that no second copy of a table fits.
    return launch(body, name=name, grid=grid, inputs=given, outputs=room, warps=plan.warps, stages=1)
