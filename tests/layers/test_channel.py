"""Channel mixers against their equations in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import expit

from layers.channel import CHANNEL_MIXERS, make_channel_mixer
from layers.dropout import dropout

X = np.random.default_rng(0).standard_normal((2, 5, 6)).astype(np.float32)

# What a memory takes to compile is left to the slow tests.
MEMORIES = ("product_key", "ultra_memory")
# Few keys of many, so that it matters in which order they are.
SMALL = {"ultra_memory": {"keys": 20, "heads": 2, "top_k": 3, "rank": 3, "key_dim": 8}}
by_name = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in MEMORIES)) for name in CHANNEL_MIXERS],
)


def make(name, **options):
    return make_channel_mixer(name, options, given={"width": 6, "dtype": jnp.float32}, rngs=nnx.Rngs(0))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x * expit(x)


def apply(layer, x):
    y = x @ np.asarray(layer.kernel[...], np.float64)
    return y if layer.bias is None else y + np.asarray(layer.bias[...])


def literal(name, m, x):
    match name:
        case "mlp":
            return apply(m.down, gelu(apply(m.up, x)))
        case "swiglu":
            return apply(m.down, silu(apply(m.gate, x)) * apply(m.up, x))
        case "geglu":
            return apply(m.down, gelu(apply(m.gate, x)) * apply(m.up, x))
        case "gelu":
            return gelu(x)
        case "half_glu1":
            return gelu(x) * expit(apply(m.gate, gelu(x)))
        case "half_glu2":
            return x * expit(apply(m.gate, gelu(x)))
        case "full_glu":
            return apply(m.value, gelu(x)) * expit(apply(m.gate, gelu(x)))
        case "product_key":
            return np.stack([[remembered(m, token) for token in row] for row in x])
        case "ultra_memory":
            return np.stack([[recalled(m, token) for token in row] for row in x])
        case "moe":
            return np.stack([[mixture(m, token) for token in row] for row in x])


def remembered(m, x):
    """The best of all pairs of keys, one by one."""
    config, y = m.config, 0
    keys, values = (np.asarray(v[...], np.float64) for v in (m.keys, m.values))
    for q, (first, second) in zip(apply(m.query, x).reshape(config.heads, -1), keys, strict=True):
        q = (q - q.mean()) / np.sqrt(q.var() + config.epsilon)
        q = np.split(q * np.asarray(m.norm.scale[...]) + np.asarray(m.norm.bias[...]), 2)
        scores = ((first @ q[0])[:, None] + (second @ q[1])[None]).reshape(-1)
        best = np.argsort(-scores)[: config.top_k]
        weights = np.exp(scores[best] - scores[best].max())
        y = y + weights @ values[best] / weights.sum()
    return y


def recalled(m, x):
    """The best pairs of the keys that the largest singular value rates best, one by one."""
    config, total = m.config, np.zeros(m.config.value_dim)
    keys, grids, values, gates = (
        np.asarray(v[...], np.float64) for v in (m.keys, m.grids, m.values, m.gates)
    )

    def norm(scale, v):
        return (
            v / np.sqrt((v**2).mean(-1, keepdims=True) + config.epsilon) * np.asarray(scale[...], np.float64)
        )

    queries = norm(m.query_norm.scale, apply(m.query, x).reshape(config.heads, 2, config.key_dim))
    for h in range(config.heads):
        scores = np.einsum("sk,snrk->snr", queries[h], norm(m.key_norm.scale, keys[h]))
        left, _, right = np.linalg.svd(grids[:, h].sum(0))
        both = np.stack([left[:, 0], right[0]])
        lists = np.einsum("snr,sr->sn", scores, both * np.sign(both.sum()))
        found = {}
        for i in np.argsort(-lists[0])[: config.top_k]:
            for j in np.argsort(-lists[1])[: config.top_k]:
                found[i, j] = [scores[0, i] @ grid @ scores[1, j] for grid in grids[:, h]]
        for i, j in sorted(found, key=lambda pair: -sum(found[pair]))[: config.top_k]:
            value = values[i * config.keys + j].reshape(config.parts, -1)
            gate = gates[i * config.keys + j] @ apply(m.gate, x)
            total += (np.array(found[i, j])[:, None] * gate * value).reshape(-1)
    return apply(m.output, total)


def mixture(m, x):
    logits = x @ np.asarray(m.router.kernel[...], np.float64)
    p = np.exp(logits) / np.exp(logits).sum()
    chosen = np.argsort(-p)[: m.config.top_k]
    gate, up, down = (np.asarray(v[...], np.float64) for v in (m.gate, m.up, m.down))
    outputs = [p[e] * (silu(x @ gate[e]) * (x @ up[e])) @ down[e] for e in chosen]
    return sum(outputs) / p[chosen].sum()


@by_name
def test_equals_the_equation(name):
    mixer = make(name, **SMALL.get(name, {}))
    for _, variable in nnx.to_flat_state(nnx.state(mixer, nnx.Param)):
        if variable.ndim == 1:
            variable[...] = jnp.linspace(-1, 1, variable.shape[0])
    np.testing.assert_allclose(mixer(jnp.asarray(X)), literal(name, mixer, X.astype(np.float64)), atol=1e-5)


@pytest.mark.slow
def test_a_memory_sums_its_heads_in_float32():
    # In bfloat16 256 + 1 is 256.
    layer = make("product_key", heads=300, key_dim=2, keys=2, top_k=1, dtype="bfloat16")
    layer.values[...] = jnp.ones_like(layer.values[...])
    assert (np.asarray(layer(jnp.asarray(X)), np.float32) == 300).all()


@by_name
def test_dropout_acts_with_a_key_only(name):
    mixer = make(name, dropout=0.5)
    x = jnp.asarray(X)
    np.testing.assert_array_equal(mixer(x), make(name)(x))
    one, two = (mixer(x, key=jax.random.key(seed)) for seed in (0, 1))
    assert not np.array_equal(one, two)
    np.testing.assert_array_equal(one, mixer(x, key=jax.random.key(0)))


def test_hidden_sizes():
    assert make("mlp").up.kernel.shape == (6, 24)
    assert make("swiglu").up.kernel.shape == (6, 16)
    assert make("swiglu", hidden=10).down.kernel.shape == (10, 6)


def test_dropout_keeps_the_mean_and_shares_draws_along_named_axes():
    x = jnp.ones((50, 40, 30))
    y = dropout(x, 0.3, jax.random.key(0))
    assert float(y.mean()) == pytest.approx(1.0, abs=0.01)
    assert set(np.unique(y).round(4)) == {0.0, np.float32(1 / 0.7).round(4)}
    tied = np.asarray(dropout(x, 0.3, jax.random.key(0), shared_axes=(1,)))
    assert (tied == tied[:, :1]).all()
    assert (tied == 0).any()


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="did you mean 'swiglu'"):
        make("swglu")
    with pytest.raises(ValueError, match="did you mean 'hidden'"):
        make("mlp", hiden=4)
    with pytest.raises(ValueError, match="unknown activation"):
        make("mlp", activation="gellu")
