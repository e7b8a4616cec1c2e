"""Mixers of images against their equations in NumPy, pixel by pixel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.mixers import make_mixer
from layers.parts.images import ORDERS, scan_places
from tests.layers.mixers.literal import apply, by_row, drawn, silu, softplus, tokens, wide

WIDTH, COLUMNS = 6, 4


def key(order, pixel, columns, window):
    """What the pixels of a scan are sorted by; the Hilbert curve has a test of its own."""
    row, column = pixel // columns, pixel % columns
    return {
        "row": (row, column),
        "column": (column, row),
        "snake": (row, column if row % 2 == 0 else -column),
        "window": (row // window, column // window, row % window, column % window),
    }[order]


def read(order, count, columns, window=2):
    """The pixels in the order of a scan."""
    name = order.removesuffix("_reversed")
    found = sorted(range(count), key=lambda pixel: key(name, pixel, columns, window))
    return found[::-1] if name != order else found


def run(model, x):
    graph, variables = nnx.split(model)
    return jax.jit(lambda v, x: nnx.merge(graph, v, copy=True)(x)[0])(variables, x)


def selective(scans, number, u):
    """The selective state space with one set of the parameters of `SelectiveScans`, step by step."""
    rank, size = scans.sizes
    r, inputs, outputs = np.split(u @ wide(scans.selection)[number], [rank, rank + size], axis=1)
    dt = softplus(r @ wide(scans.dt)[number] + wide(scans.dt_bias)[number])
    rates, h, y = -np.exp(wide(scans.log_a)[number]), 0, []
    for t in range(len(u)):
        h = np.exp(dt[t][:, None] * rates) * h + (dt[t] * u[t])[:, None] * inputs[t]
        y.append(h @ outputs[t] + wide(scans.d)[number] * u[t])
    return np.stack(y)


def image_filter(module, x, columns, stride=1):
    """A filter over both axes of pixels (t, e) row by row, with zeros where there is no pixel; images (p, q, e)."""
    taps, rows = wide(module.weight), -(-len(x) // columns)
    half = len(taps) // 2
    y = np.zeros((-(-rows // stride), -(-columns // stride), x.shape[1])) + wide(module.bias)
    for i, j in np.ndindex(y.shape[:2]):
        for p, q in np.ndindex(taps.shape[:2]):
            row, column = i * stride + p - half, j * stride + q - half
            pixel = row * columns + column
            if 0 <= column < columns and row >= 0 and pixel < len(x):
                y[i, j] += taps[p, q] * x[pixel]
    return y


def normed(norm, x, epsilon):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * wide(norm.scale) + wide(norm.bias)


def vmamba(model, row):
    config = model.config
    u, gate = np.split(apply(model.input, row), 2, axis=1)
    u = silu(image_filter(model.filter, u, config.columns).reshape(-1, u.shape[1])[: len(row)])
    total = np.zeros_like(u)
    for number, order in enumerate(config.orders):
        pixels = read(order, len(row), config.columns)
        total[pixels] += selective(model.scans, number, u[pixels])
    return apply(model.output, normed(model.norm, total, config.epsilon) * silu(gate))


@pytest.mark.parametrize(
    "orders",
    [
        ("row", "column", "row_reversed", "column_reversed"),
        pytest.param(("window", "snake_reversed"), marks=pytest.mark.slow),
    ],
)
def test_vmamba_equals_the_equation(orders):
    window = {"window": 2} if "window" in orders else {}
    model = drawn("vmamba", WIDTH, columns=COLUMNS, orders=orders, **window, state_size=3, dt_rank=2)
    x = tokens(3 * COLUMNS - 1, WIDTH)  # The last row misses a pixel.
    np.testing.assert_allclose(run(model, x), by_row(lambda row: vmamba(model, row), x), atol=1e-5)


def enlarged(x, size):
    """Bilinear interpolation between centres of pixels, with the border's values beyond it."""
    for axis in range(2):
        source = np.maximum((np.arange(size[axis]) + 0.5) * x.shape[axis] / size[axis] - 0.5, 0)
        low = np.floor(source).astype(int)
        high, part = np.minimum(low + 1, x.shape[axis] - 1), source - low
        shape = [1, 1, 1]
        shape[axis] = -1
        x = x.take(low, axis) * (1 - part).reshape(shape) + x.take(high, axis) * part.reshape(shape)
    return x


def msvmamba(model, row):
    config = model.config
    rows = len(row) // config.columns
    u, gate = np.split(apply(model.input, row), 2, axis=1)
    fine = silu(image_filter(model.filter, u, config.columns)).reshape(len(row), -1)
    coarse = silu(image_filter(model.coarse_filter, u, config.columns, stride=2))
    pixels = coarse.reshape(-1, u.shape[1])
    orders = [
        read(order, len(pixels), coarse.shape[1]) for order in ("row_reversed", "column", "column_reversed")
    ]
    if config.joined:
        y = selective(model.coarse_scan, 0, np.concatenate([pixels[order] for order in orders]))
        parts = np.split(y, 3)
    else:
        parts = [selective(model.coarse_scan, 0, pixels[order]) for order in orders]
    total = np.zeros_like(pixels)
    for order, part in zip(orders, parts, strict=True):
        total[order] += part
    up = enlarged(total.reshape(coarse.shape), (rows, config.columns)).reshape(len(row), -1)
    y = normed(model.norm, selective(model.scan, 0, fine) + up, config.epsilon)
    return apply(model.output, y * silu(gate))


