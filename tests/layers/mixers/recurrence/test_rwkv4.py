"""RWKV-4 against its sum over the past in NumPy, its initialisation by layer, and its safety with large keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.mixers.recurrence.rwkv4 import EMPTY, RWKV4, RWKV4Config, WKVState, wkv
from layers.parts.token_shift import token_shift
from tests.layers.mixers.literal import apply, by_row, sigmoid, wide

WIDTH, TIME = 6, 17


def averages(keys, values, log_decay, bonus):
    """The quadratic sum, every weight relative to the largest of its row."""
    outputs = np.zeros_like(values)
    for t in range(len(keys)):
        age = t - 1 - np.arange(t)[:, None]
        logs = np.concatenate([keys[:t] + age * log_decay, keys[t : t + 1] + bonus])
        weights = np.exp(logs - logs.max(0))
        outputs[t] = (weights * values[: t + 1]).sum(0) / weights.sum(0)
    return outputs


def literal(model, row):
    before = np.concatenate([np.zeros((1, row.shape[1])), row[:-1]])
    mixed = [mu * row + (1 - mu) * before for mu in wide(model.mixing)]
    average = averages(
        apply(model.key, mixed[0]),
        apply(model.value, mixed[1]),
        -np.exp(wide(model.log_rate)),
        wide(model.bonus),
    )
    return apply(model.output, sigmoid(apply(model.receptance, mixed[2])) * average)


def test_equals_the_equation():
    model = RWKV4(RWKV4Config(width=WIDTH, zero_init=False, layer=1, depth=3), rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).standard_normal((2, TIME, WIDTH)).astype(np.float32)
    got, _ = jax.jit(model)(jnp.asarray(x))
    np.testing.assert_allclose(got, by_row(lambda row: literal(model, row), x), atol=2e-6)


def nothing(width):
    return WKVState(jnp.zeros((1, width)), jnp.zeros((1, width)), jnp.full((1, width), EMPTY))


@pytest.mark.parametrize("scale", [1.0, 50.0, 1000.0])
def test_keys_of_any_size_are_safe(scale):
    """Values and all gradients are those of the sum in float64 where exponentials of keys leave the range of numbers."""
    rng = np.random.default_rng(0)
    keys = scale * rng.uniform(-1, 1, (TIME, WIDTH)).astype(np.float32)
    values = rng.standard_normal((TIME, WIDTH)).astype(np.float32)
    log_decay, bonus = -np.exp(np.linspace(-6, 3, WIDTH)), rng.standard_normal(WIDTH)
    want = averages(*(v.astype(np.float64) for v in (keys, values)), log_decay, bonus)

    @jax.jit
    def run(keys, values, log_decay, bonus):
        return wkv(keys[None], values[None], log_decay, bonus, nothing(WIDTH))[0][0]

    arguments = tuple(jnp.asarray(v, jnp.float32) for v in (keys, values, log_decay, bonus))
    np.testing.assert_allclose(run(*arguments), want, atol=2e-6 * max(1.0, scale))
    gradients = jax.jit(jax.grad(lambda *v: jnp.square(run(*v)).sum(), argnums=(0, 1, 2, 3)))(*arguments)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_gradients_are_those_of_the_quadratic_sum():
    rng = np.random.default_rng(1)
    arguments = [jnp.asarray(rng.standard_normal((TIME, WIDTH)), jnp.float32) for _ in range(2)]
    arguments += [
        -jnp.exp(jnp.linspace(-3.0, 1.0, WIDTH)),
        jnp.asarray(rng.standard_normal(WIDTH), jnp.float32),
    ]
    age = (jnp.arange(TIME)[:, None] - 1 - jnp.arange(TIME)[None]).astype(jnp.float32)[..., None]

    def direct(keys, values, log_decay, bonus):
        logs = jnp.where(age >= 0, keys[None] + age * log_decay[None, None], -jnp.inf)
        logs = jnp.where(age == -1, (keys + bonus[None])[None], logs)
        return jnp.einsum("tsd,sd->td", jax.nn.softmax(logs, axis=1), values)

    def ours(keys, values, log_decay, bonus):
        return wkv(keys[None], values[None], log_decay, bonus, nothing(WIDTH))[0][0]

    weights = jnp.asarray(rng.standard_normal((TIME, WIDTH)), jnp.float32)
    want, got = (
        jax.jit(jax.grad(lambda *v, f=f: (f(*v) * weights).sum(), argnums=(0, 1, 2, 3)))(*arguments)
        for f in (direct, ours)
    )
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_initial_values_follow_channel_and_layer_as_in_the_authors_code():
    first, last = (RWKV4(RWKV4Config(width=5, layer=layer, depth=4), rngs=nnx.Rngs(0)) for layer in (0, 3))
    ramp = np.arange(5) / 4
    np.testing.assert_allclose(first.log_rate[...], -5 + 8 * ramp**0.7, rtol=1e-5)
    np.testing.assert_allclose(last.log_rate[...], -5 + 8 * ramp**2.0, rtol=1e-5)
    np.testing.assert_allclose(last.bonus[...], np.log(0.3) + np.array([0, 0.5, -0.5, 0, 0.5]), rtol=1e-5)
    share = np.arange(5) / 5
    np.testing.assert_allclose(first.mixing[...], [share, share, share**0.5], rtol=1e-5)
    np.testing.assert_allclose(last.mixing[...], [share**0.25, share**0.25 + 0.3, share**0.125], rtol=1e-5)
    for layer in (first.key, first.receptance, first.output):
        np.testing.assert_array_equal(layer.kernel[...], 0)
    value = wide(first.value.kernel)
    np.testing.assert_allclose(value @ value.T, np.eye(5), atol=1e-6)


def test_token_shift_passes_over_padding_and_stops_at_borders():
    x = jnp.arange(1.0, 8.0)[None, :, None]
    previous, last = token_shift(
        x, jnp.full((1, 1, 1), 9.0), segment_ids=jnp.asarray([[1, 0, 1, 2, 2, 0, 2]])
    )
    np.testing.assert_array_equal(previous[0, :, 0], [9, 0, 1, 0, 4, 0, 5])
    np.testing.assert_array_equal(last, 7)


def test_impossible_options_are_refused():
    with pytest.raises(ValueError, match="layer=2, depth=2"):
        RWKV4Config(width=4, layer=2, depth=2)
