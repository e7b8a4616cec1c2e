"""The Triton kernels of `long_conv`: Fourier transforms by matrix products, of two rows at a time, fused with what is between them.

The kernel h is cut into blocks of T taps and the input into blocks of T tokens. With F the Fourier transform of size n = 2T,

    y_i = the first T of F^-1 sum_{j <= i} H_{i-j} U_j,    U_j = F(u_j, then T zeros),
    H_m = F(h_{mT}, ..., h_{mT+T-1}, h_{mT-T}, ..., h_{mT-1}),    h = 0 before its first tap and after its last,

in which a block y_i depends on no later block. With G_i = F(dy_i, then T zeros) the gradients are

    du_j = the first T of F^-1 sum_{i >= j} conj(H_{i-j}) G_i,    dH_m = sum_i conj(U_{i-m}) G_i.

Rows a and b are one complex row a + ib, since h is real. In conj(U) G the part that mixes the rows is imaginary in time and is
dropped. A transform of size n = n1 n2 is that of Monarch matrices (Fu et al. 2023, arXiv:2311.05908): at frequency k + n1 l,

    U[k, l] = sum_q exp(-2 pi i q l / n2) (exp(-2 pi i k q / n) sum_{p < n1/2} exp(-2 pi i k p / n1) u[n2 p + q]).

Matrices are float16 and sums float32. Powers of two, one per row and channel, keep |u| <= 1/8, so that |U| <= n / 5, and |H| <= 1/8.
Errors are thus about 5e-4 of the largest numbers of a row, and within a block outputs have this error of later inputs too.

A token of a channel takes 4 (n1 + 2 n2) operations forward and 6 (n1 + 2 n2) backward on the matrix units, 1024 and 1536 in blocks of
4096, and a product of complex numbers for every two blocks: 0.4 and 0.6 TFLOP at 64 x 4096 x 768, where the direct product of a
triangular Toeplitz matrix takes 0.8 and 1.6. The kernels read u, dy and H and write y, du and dH once; spectra of a row's earlier
blocks stay in the second-level cache.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from layers.kernels import mosaic_gpu
from layers.kernels.pallas_triton import launch, pl, pltriton

PROGRAMS = 264  # programs that fill the GPU


class Plan(NamedTuple):
    """The transforms of a call.

    Attributes:
      outer, inner: n1 and n2.
      warps: number of warps per program; n1 is 16 per warp or a multiple.
      blocks: number of blocks of tokens.
      lags: number of blocks that outputs of a block see, for which some H_m is not 0.
    """

    outer: int
    inner: int
    warps: int
    blocks: int = 1
    lags: int = 1

    @property
    def block(self) -> int:
        """T, tokens per block."""
        return self.outer * self.inner // 2

    @property
    def tokens(self) -> int:
        """Tokens of all blocks."""
        return self.blocks * self.block

    @property
    def halves(self) -> tuple[int, int]:
        """The shape of a block of tokens."""
        return self.outer // 2, self.inner

    @property
    def whole(self) -> tuple[int, int]:
        """The shape of a spectrum."""
        return self.outer, self.inner


SHAPES = ((64, 16, 4), (64, 32, 4), (128, 32, 8), (128, 64, 8))  # n1, n2 and warps


def plan_of(time: int, taps: int) -> Plan:
    """Returns the smallest transform that holds all taps that count in one block, or else the largest."""
    taps = min(time, taps)
    plans = [Plan(*shape) for shape in SHAPES]
    plan = next((plan for plan in plans if taps <= plan.block), plans[-1])
    blocks = pl.cdiv(time, plan.block)
    return plan._replace(blocks=blocks, lags=min(blocks, pl.cdiv(taps - 1, plan.block) + 1))


@functools.cache
def _tables(plan: Plan) -> dict[str, np.ndarray]:
    """The constant factors of the transforms, float16.

    Two rows are the halves of a tile (n1, n2), so that "enter" and "leave" are matrices (n1, n1) of real and imaginary parts side by
    side: two that give the parts of a spectrum, and two for the parts whose sum gives both rows.
    """

    def wave(rows, columns, period):
        angle = 2 * np.pi * (np.outer(np.arange(rows), np.arange(columns)) % period) / period
        return np.cos(angle), -np.sin(angle)

    outer, inner = plan.whole
    real, imag = wave(outer, outer // 2, outer)
    within = wave(inner, inner, inner)
    tables = {
        "enter": (np.hstack([real, -imag]), np.hstack([imag, real])),
        "leave": (np.hstack([real, -imag]).T, np.hstack([imag, real]).T),
        "within": (*within, -within[1]),
        "twiddles": wave(outer, inner, outer * inner),
    }
    return {name: np.stack(parts).astype(np.float16) for name, parts in tables.items()}


def spectra_of_taps(taps: jax.Array, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """Returns H_m, (d, lags, 2, n1, n2), float16, real and imaginary parts, and the powers of two (d,) that they carry.

    Args:
      taps: (d, l), float32, of which those of the first lags - 1 blocks and one more count.
    """
    width, block = taps.shape[0], plan.block
    ahead = jnp.pad(taps, ((0, 0), (block, plan.lags * block - taps.shape[1])))
    earlier, later = (v.reshape(width, plan.lags, block) for v in (ahead[:, :-block], ahead[:, block:]))
    half = jnp.fft.rfft(jnp.concatenate([later, earlier], axis=2))
    spectra = jnp.concatenate([half, jnp.flip(half[..., 1:-1], axis=2).conj()], axis=2)
    spectra = spectra.reshape(width, plan.lags, plan.inner, plan.outer).swapaxes(2, 3)
    parts = jnp.stack([spectra.real, spectra.imag], axis=2)
    scale = scale_to(jnp.abs(parts).max((1, 2, 3, 4)))
    return (parts * scale[:, None, None, None, None]).astype(jnp.float16), scale


def taps_of_spectra(parts: jax.Array, length: int, plan: Plan) -> jax.Array:
    """The transpose of the linear part of `spectra_of_taps`: (d, l), float32, from gradients (d, lags, 2, n1, n2)."""
    width, block = parts.shape[0], plan.block
    spectra = jax.lax.complex(parts[:, :, 0], parts[:, :, 1]).swapaxes(2, 3)
    spectra = spectra.reshape(width, plan.lags, 2 * block)
    # Of the signal, the real part counts, whose spectrum is the mean of D_f and conj(D_{n-f}).
    opposite = jnp.roll(jnp.flip(spectra, axis=2), 1, axis=2).conj()
    signals = jnp.fft.irfft((spectra + opposite)[..., : block + 1] / 2, 2 * block)
    later, earlier = signals[..., :block].reshape(width, -1), signals[..., block:].reshape(width, -1)
    return (later + jnp.pad(earlier[:, block:], ((0, 0), (0, block))))[:, :length]


def scale_to(peak: jax.Array) -> jax.Array:
    """The power of two that brings numbers of this size to between 1/16 and 1/8; 1/8 for zeros."""
    exponent = jnp.clip(jnp.frexp(peak)[1], -100, 100)
    return jnp.ldexp(jnp.float32(1 / 8), -exponent)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _halved(*parts: jax.Array) -> list[jax.Array]:
    return [part.astype(jnp.float16) for part in parts]


def _times(a: Any, b: Any) -> tuple[jax.Array, jax.Array]:
    """The product of complex numbers."""
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def _conjugate_times(a: Any, b: Any) -> tuple[jax.Array, jax.Array]:
    return a[0] * b[0] + a[1] * b[1], a[0] * b[1] - a[1] * b[0]


class Transforms(NamedTuple):
    """The factors of the transforms as in `_tables`: matrices, and a ref of factors that do not stay in registers."""

    enter: list[jax.Array]
    leave: list[jax.Array]
    within: list[jax.Array]
    twiddles: Any

    @classmethod
    def load(cls, enter: Any, leave: Any, within: Any, twiddles: Any) -> "Transforms":
        """Loads the matrices."""
        return cls(*([ref[part] for part in range(ref.shape[0])] for ref in (enter, leave, within)), twiddles)

    def forward(self, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the spectrum (n1, n2) of a + ib, zeros following, from the halves a and b of a tile (n1, n2), float16."""
        half = [_product(part, rows) for part in self.enter]
        x, y = _halved(*_times(half, _load_parts(self.twiddles)))
        real, imag, minus = self.within
        return _product(x, real) + _product(y, minus), _product(x, imag) + _product(y, real)

    def backward(self, spectrum: Any) -> jax.Array:
        """Returns n times the first half of the inverse transform of a spectrum, both rows as halves of a tile."""
        x, y = _halved(*spectrum)
        real, imag, minus = self.within
        half = _product(x, real) + _product(y, imag), _product(x, minus) + _product(y, real)
        x, y = _halved(*_conjugate_times(_load_parts(self.twiddles), half))
        first, second = self.leave
        return _product(first, x) + _product(second, y)


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