@pytest.mark.slow
@pytest.mark.parametrize("rows, columns, joined", [(3, 4, True), (4, 5, False), (1, 1, True)])
def test_msvmamba_equals_the_equation(rows, columns, joined):
    model = drawn("msvmamba", WIDTH, columns=columns, joined=joined, coarse_taps=5, state_size=3, dt_rank=2)
    x = tokens(rows * columns, WIDTH)
    np.testing.assert_allclose(run(model, x), by_row(lambda row: msvmamba(model, row), x), atol=1e-5)


def kernel(model, axis, rank, length):
    """Taps from 1 - length to length - 1 of one axis, as (taps, d): powers of the discretized system."""
    config, rate = model.config, model.config.rate
    a = -np.exp(wide(model.modes[axis].log_rate)) + 1j * wide(model.modes[axis].frequency)
    b = wide(model.modes[axis].b)[0] + 1j * wide(model.modes[axis].b)[1]
    c = (wide(model.c)[0] + 1j * wide(model.c)[1])[axis]
    dt = np.exp(wide(model.log_dt)[axis])[:, None]
    if config.bandlimit is not None:
        c = np.where(dt * np.abs(a.imag) / np.pi < config.bandlimit, c, 0)
    if config.discretization == "zoh":
        decay = np.exp(rate * dt * a)
        b = (decay - 1) / a * b
    else:
        decay = (1 + rate * dt * a / 2) / (1 - rate * dt * a / 2)
        b = rate * dt / (1 - rate * dt * a / 2) * b
    powers = decay[None] ** np.arange(length)[:, None, None]
    back = 2 * (c[0, rank] * b * powers).sum(-1).real
    if not config.bidirectional:
        return np.concatenate([np.zeros((length - 1, WIDTH)), back])
    ahead = 2 * (c[1, rank] * b * powers).sum(-1).real
    return np.concatenate([ahead[: length - 1][::-1], back])


def s4nd(model, row):
    config = model.config
    rows, columns = len(row) // config.columns, config.columns
    image, y = row.reshape(rows, columns, WIDTH), np.zeros((rows, columns, WIDTH))
    for rank in range(config.rank):
        down, across = kernel(model, 0, rank, rows), kernel(model, 1, rank, columns)
        taps = down[:, None] * across[None]
        for i, j in np.ndindex(rows, columns):
            for k, l in np.ndindex(rows, columns):
                y[i, j] += taps[i - k + rows - 1, j - l + columns - 1] * image[k, l] / config.rank
    return y.reshape(row.shape) + wide(model.d) * row


@pytest.mark.parametrize(
    "options",
    [
        {"bandlimit": 0.5, "rate": 0.5},
        pytest.param(
            {"rank": 2, "bidirectional": False, "discretization": "bilinear"}, marks=pytest.mark.slow
        ),
    ],
)
def test_s4nd_equals_the_equation(options):
    model, x = drawn("s4nd", WIDTH, columns=7, state_size=6, **options), tokens(9 * 7, WIDTH)
    for modes in model.modes:  # Some turn faster than the limit.
        modes.frequency[...] *= 5
    np.testing.assert_allclose(run(model, x), by_row(lambda row: s4nd(model, row), x), atol=3e-5)


@pytest.mark.slow
def test_s4nd_reads_other_resolutions():
    """Kernels are those of one system in continuous space: at twice the resolution they have twice the taps, half as large."""
    options = {"columns": 8, "state_size": 8, "init": "lin", "dt_min": 0.02, "dt_max": 0.05}
    given = {"width": WIDTH, "dtype": jnp.dtype("float32")}
    model = make_mixer("s4nd", options, given=given, rngs=nnx.Rngs(0))
    finer = make_mixer("s4nd", options | {"rate": 0.5}, given=given, rngs=nnx.Rngs(0))
    once, twice = model.kernels(0, 8), finer.kernels(0, 16)
    np.testing.assert_allclose(twice[..., ::2] + twice[..., 1::2], once, atol=1e-5 * np.abs(once).max())


def test_scans_visit_every_pixel_in_their_order():
    for count, columns in ((12, 4), (11, 4), (9, 5), (3, 4), (1, 1)):
        for order in (*ORDERS, *(f"{name}_reversed" for name in ORDERS)):
            if not order.startswith("hilbert"):
                places = scan_places(order, count, columns, 2)
                np.testing.assert_array_equal(np.argsort(places), read(order, count, columns))


def test_a_hilbert_curve_goes_from_neighbour_to_neighbour():
    row, column = np.divmod(np.argsort(scan_places("hilbert", 4 * 64, 8)), 8)
    np.testing.assert_array_equal(np.abs(np.diff(row)) + np.abs(np.diff(column)), 1)
    # It fills every square of 2, 4 and 8 pixels before it leaves it.
    for size in (2, 4, 8):
        squares = row // size * 8 + column // size
        assert (np.diff(squares) != 0).sum() == 4 * 64 // size**2 - 1
    # Without the pixels that an image misses, the others keep their order.
    few = scan_places("hilbert", 27, 8)
    np.testing.assert_array_equal(np.argsort(few), [p for p in row * 8 + column if p < 27])


@pytest.mark.slow
def test_a_cross_scan_is_its_mixers_on_reordered_pixels():
    orders = ("column", "window", "row_reversed")
    options = {"inner": "s5", "options": {"state_size": 4}, "columns": COLUMNS, "orders": orders, "window": 2}
    model, x = drawn("cross_scan", WIDTH, **options), tokens(11, WIDTH)
    want = np.zeros(x.shape)
    for mixer, order in zip(model.inner, orders, strict=True):
        pixels = np.asarray(read(order, 11, COLUMNS))
        want[:, pixels] += run(mixer, x[:, pixels])
    np.testing.assert_allclose(run(model, x), want, atol=1e-5)
