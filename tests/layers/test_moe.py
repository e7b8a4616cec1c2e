"""The mixture of experts: what its two computations share, its auxiliary loss, and special cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.channel.glu import GLU, MLPConfig
from layers.channel.moe import MoE, MoEConfig

WIDTH = 6
X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 7, WIDTH)), jnp.float32)
KEY = jax.random.key(0)


def make(**options):
    return MoE(MoEConfig(WIDTH, **{"experts": 5, **options}), rngs=nnx.Rngs(1))


def gradients(model, x):
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def run(params, x):
        def loss(params, x):
            y = nnx.merge(graph, params, rest, copy=True)(x)
            return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)), y

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    return run(params, x)


@pytest.mark.parametrize(
    "options", [{}, {"shared": 2}, {"top_k": 1, "normalize": False}, {"top_k": 5, "normalize": False}]
)
def test_grouped_equals_dense_with_all_gradients(options):
    one, other = (gradients(make(compute=compute, **options), X) for compute in ("grouped", "dense"))
    assert np.abs(one[1]).max() > 1e-2
    for got, want in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.abs(want).max() > 1e-3
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("tokens", [0, 1, 700])
def test_any_number_of_tokens(tokens):
    """From none to several large blocks an expert, whatever the load."""
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, tokens, WIDTH)), jnp.float32)
    model, other = make(compute="grouped"), make(compute="dense")
    for each in (model, other):
        each.router.kernel[...] *= jnp.asarray([[3.0, 2.0, 1.0, 0.5, 0.0]])
    np.testing.assert_allclose(model(x), other(x), atol=1e-5)


@pytest.mark.parametrize("compute", ["grouped", "dense"])
def test_equal_experts_are_one_dense_layer(compute):
    model = make(compute=compute, hidden=8)
    dense = GLU(MLPConfig(WIDTH, hidden=8), rngs=nnx.Rngs(2))
    for name in ("gate", "up", "down"):
        getattr(model, name)[...] = jnp.tile(getattr(dense, name).kernel[...][None], (5, 1, 1))
    np.testing.assert_allclose(model(X), dense(X), atol=1e-5)


def test_no_token_is_dropped_when_all_choose_the_same_experts():
    model = make(compute="grouped")
    x = jnp.tile(X[:1, :1], (2, 7, 1))
    y = model(x)
    np.testing.assert_allclose(y, jnp.tile(model(x[:1, :1]), (2, 7, 1)), atol=1e-6)


def auxiliary(model, x, **arguments):
    model(x, key=KEY, **arguments)
    return float(model.auxiliary[...])


def test_the_auxiliary_loss_is_the_equation_over_real_tokens():
    model = make(balance=0.3, z_loss=0.2)
    mask = np.arange(7)[None] < np.array([[7], [3]])
    logits = np.asarray(X, np.float64)[mask] @ np.asarray(model.router.kernel[...], np.float64)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.argsort(-p, axis=-1)[:, :2]
    f = np.bincount(chosen.reshape(-1), minlength=5) / chosen.size
    z = np.square(np.log(np.exp(logits).sum(-1))).mean()
    want = 0.3 * 5 * f @ p.mean(0) + 0.2 * z
    assert auxiliary(model, X, mask=jnp.asarray(mask)) == pytest.approx(want, rel=1e-5)
    poisoned = jnp.where(jnp.asarray(mask)[..., None], X, 1e3)
    assert auxiliary(model, poisoned, mask=jnp.asarray(mask)) == pytest.approx(want, rel=1e-5)
    assert auxiliary(model, X) != pytest.approx(want, rel=1e-3)


def test_the_balance_is_the_coefficient_when_even_and_the_number_of_experts_when_one_takes_all():
    model = make(experts=4, top_k=1, normalize=False, balance=0.5, z_loss=0.0)
    model.router.kernel[...] = 50 * jnp.eye(WIDTH, 4)
    even = jnp.eye(4, WIDTH)[None]
    assert auxiliary(model, even) == pytest.approx(0.5, rel=1e-5)
    assert auxiliary(model, jnp.tile(even[:, :1], (1, 4, 1))) == pytest.approx(0.5 * 4, rel=1e-5)


def test_inference_writes_no_auxiliary_loss():
    model = make()
    model(X)
    assert float(model.auxiliary[...]) == 0.0


def test_bfloat16_activations_choose_in_float32():
    got = make(dtype=jnp.bfloat16, shared=1)(X.astype(jnp.bfloat16))
    want = make(shared=1)(X.astype(jnp.bfloat16).astype(jnp.float32))
    assert got.dtype == jnp.bfloat16
    error = np.linalg.norm(np.asarray(got, np.float32) - want) / np.linalg.norm(want)
    assert error < 2e-2


@pytest.mark.parametrize(
    "options, message",
    [
        ({"top_k": 6}, "top_k=6; expected 1 to experts=5"),
        ({"top_k": 1}, "top_k=1 with normalize=True.*set normalize=False"),
        ({"shared": -1}, "shared=-1"),
        ({"balance": -1.0}, "balance=-1.0"),
        ({"compute": "sparse"}, "compute='sparse'"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
