"""WERSA against its equations in NumPy, the Haar transform among them, and its special cases."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.mixers.token_mixing.wersa import WERSA, WERSAConfig
from tests.layers.mixers.literal import apply, heads, sigmoid, wide

WIDTH, TIME, LEVELS = 6, 13, 2
X = np.random.default_rng(0).standard_normal((2, TIME, WIDTH)).astype(np.float32)


def make(**options):
    options = {"heads": 2, "levels": LEVELS, "features": 7, **options}
    model = WERSA(WERSAConfig(WIDTH, **options), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    for variable in (model.scales, model.log_bandwidth, model.inner.bias, model.outer.bias):
        variable[...] += jnp.asarray(0.5 * rng.standard_normal(variable.shape), jnp.float32)
    return model


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gates_of(model, mean):
    """(h, L + 1) from a mean query (h, k)."""
    return wide(model.scales) * sigmoid(apply(model.outer, gelu(apply(model.inner, mean))))


def haar(u, gates):
    """The orthonormal Haar transform of u (t, k), its levels weighted (the coarse rest first), and its inverse."""
    rest = np.pad(u, ((0, -len(u) % 2**LEVELS), (0, 0)))
    details = []
    for _ in range(LEVELS):
        details.append((rest[::2] - rest[1::2]) / np.sqrt(2))
        rest = (rest[::2] + rest[1::2]) / np.sqrt(2)
    rest = gates[0] * rest
    for level in range(LEVELS, 0, -1):
        detail = gates[level] * details[level - 1]
        rest = np.stack([rest + detail, rest - detail], 1).reshape(-1, u.shape[1]) / np.sqrt(2)
    return rest[: len(u)]


def trailing(u, gates):
    """The same with means over the last 2^l inputs at every step, and gates (t, L + 1)."""
    averages = [
        np.stack([u[max(0, t - 2**level + 1) : t + 1].sum(0) / 2**level for t in range(len(u))])
        for level in range(LEVELS + 1)
    ]
    y = gates[:, :1] * averages[-1]
    return y + sum(
        gates[:, level : level + 1] * (averages[level - 1] - averages[level])
        for level in range(1, LEVELS + 1)
    )


def literal(model, x):
    config = model.config
    q, k, v = (heads(apply(m, x), config.heads) for m in (model.query, model.key, model.value))
    if config.causal:
        gates = np.stack([gates_of(model, q[: t + 1].mean(0)) for t in range(len(x))])
    else:
        gates = gates_of(model, q.mean(0))
    beta = np.exp(wide(model.log_bandwidth)) * config.size**-0.25
    outputs = []
    for head in range(config.heads):
        phi = []
        for u in (q, k):
            u = beta[head] * (
                trailing(u[:, head], gates[:, head]) if config.causal else haar(u[:, head], gates[head])
            )
            exponent = u @ wide(model.directions).T - np.square(u).sum(-1, keepdims=True) / 2
            if len(phi) == 0:
                exponent -= exponent.max(-1, keepdims=True)
            phi.append(np.exp(exponent) + config.epsilon)
        weights = phi[0] @ phi[1].T
        if config.causal:
            weights = np.tril(weights)
        outputs.append(weights @ v[:, head] / weights.sum(-1, keepdims=True))
    return apply(model.output, np.concatenate(outputs, axis=1))


@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_equation(causal):
    model = make(causal=causal)
    got, _ = model(jnp.asarray(X))
    want = np.stack([literal(model, row.astype(np.float64)) for row in X])
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_without_weights_on_scales_the_wavelets_do_nothing(causal):
    """Gates of one at every scale: as with one level or with three."""
    outputs = []
    for levels in (1, 3):
        model = make(levels=levels, causal=causal)
        model.log_bandwidth[...] = jnp.zeros(2)
        model.outer.kernel[...] = jnp.zeros_like(model.outer.kernel[...])
        model.outer.bias[...] = jnp.full(levels + 1, 40.0)
        model.scales[...] = jnp.ones((2, levels + 1))
        other = make(levels=1, causal=causal)
        for name in ("query", "key", "value", "output"):
            getattr(model, name).kernel[...] = getattr(other, name).kernel[...]
        model.directions[...] = other.directions[...]
        outputs.append(model(jnp.asarray(X))[0])
    np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-5)


def test_many_features_estimate_softmax_attention():
    model = WERSA(WERSAConfig(WIDTH, heads=2, levels=1, features=20_000), rngs=nnx.Rngs(0))
    model.outer.bias[...] = jnp.full(2, 40.0)
    x = 0.5 * X.astype(np.float64)
    q, k, v = (heads(apply(m, x[0]), 2) for m in (model.query, model.key, model.value))
    logits = np.einsum("thk,shk->hts", q, k) / np.sqrt(3)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    want = apply(model.output, np.einsum("hts,shk->thk", weights, v).reshape(TIME, WIDTH))
    np.testing.assert_allclose(model(jnp.asarray(x, jnp.float32))[0][0], want, atol=0.02)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"heads": 4}, "heads=4 cannot share"),
        ({"levels": 0}, "levels=0"),
        ({"features": 0}, "features=0"),
        ({"epsilon": -1.0}, "epsilon=-1.0"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
