"""MEGA against its equations in NumPy, its moving average in both forms, its chunks, and its initialisation."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.mixers.attention.mega import Mega, MegaConfig, laplace
from layers.parts.moving_average import MovingAverage
from tests.layers.mixers.literal import apply, by_row, sigmoid, silu, wide

WIDTH, TIME = 4, 11


def scrambled(module):
    """The module with parameters that no initialisation gives, so that none of them is idle."""
    rng = np.random.default_rng(5)
    for _, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        variable[...] = jnp.asarray(0.5 * rng.standard_normal(variable.shape), jnp.float32)
    return module


def make(**options):
    return scrambled(Mega(MegaConfig(width=WIDTH, key_dim=6, averages=3, **options), rngs=nnx.Rngs(0)))


def inputs(time=TIME):
    return np.random.default_rng(0).standard_normal((2, time, WIDTH)).astype(np.float32)


def average(module, row):
    """Step by step; both directions include the token itself."""
    alpha, delta, beta, eta = (wide(getattr(module, name)) for name in ("alpha", "delta", "beta", "eta"))
    alpha, delta = sigmoid(alpha), sigmoid(delta)
    total = wide(module.omega) * row
    for side in range(len(alpha)):
        h = np.zeros(alpha.shape[1:])
        for t in range(len(row)) if side == 0 else reversed(range(len(row))):
            h = (1 - alpha[side] * delta[side]) * h + alpha[side] * beta[side] * row[t][:, None]
            total[t] += (eta[side] * h).sum(1) / np.sqrt(alpha.shape[2])
    return silu(total)


def authors_average(weights, x):
    """The bidirectional average of the authors' code, from its weights; x is (t, d).

    Both kernels are laid out on lags -(t - 1) .. t - 1, and lag 0 belongs to both.
    """
    delta, alpha, beta, gamma, omega = (
        weights[name] for name in ("delta", "alpha", "beta", "gamma", "omega")
    )
    time, width = x.shape
    p = sigmoid(delta)
    q = 1 - p * sigmoid(alpha)
    powers = np.exp(np.arange(time)[None, None] * np.log(q)) * p * beta  # (2 d, n, t)
    kernel = np.einsum("dnl,dn->dl", powers, gamma * np.sqrt(1 / gamma.shape[1]))
    first, second = kernel[:width], kernel[width:]
    both = np.pad(first, ((0, 0), (time - 1, 0))) + np.pad(second[:, ::-1], ((0, 0), (0, time - 1)))
    out = np.stack([sum(both[:, t - s + time - 1] * x[s] for s in range(time)) for t in range(time)])
    return silu(out + omega * x)


def test_the_authors_weights_load_unchanged():
    rng, averages = np.random.default_rng(3), 3
    shapes = dict.fromkeys(("delta", "alpha", "beta"), (2 * WIDTH, averages, 1))
    shapes |= {"gamma": (2 * WIDTH, averages), "omega": (WIDTH,)}
    weights = {name: 0.5 * rng.standard_normal(shape) for name, shape in shapes.items()}
    module = MovingAverage(WIDTH, averages, bidirectional=True, rngs=nnx.Rngs(0))
    # The paper calls alpha what the code calls delta.
    for ours, theirs in {"alpha": "delta", "delta": "alpha", "beta": "beta", "eta": "gamma"}.items():
        value = weights[theirs].reshape(2, WIDTH, averages)
        getattr(module, ours)[...] = jnp.asarray(value, jnp.float32)
    module.omega[...] = jnp.asarray(weights["omega"], jnp.float32)
    got, _ = module(jnp.asarray(inputs()))
    want = np.stack([authors_average(weights, row.astype(np.float64)) for row in inputs()])
    np.testing.assert_allclose(got, want, atol=2e-6)


def literal(model, row):
    config, time = model.config, len(row)
    m = average(model.average, row)
    u, z, r, c = np.split(apply(model.mixed, m), np.cumsum([WIDTH, config.key_dim, config.values]), axis=1)
    q, k = (gamma * silu(z) + beta for gamma, beta in zip(wide(model.gamma), wide(model.beta), strict=True))
    i, j = np.indices((time, time))
    seen = np.ones((time, time), bool) if config.bidirectional else j <= i
    if config.chunk is not None:
        seen &= i // config.chunk == j // config.chunk
    if config.position_bias == "simple":
        table = np.concatenate([wide(model.bias), np.zeros(2 * time)])
        bias = table[np.where(seen, i - j + (config.reach - 1 if config.bidirectional else 0), -1)]
    else:
        half = config.key_dim // 2
        turn = np.exp(1j * np.arange(time)[:, None] * 10_000.0 ** (-np.arange(half) / half))
        query, key = ((v[:half] + 1j * v[half:]) * turn for v in wide(model.bias))
        bias = (query @ key.conj().T).real
    if config.attention == "softmax":
        logits = np.where(seen, q @ k.T / np.sqrt(config.key_dim) + bias, -np.inf)
        weights = np.exp(logits - logits.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
    else:
        logits = q @ k.T / seen.sum(1, keepdims=True) + bias
        weights = (
            seen
            * 0.5
            * (1 + np.vectorize(math.erf)((logits - np.sqrt(0.5)) / (np.sqrt(1 / (4 * np.pi)) * np.sqrt(2))))
        )
    o = weights @ silu(apply(model.value, row))
    candidate = silu(c + apply(model.output, silu(r) * o))
    return sigmoid(u) * (candidate - row)


@pytest.mark.sample(5)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention": "laplace", "position_bias": "simple", "max_length": 14, "value_dim": 5},
        {"attention": "laplace", "chunk": 4},
        {"chunk": 3, "position_bias": "simple", "bidirectional": True},
        {"attention": "laplace", "bidirectional": True},
    ],
)
def test_equals_the_equation(options):
    model = make(**options)
    got, _ = jax.jit(model)(jnp.asarray(inputs()))
    np.testing.assert_allclose(got, by_row(lambda row: literal(model, row), inputs()), rtol=1e-4, atol=5e-6)


def test_average_as_convolution_and_as_recurrence():
    module = scrambled(MovingAverage(WIDTH, 3, rngs=nnx.Rngs(0)))
    x = jnp.asarray(inputs(150))
    # Slow averages too, which reach over the whole sequence.
    module.delta[...] = jnp.linspace(-9, 2, module.delta.size).reshape(module.delta.shape)
    convolved, none = module(x)
    recurrent, h = module(x, module.init_state(2))
    assert none is None
    assert h.shape == (2, WIDTH, 3)
    np.testing.assert_allclose(convolved, recurrent, atol=1e-5)
    np.testing.assert_allclose(convolved, by_row(lambda row: average(module, row), x), atol=1e-5)


@pytest.mark.slow
def test_one_chunk_is_no_chunk():
    model = make(attention="laplace")
    chunked = make(attention="laplace", chunk=TIME)
    np.testing.assert_allclose(chunked(jnp.asarray(inputs()))[0], model(jnp.asarray(inputs()))[0], atol=1e-6)


@pytest.mark.slow
def test_a_chunk_keeps_the_state_finite_for_any_length():
    model = make(chunk=4)
    state = model.init_state(2)
    assert state.carried.cache.entries[0].shape == (2, 4, 6)
    want, _ = model(jnp.asarray(inputs(30)))
    run, outputs = jax.jit(lambda x, state: model(x, state)), []
    # The first call is longer than a chunk: it is run a chunk at a time.
    for piece in jnp.split(jnp.asarray(inputs(30)), [10, 20], axis=1):
        y, state = run(piece, state)
        outputs.append(y)
    np.testing.assert_allclose(jnp.concatenate(outputs, 1), want, atol=5e-6)
    with pytest.raises(ValueError, match="max_length"):
        make().init_state(2)


@pytest.mark.slow
def test_tokens_beyond_the_cache_or_the_table_are_nan_and_the_others_right():
    model = make()
    want, _ = model(jnp.asarray(inputs()))
    got, _ = model(jnp.asarray(inputs()), model.init_state(2, max_length=7))
    np.testing.assert_allclose(got[:, :7], want[:, :7], atol=5e-6)
    assert np.isnan(got[:, 7:]).all()
    short, _ = make(position_bias="simple", max_length=7)(jnp.asarray(inputs()))
    assert np.isfinite(short[:, :7]).all()
    assert np.isnan(short[:, 7:]).all()


def test_laplace_has_the_stated_values():
    got = laplace(jnp.asarray([0.0, np.sqrt(0.5), 10.0]))
    np.testing.assert_allclose(got, [0.00609, 0.5, 1.0], atol=1e-5)
    # It was chosen to meet the squared ReLU in value and slope at sqrt(1/2).
    assert jax.grad(laplace)(jnp.float32(np.sqrt(0.5))) == pytest.approx(np.sqrt(2), rel=1e-5)


def test_initial_values_are_those_of_the_authors():
    model = Mega(MegaConfig(width=200), rngs=nnx.Rngs(0))
    beta = wide(model.average.beta)[0]
    np.testing.assert_allclose(beta.mean(0), np.resize([1, -1], 16), atol=0.01)
    assert beta[:, 0].std() == pytest.approx(0.02, rel=0.2)
    for parameter, scale in (
        (model.average.alpha, 0.2),
        (model.average.delta, 0.2),
        (model.average.eta, 1.0),
        (model.average.omega, 1.0),
        (model.mixed.kernel, 0.02),
        (model.value.kernel, 0.02),
        (model.output.kernel, 0.02),
        (model.gamma, 0.02),
    ):
        assert wide(parameter).std() == pytest.approx(scale, rel=0.15)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"chunk": 0}, "chunk=0"),
        ({"attention": "relu"}, "attention='relu'"),
        ({"position_bias": "none"}, "position_bias='none'"),
        ({"key_dim": 3}, "key_dim=3 is odd"),
        ({"position_bias": "simple"}, "max_length=None"),
        ({"position_bias": "rotary", "max_length": 5}, "max_length=5"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MegaConfig(width=WIDTH, **options)
