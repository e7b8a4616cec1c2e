"""The cross-entropy of a linear output layer against the formula in float64, in pieces and over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from layers.cross_entropy import Unprojected, linear_cross_entropy

B, T, D, V = 8, 10, 6, 11
Z = 0.01


def draw(dtype=jnp.float32, scale=1.0):
    keys = jax.random.split(jax.random.key(0), 4)
    return (
        jax.random.normal(keys[0], (B, T, D), dtype),
        scale * jax.random.normal(keys[1], (V, D)),
        jax.random.randint(keys[2], (B, T), 0, V),
        jax.random.bernoulli(keys[3], 0.7, (B, T)),
    )


def expected(x, matrix, labels, counted, z_loss=Z):
    """Total, losses, hits and the gradients of the total by x and the matrix, in float64."""
    x, matrix = np.asarray(x, np.float64), np.asarray(matrix, np.float64)
    labels, counted = np.asarray(labels), np.asarray(counted)
    logits = x @ matrix.T
    top = logits.max(-1, keepdims=True)
    total = np.exp(logits - top).sum(-1)
    lse = top[..., 0] + np.log(total)
    losses = (np.log(total) - np.take_along_axis(logits - top, labels[..., None], -1)[..., 0]) * counted
    p = np.exp(logits - top) / total[..., None]
    dlogits = (1 + 2 * z_loss * lse)[..., None] * p - np.eye(V)[labels]
    dlogits *= counted[..., None]
    hits = (logits.argmax(-1) == labels) & counted
    total = losses.sum() + z_loss * (lse**2 * counted).sum()
    return (total, losses, hits), (dlogits @ matrix, np.einsum("btv,btd->vd", dlogits, x))


def run(x, matrix, labels, counted, **options):
    def total(x, matrix):
        found = linear_cross_entropy(x, matrix, labels, counted, z_loss=Z, **options)
        return 3 * found.total, found

    (_, found), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(x, matrix)
    return found, jax.tree.map(lambda g: g / 3, gradients)


def assert_equals(got, want, tolerance):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(one, np.float64), other, rtol=tolerance, atol=tolerance)


@pytest.mark.sample(3)
@pytest.mark.parametrize("piece", [B * T * V, 2 * B * V, B * V])
def test_losses_and_gradients_equal_the_formula(piece):
    arguments = draw()
    assert_equals(jax.jit(lambda *a: run(*a, piece=piece))(*arguments), expected(*arguments), 1e-5)
    only = linear_cross_entropy(*arguments, z_loss=Z, piece=piece)
    assert_equals(only, expected(*arguments)[0], 1e-5)


def test_large_logits_lose_no_normalizer():
    x, matrix, labels, counted = draw()
    x, matrix = jnp.ones_like(x), -1e9 * jnp.ones_like(matrix)
    assert_equals(run(x, matrix, labels, counted)[1][0], expected(x, matrix, labels, counted)[1][0], 1e-4)


def test_bfloat16_rounds_operands_only():
    x, matrix, labels, counted = draw(jnp.bfloat16)
    matrix = matrix.astype(jnp.bfloat16).astype(jnp.float32)
    (total, losses, _), (dx, dmatrix) = run(x, matrix, labels, counted, piece=B * V)
    (want_total, want_losses, _), (want_dx, want_dmatrix) = expected(x, matrix, labels, counted)
    assert_equals((total, losses), (want_total, want_losses), 1e-5)
    assert (dx.dtype, dmatrix.dtype) == (jnp.bfloat16, jnp.float32)
    assert_equals((dx, dmatrix), (want_dx, want_dmatrix), 3e-2)


def test_what_is_not_counted_is_ignored_whatever_it_is():
    x, matrix, labels, counted = draw()
    spoilt = jnp.where(counted[..., None], x, jnp.nan), matrix, jnp.where(counted, labels, 300), counted
    (_, got), (_, want) = run(*spoilt), run(x, matrix, labels, counted)
    assert_equals(got, want, 0)
    assert (np.asarray(got[0])[~np.asarray(counted)] == 0).all()


@pytest.mark.parametrize("label", [-1, V])
def test_counted_labels_out_of_range_give_nan(label):
    x, matrix, labels, counted = draw()
    (total, losses, _), (dx, dmatrix) = run(x, matrix, labels.at[1, 2].set(label), counted.at[1, 2].set(True))
    assert np.isnan(total)
    assert np.isnan(losses).sum() == 1
    assert np.isnan(dx[1, 2]).all()
    assert np.isnan(dx).sum() == D
    assert np.isnan(dmatrix).all()


def test_strict_promotion_and_wide_numbers_change_no_type():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        for dtype in (jnp.float32, jnp.bfloat16):
            x = jax.ShapeDtypeStruct((B, T, D), dtype)
            matrix = jax.ShapeDtypeStruct((V, D), jnp.float32)
            labels = jax.ShapeDtypeStruct((B, T), jnp.int32)
            counted = jax.ShapeDtypeStruct((B, T), bool)
            found, gradients = jax.eval_shape(lambda *a: run(*a, piece=B * V), x, matrix, labels, counted)
            assert (found.total.dtype, found.losses.dtype) == (jnp.float32, jnp.float32)
            assert [g.dtype for g in gradients] == [dtype, jnp.float32]


def test_no_array_holds_all_logits():
    arguments = draw()
    text = str(jax.make_jaxpr(lambda *a: run(*a, piece=2 * B * V))(*arguments))
    assert f"[{B},{T},{V}]" not in text
    assert f"[{B},2,{V}]" in text


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_devices_share_the_positions(sizes, kind):
    arguments = draw()
    mesh = jax.make_mesh(sizes, ("data", "fsdp", "tensor"), (kind,) * 3)
    with jax.set_mesh(mesh):
        spec = jax.P(("data", "fsdp"))
        placed = [jax.device_put(a, jax.P() if a is arguments[1] else spec) for a in arguments]
        step = jax.jit(lambda *a: run(*a, piece=V))
        if kind == AxisType.Auto:
            assert "shard_map" in str(jax.make_jaxpr(lambda *a: run(*a))(*placed))
        got = step(*placed)
    assert_equals(got, expected(*arguments), 1e-5)


def test_the_gradient_of_the_matrix_is_summed_over_devices_last():
    """A factor after the sum would keep XLA from joining it with the sum of the gradient of a tied embedding."""
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    with jax.set_mesh(mesh):
        text = str(jax.make_jaxpr(run)(*draw()))
    assert f"f32[8,{V},{D}] = mul" in text
    assert f"f32[{V},{D}] = psum" in text
    assert f"f32[{V},{D}] = mul" not in text


def test_logits_multiply_rounded_operands_in_both_passes():
    x, matrix, *_ = draw(jnp.bfloat16)
    weights = jax.random.normal(jax.random.key(9), (B, T, V))
    grad = jax.grad(lambda x, m: (Unprojected(x, m).logits * weights).sum(), (0, 1))
    text = str(jax.make_jaxpr(grad)(x, matrix))
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products
    assert all("f32" not in line.split("dot_general")[1].split("]")[-1] for line in products)
    wide, rounded = x.astype(jnp.float32), weights.astype(jnp.bfloat16).astype(jnp.float32)
    dx, dmatrix = grad(x, matrix)
    np.testing.assert_allclose(dx.astype(jnp.float32), rounded @ matrix, rtol=0.05, atol=0.05)
    np.testing.assert_allclose(dmatrix, jnp.einsum("btv,btd->vd", rounded, wide), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(matrix=jnp.zeros((V, D + 1))), r"matrix has shape \(11, 7\); expected \(v, 6\)"),
        (dict(labels=jnp.zeros((B, 1), int)), "labels has shape"),
        (dict(counted=jnp.zeros((1, T), bool)), "counted has shape"),
        (dict(z_loss=-1.0), "z_loss=-1.0; expected at least 0"),
        (dict(piece=0), "piece=0; expected at least 1"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    names = ("x", "matrix", "labels", "counted")
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**dict(zip(names, draw(), strict=True)) | change)


def test_forward_mode_is_refused_and_forward_over_reverse_is_not():
    x, matrix, labels, counted = draw()

    def total(x):
        return linear_cross_entropy(x, matrix, labels, counted).total

    def plain(x):
        logits = Unprojected(x, matrix).logits
        losses = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
        return jnp.sum(losses, where=counted)

    with pytest.raises(TypeError, match="linear_cross_entropy has a backward pass.*`Unprojected.logits`"):
        jax.jit(jax.jacfwd(total)).lower(x)
    with pytest.raises(TypeError, match="the product of bfloat16 vectors"):
        jax.jit(jax.jacfwd(plain)).lower(x.astype(jnp.bfloat16))
    got, want = (jax.jit(lambda x, f=f: jax.jvp(jax.grad(f), (x,), (x,))[1])(x) for f in (total, plain))
    np.testing.assert_allclose(got, want, atol=1e-5)
