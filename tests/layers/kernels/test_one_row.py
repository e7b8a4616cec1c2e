"""The Triton kernel of products of one row with matrices: interpreted, lowered, and in linear maps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.kernels import devices, one_row, pallas_triton
from layers.parameters import linear, outputs_of

SIZES = [(100, (48,)), pytest.param((300, (33, 16, 48)), marks=pytest.mark.slow)]


def draw(inputs, outputs):
    rng = np.random.default_rng(0)
    shapes = [(1, 1, inputs), *((inputs, count) for count in outputs)]
    return [jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes]


def wide(x):
    return np.asarray(x.astype(jnp.float32))


@pytest.mark.parametrize("sizes", SIZES)
def test_products_beside_float32(sizes, monkeypatch):
    """The last of several pieces of the inputs, and the last columns, are not whole."""
    monkeypatch.setattr(one_row, "SETTINGS", one_row.Settings(columns=16, rows=64))
    x, *matrices = draw(*sizes)
    with pallas_triton.interpreted():
        found = one_row.products(x, matrices)
        gradients = jax.grad(
            lambda x, matrices: sum(y.astype(jnp.float32).sum() for y in one_row.products(x, matrices)),
            (0, 1),
        )(x, matrices)
    for y, matrix in zip(found, matrices, strict=True):
        assert (y.shape, y.dtype) == ((1, 1, matrix.shape[1]), x.dtype)
        want = wide(x) @ wide(matrix)
        # Sums are float32, so that the error is that of rounding results.
        np.testing.assert_allclose(wide(y), want, rtol=2**-8, atol=1e-4 * np.abs(want).max())
    np.testing.assert_allclose(
        wide(gradients[0])[0, 0], sum(wide(matrix).sum(1) for matrix in matrices), rtol=2**-8, atol=0.05
    )
    for gradient in gradients[1]:
        np.testing.assert_array_equal(wide(gradient), np.broadcast_to(wide(x)[0, 0][:, None], gradient.shape))


def test_linear_maps_of_one_row_take_it_on_a_gpu(monkeypatch):
    """Maps of one input are one launch; those with a bias, of another type or of more rows are left to XLA."""
    monkeypatch.setattr(one_row, "FEWEST", 1)
    calls = []

    def products(x, matrices):
        calls.append(len(matrices))
        return tuple(x @ matrix for matrix in matrices)

    monkeypatch.setattr(one_row, "products", products)
    options = dict(dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    maps = [linear(8, outputs, bias=False, **options) for outputs in (4, 6)]
    for each in maps:
        each.kernel.set_value(each.kernel[...].astype(jnp.bfloat16))
    row, rows = (jnp.ones((1, t, 8), jnp.bfloat16) for t in (1, 2))
    want = [each(row) for each in maps]
    assert not calls
    with devices.as_on("gpu"):
        for got, y in zip(outputs_of(row, *maps), want, strict=True):
            np.testing.assert_array_equal(wide(got), wide(y))
        maps[0](row)
        assert calls == [2, 1]
        maps[0](rows)
        maps[0](row.astype(jnp.float32))
        linear(8, 4, bias=True, **options)(row)
        linear(8, 4, bias=False, **options)(row)  # its matrix is float32
        assert calls == [2, 1]


def test_rows_of_a_batch_are_products_of_matrices():
    x, matrix = draw(20, (8,))
    rows = jnp.concatenate([x, 2 * x])
    with pallas_triton.interpreted():
        text = jax.make_jaxpr(jax.vmap(lambda x: one_row.products(x, [matrix])[0]))(rows)
        found = jax.vmap(lambda x: one_row.products(x, [matrix])[0])(rows)
    assert "pallas_call" not in str(text)
    np.testing.assert_array_equal(wide(found), wide(rows @ matrix))


def test_lowers_for_a_gpu():
    x, *matrices = draw(128, (64, 32))
    with devices.as_on("gpu"), jax.sharding.use_abstract_mesh(pallas_triton.hopper_mesh()):
        text = jax.jit(one_row.products).trace(x, matrices).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__gpu$xla.gpu.triton") == 1


@pytest.mark.gpu
@pytest.mark.parametrize(
    "sizes", [(2048, (2048, 512, 512)), (8192, (2048,)), (2048, (8192, 8192)), (1000, (300,))]
)
def test_on_gpu(sizes):
    x, *matrices = draw(*sizes)
    for y, matrix in zip(jax.jit(one_row.products)(x, matrices), matrices, strict=True):
        want = wide(x) @ wide(matrix)
        np.testing.assert_allclose(wide(y), want, rtol=2**-8, atol=1e-4 * np.abs(want).max())
