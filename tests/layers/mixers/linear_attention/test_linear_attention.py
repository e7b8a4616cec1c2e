"""Linear attention and the Performer against dense attention matrices in NumPy, and the Performer's random features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.mixers.linear_attention.linear_attention import LinearAttention, LinearAttentionConfig
from layers.mixers.linear_attention.performer import Performer, PerformerConfig, orthogonal_directions
from tests.layers.mixers.literal import apply, by_row, heads, stirred, wide

WIDTH, TIME = 8, 13
MIXERS = {
    "linear_attention": (LinearAttentionConfig, LinearAttention),
    "performer": (PerformerConfig, Performer),
}


def make(name, **options):
    config, module = MIXERS[name]
    return module(config(width=WIDTH, **{"heads": 2, **options}), rngs=nnx.Rngs(0))


def inputs(time=TIME):
    return jax.random.normal(jax.random.key(0), (2, time, WIDTH))


def features(name, model, q, k):
    """Features of queries and keys (t, h, m); those of the Performer as in the paper, without any shift."""
    if name == "linear_attention":
        return tuple(np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))) for x in (q, k))
    q, k = q / q.shape[-1] ** 0.25, k / k.shape[-1] ** 0.25
    return tuple(np.exp(x @ wide(model.directions).T - np.sum(x * x, -1, keepdims=True) / 2) for x in (q, k))


def literal(name, model, row):
    config = model.config
    q, k, v = (heads(apply(getattr(model, n), row), config.heads) for n in ("query", "key", "value"))
    q, k = features(name, model, q, k)
    n, m = np.indices((len(row), len(row)))
    weights = np.einsum("thk,shk->hts", q, k) * ((n >= m) | (not config.causal))
    o = np.einsum("hts,shv->thv", weights / weights.sum(-1, keepdims=True), v)
    return apply(model.output, o.reshape(len(row), -1))


@pytest.mark.sample(4)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("name", "options"),
    [("linear_attention", {"head_dim": 3}), ("performer", {"features": 10, "epsilon": 0.0})],
)
def test_equals_the_attention_matrix(name, options, causal):
    model, x = stirred(make(name, causal=causal, **options)), inputs()
    want = by_row(lambda row: literal(name, model, row), x)
    np.testing.assert_allclose(model(x)[0], want, atol=1e-5)


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", MIXERS)
def test_both_directions_within_segments_equal_the_sum_over_the_whole(name):
    model, x = make(name, causal=False), inputs()
    ids = jnp.ones((2, TIME), jnp.int32)
    np.testing.assert_allclose(model(x, segment_ids=ids)[0], model(x)[0], atol=2e-6)


@pytest.mark.parametrize("name", MIXERS)
def test_without_order_in_both_directions(name):
    model, x = make(name, causal=False), inputs()
    order = np.random.default_rng(0).permutation(TIME)
    np.testing.assert_allclose(model(x[:, order])[0], model(x)[0][:, order], atol=2e-6)


@pytest.mark.slow
def test_weights_are_those_of_softmax_with_many_features():
    """The estimate is good for queries and keys that are not long, and its error falls as the features grow."""
    x = 0.6 * inputs()

    def softmax(model, row):
        q, k, v = (heads(apply(getattr(model, n), row), 2) for n in ("query", "key", "value"))
        logits = np.einsum("thk,shk->hts", q, k) / np.sqrt(q.shape[-1])
        weights = np.tril(np.exp(logits))
        o = np.einsum("hts,shv->thv", weights / weights.sum(-1, keepdims=True), v)
        return apply(model.output, o.reshape(len(row), -1))

    errors = []
    for count in (16, 4096):
        model = make("performer", features=count)
        want = by_row(lambda row, model=model: softmax(model, row), x)
        errors.append(np.linalg.norm(model(x)[0] - want) / np.linalg.norm(want))
    assert errors[1] < 0.05
    assert errors[1] < errors[0] / 4


def test_directions_are_orthogonal_in_blocks_and_as_long_as_gaussian_vectors():
    size = 8
    directions = np.asarray(orthogonal_directions(jax.random.key(0), 2500, size), np.float64)
    assert directions.shape == (2500, size)
    unit = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    for block in (unit[:size], unit[size : 2 * size]):
        np.testing.assert_allclose(block @ block.T, np.eye(size), atol=1e-5)
    assert abs(unit[0] @ unit[size]) > 1e-3
    assert np.square(directions).sum(1).mean() == pytest.approx(size, rel=0.05)
    assert np.square(directions).sum(1).var() == pytest.approx(2 * size, rel=0.15)
    # The first entry of a uniform direction is as often positive as negative.
    assert np.abs(np.sign(unit).mean(0)).max() < 0.08


@pytest.mark.slow
def test_orthogonal_features_estimate_the_kernel_without_bias():
    size, count = 8, 8
    q, k = 0.4 * jax.random.normal(jax.random.key(1), (2, size))

    def estimate(directions):
        features = jnp.exp(
            jnp.stack([q, k]) @ directions.T - jnp.square(jnp.stack([q, k])).sum(1)[:, None] / 2
        )
        return (features[0] * features[1]).mean()

    keys = jax.random.split(jax.random.key(2), 3000)
    ours = jax.vmap(lambda key: estimate(orthogonal_directions(key, count, size)))(keys)
    assert float(ours.mean()) == pytest.approx(float(jnp.exp(q @ k)), rel=0.06)


def test_large_keys_stay_finite():
    model = make("performer", features=32)
    y, _ = model(1e3 * inputs())
    assert np.isfinite(y).all()


def test_directions_are_saved_but_not_trained():
    model = make("performer")
    assert not any("directions" in path for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param)))
    assert any("directions" in path for path, _ in nnx.to_flat_state(nnx.state(model)))


def test_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="features=0"):
        PerformerConfig(width=8, heads=2, features=0)
    with pytest.raises(ValueError, match="epsilon=-1"):
        PerformerConfig(width=8, heads=2, epsilon=-1.0)
    with pytest.raises(ValueError, match="heads=3"):
        LinearAttentionConfig(width=8, heads=3)
    with pytest.raises(ValueError, match="LinearAttention is not causal"):
        make("linear_attention", causal=False).init_state(2)