def _load_parts(x: Any, *index: Any) -> list[jax.Array]:
    """The real and the imaginary part of a spectrum, float32."""
    return [x[*index, part].astype(jnp.float32) for part in range(2)]


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
                taken = _load_parts(kept, channel, split, earlier)
                return _sum(total, _times(_load_parts(spectra, channel, block - earlier), taken))

            total = _times(_load_parts(spectra, channel, 0), spectrum)
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

    def body(*, g, scale, back, spectra, u, shared, weights, du, dtaps, kept, **tables):
        channel, split = pl.program_id(0), pl.program_id(1)
        transforms = Transforms.load(**tables)

        def clear(block, carry):
            _store_parts(dtaps, [jnp.zeros(plan.whole, jnp.float32)] * 2, channel, split, block)
            return carry

        jax.lax.fori_loop(0, plan.lags, clear, 0)

        def load(pair, turn):
            block = plan.blocks - 1 - turn
            return _load_pair(g, pair, channel, block), _load_pair(u, pair, channel, block)

        def run(pair, turn, tiles):
            block = plan.blocks - 1 - turn
            spectrum = transforms.forward(_scaled(tiles[0], scale, pair, channel))
            _store_parts(kept, spectrum, channel, split, block)
            inputs = transforms.forward(_scaled(tiles[1], shared, pair, channel))
            inputs = [weights[pair, channel] * part for part in inputs]
            _fence()

            def add(lag, total):
                later = _load_parts(kept, channel, split, block + lag)
                found = _sum(_load_parts(dtaps, channel, split, lag), _conjugate_times(inputs, later))
                _store_parts(dtaps, found, channel, split, lag)
                return _sum(total, _conjugate_times(_load_parts(spectra, channel, lag), later))

            total = add(0, [jnp.zeros(plan.whole, jnp.float32)] * 2)
            if plan.lags > 1:
                total = jax.lax.fori_loop(1, jnp.minimum(turn + 1, plan.lags), add, total)
            _store_pair(du, transforms.backward(total), back, pair, channel, block)

        _walk(rows, splits, plan.blocks, load, run)

    found = _launch(
        body,
        "long_conv_gradients",
        plan,
        (width, splits),
        {"g": g, "scale": g_scale, "spectra": spectra, "u": u, "shared": shared},
        1 / (g_scale * carried[None]),
        {
            "du": jax.ShapeDtypeStruct(u.shape, u.dtype),
            "dtaps": jax.ShapeDtypeStruct((width, splits, plan.lags, 2, *plan.whole), jnp.float32),
        },
        weights=1 / least,
    )
    return found["du"][:rows].reshape(u.shape), taps_of_spectra(found["dtaps"].sum(1), taps.shape[1], plan)


