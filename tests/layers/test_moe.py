"""The mixture of experts: what its computations share, its auxiliary loss, and special cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.channel.glu import GLU, MLPConfig
from layers.channel.moe import SCORES, MoE, MoEConfig

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


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shared": 2, "shared_gate": True, "scores": "sigmoid", "scale": 2.5},
        {"top_k": 1, "normalize": False},
        {"top_k": 5, "normalize": False},
        {"bias": True, "gain": 1.702, "clamp": 7.0, "offset": 1.0},
        {"gated": False, "activation": "relu2", "bias": True},
        {"latent": 5},
    ],
)
def test_all_computations_agree_with_all_gradients(options):
    dense, *others = (gradients(make(compute=each, **options), X) for each in ("dense", "grouped", "picked"))
    assert np.abs(dense[1]).max() > 1e-2
    for other in others:
        for got, want in zip(jax.tree.leaves(other), jax.tree.leaves(dense), strict=True):
            assert np.abs(want).max() > 1e-3
            np.testing.assert_allclose(got, want, atol=1e-5)


def test_what_runs_depends_on_the_number_of_tokens():
    model = make(experts=16)
    chosen = [(tokens, model._compute(tokens, training=False)) for tokens in (1, 4, 5, 64, 65)]
    assert chosen == [(1, "picked"), (4, "picked"), (5, "dense"), (64, "dense"), (65, "grouped")]
    assert model._compute(1, training=True) == "grouped"
    assert make(experts=3)._compute(1, training=True) == "dense"
    assert make(compute="grouped")._compute(1, training=False) == "grouped"


def glu(x, gate, up, down):
    g, u, d = (np.asarray(v, np.float64) for v in (gate, up, down))
    hidden = x @ g
    return (hidden / (1 + np.exp(-hidden)) * (x @ u)) @ d


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    "options",
    [
        {"experts": 6},
        {"experts": 6, "scores": "sigmoid", "normalize": False, "scale": 1.5, "bias_rate": 0.1},
        {"experts": 6, "scores": "sigmoid", "groups": 3, "top_groups": 2, "top_k": 3, "bias_rate": 0.1},
        {"experts": 6, "groups": 2, "shared": 1, "shared_gate": True},
        {"experts": 6, "latent": 5, "shared": 1, "shared_gate": True},
    ],
)
def test_equals_the_equation(options):
    """Token by token and expert by expert; one bias is large enough to change what is chosen."""
    model = make(hidden=4, **options)
    config, bias = model.config, np.zeros(6)
    if model.bias is not None:
        bias = np.asarray([0.3, -0.2, 0.1, 0.0, -0.4, 0.2])
        model.bias[...] = jnp.asarray(bias, jnp.float32)
    want, changed = np.zeros(X.shape), 0
    for place in np.ndindex(X.shape[:2]):
        x = np.asarray(X[place], np.float64)
        logits = x @ np.asarray(model.router.kernel[...], np.float64)
        p = 1 / (1 + np.exp(-logits)) if config.scores == "sigmoid" else np.exp(logits) / np.exp(logits).sum()
        merits = np.sort((p + bias).reshape(config.groups, -1), axis=1)
        groups = np.argsort(-merits[:, -2:].sum(1))[: config.top_groups]
        open_experts = [e for e in range(6) if e // merits.shape[1] in groups]
        chosen = sorted(open_experts, key=lambda e: -(p[e] + bias[e]))[: config.top_k]
        changed += set(chosen) != set(np.argsort(-p)[: config.top_k])
        total = p[chosen].sum() if config.normalize else 1.0
        into, out = (np.eye(len(x)) if each is None else each.kernel[...] for each in (model.into, model.out))
        for e in chosen:
            y = glu(x @ np.asarray(into, np.float64), model.gate[e], model.up[e], model.down[e])
            want[place] += config.scale * p[e] / total * y @ np.asarray(out, np.float64)
        if config.shared:
            weight = 1 / (1 + np.exp(-x @ np.asarray(model.shared_gate.kernel[...], np.float64)))
            layers = (model.shared.gate, model.shared.up, model.shared.down)
            want[place] += weight * glu(x, *(layer.kernel[...] for layer in layers))
    assert changed > 0 or (config.groups == 1 and model.bias is None)
    np.testing.assert_allclose(model(X), want, atol=2e-6)


@pytest.mark.parametrize("tokens", [0, 1, 700])
def test_any_number_of_tokens(tokens):
    """From none to several large blocks an expert, whatever the load."""
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, tokens, WIDTH)), jnp.float32)
    model, other = make(compute="grouped"), make(compute="dense")
    for each in (model, other):
        each.router.kernel[...] *= jnp.asarray([[3.0, 2.0, 1.0, 0.5, 0.0]])
    np.testing.assert_allclose(model(x), other(x), atol=1e-5)


@pytest.mark.parametrize("compute", ["grouped", "dense", "picked"])
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


def test_with_sigmoids_the_balance_is_over_their_shares():
    model = make(balance=0.3, z_loss=0.0, scores="sigmoid")
    logits = np.asarray(X, np.float64).reshape(-1, WIDTH) @ np.asarray(model.router.kernel[...], np.float64)
    p = 1 / (1 + np.exp(-logits))
    chosen = np.argsort(-p, axis=-1)[:, :2]
    f = np.bincount(chosen.reshape(-1), minlength=5) / chosen.size
    want = 0.3 * 5 * f @ (p / p.sum(-1, keepdims=True)).mean(0)
    assert auxiliary(model, X) == pytest.approx(want, rel=1e-5)


def test_sigmoids_that_are_all_zero_weigh_nothing():
    model = make(balance=0.3, scores="sigmoid")
    model.router.kernel[...] = jnp.full_like(model.router.kernel[...], -1e3)
    (_, by_x), y = gradients(model, jnp.ones_like(X))
    assert not np.asarray(y).any()
    assert np.isfinite(by_x).all()
    assert np.isfinite(auxiliary(model, jnp.ones_like(X)))


def test_the_bias_moves_by_the_sign_of_the_load_in_training_alone():
    model = make(experts=4, top_k=1, normalize=False, bias_rate=0.25)
    model.router.kernel[...] = 50 * jnp.eye(WIDTH, 4)
    tokens = jnp.eye(4, WIDTH)[jnp.asarray([[0, 0, 0, 1, 2, 2, 3, 3]])]
    model(tokens)
    np.testing.assert_array_equal(model.bias[...], 0)
    model(tokens, key=KEY)
    np.testing.assert_array_equal(model.bias[...], [-0.25, 0.25, 0, 0])
    # Only two tokens are real, one each of the last two experts.
    model(tokens, mask=jnp.arange(8)[None] % 2 * (jnp.arange(8)[None] > 4) > 0, key=KEY)
    np.testing.assert_array_equal(model.bias[...], [0.0, 0.5, -0.25, -0.25])
    model(tokens, mask=jnp.zeros((1, 8), bool), key=KEY)
    np.testing.assert_array_equal(model.bias[...], [0.0, 0.5, -0.25, -0.25])


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_the_bias_brings_a_loaded_expert_back_to_its_share(scores):
    model = make(experts=4, bias_rate=0.02, scores=scores, top_k=1, normalize=False)
    x = jax.random.normal(jax.random.key(3), (1, 400, WIDTH)).at[..., 0].set(1.0)
    model.router.kernel[...] = model.router.kernel[...].at[0, 0].add(4.0)

    def loads():
        chosen = model._choose(SCORES[scores](x[0] @ model.router.kernel[...]))
        return np.bincount(np.asarray(chosen).reshape(-1), minlength=4) / 400

    assert loads().max() > 0.8
    for _ in range(60):
        model(x, key=KEY)
    assert loads().max() < 0.35


def test_the_bias_passes_no_gradient_and_weighs_nothing():
    """It decides who is chosen; the weights are those of the scores alone."""
    one, other = make(scores="sigmoid"), make(scores="sigmoid", bias_rate=1.0)
    other.bias[...] = jnp.full(5, 7.0)
    for got, want in zip(
        jax.tree.leaves(gradients(other, X)), jax.tree.leaves(gradients(one, X)), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=1e-6)


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
        ({"shared_gate": True}, "set shared to 1"),
        ({"scores": "tanh"}, "scores='tanh'; expected 'softmax' or 'sigmoid'"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"groups": 2}, "groups=2 cannot share experts=5"),
        ({"top_groups": 2}, "top_groups=2; expected 1 to groups=1"),
        ({"groups": 5, "top_k": 2}, "top_groups=1 leave 1 experts"),
        ({"bias_rate": -0.1}, "bias_rate=-0.1"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