def _launch(
    body: Any,
    name: str,
    plan: Plan,
    grid: tuple[int, int],
    inputs: dict[str, jax.Array],
    back: jax.Array,
    outputs: dict[str, jax.ShapeDtypeStruct],
    **others: jax.Array,
) -> dict[str, jax.Array]:
    """Runs a kernel on series cut into blocks, with scales for pairs, factors of transforms, and room for spectra of blocks."""

    def cut(shape):
        return (*shape[:2], plan.blocks, *plan.halves)

    given = {k: v.reshape(cut(v.shape)) if k in ("u", "g") else v for k, v in inputs.items()}
    given |= {k: _scales(v) for k, v in inputs.items() if k in ("scale", "shared")}
    given |= {"back": _scales(back / (plan.outer * plan.inner))} | others
    given |= {k: jnp.asarray(v) for k, v in _tables(plan).items()}
    # Rows are written in pairs.
    room = {
        k: jax.ShapeDtypeStruct((2 * pl.cdiv(v.shape[0], 2), *cut(v.shape)[1:]), v.dtype)
        if k in ("y", "du")
        else v
        for k, v in outputs.items()
    }
    if plan.lags > 1 or "dtaps" in outputs:
        room["kept"] = jax.ShapeDtypeStruct((*grid, plan.blocks, 2, *plan.whole), jnp.float16)
    # The factors fill shared memory, so that no second copy of a table fits.
    return launch(body, name=name, grid=grid, inputs=given, outputs=room, warps=plan.warps, stages=1)
