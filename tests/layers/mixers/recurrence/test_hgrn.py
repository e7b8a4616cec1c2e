"""HGRN against its equation in NumPy, and its lower bounds by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.mixers.recurrence.hgrn import HGRN, HGRNConfig, _angles
from tests.layers.mixers.literal import apply, by_row, rms, sigmoid, silu, wide

WIDTH, TIME = 6, 17


def make(**options):
    return HGRN(HGRNConfig(width=WIDTH, **options), rngs=nnx.Rngs(0))


def inputs():
    return np.random.default_rng(0).standard_normal((2, TIME, WIDTH)).astype(np.float32)


def literal(model, row):
    """One step at a time in complex128."""
    config = model.config
    bound = sigmoid(wide(model.bound_logit)) if config.layer else 0.0
    decay = bound + (1 - bound) * sigmoid(apply(model.forget, row))
    c = silu(apply(model.input, row))
    turn = 1.0
    if config.state == "complex":
        c, turn = c[:, 0::2] + 1j * c[:, 1::2], np.exp(1j * wide(model.theta))
    h, states = np.zeros(WIDTH, complex), []
    for t in range(len(row)):
        h = decay[t] * turn * h + (1 - decay[t]) * c[t]
        states.append(h)
    features = np.stack(states)
    features = (
        np.concatenate([features.real, features.imag], axis=1) if config.state == "complex" else features.real
    )
    if config.norm == "layer_norm":
        features = features - features.mean(1, keepdims=True)
    features = rms(features, 1e-5) * wide(model.norm.scale)
    if config.norm == "layer_norm":
        features = features + wide(model.norm.bias)
    return apply(model.output, features * silu(apply(model.gate, row)))


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layer": 2, "depth": 3},
        {"state": "real", "norm": "rms_norm", "bias": False, "layer": 1, "depth": 2},
    ],
)
def test_equals_the_equation(options):
    model = make(**options)
    rng = np.random.default_rng(1)
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        variable[...] = jnp.asarray(rng.standard_normal(variable.shape), jnp.float32)
    got, _ = jax.jit(model)(jnp.asarray(inputs()))
    np.testing.assert_allclose(got, by_row(lambda row: literal(model, row), inputs()), rtol=1e-4, atol=2e-5)


def test_angles_after_many_tokens_are_exact_up_to_whole_turns():
    """A product of floats would be wrong by 0.01 after 100,000 tokens; the derivative is the count."""
    theta = np.asarray([1.0, 0.3, 1e-4, -2.5, 9.0], np.float32)
    count = np.asarray([[0, 1, 999, 100_000]])
    got, pullback = jax.vjp(lambda theta: _angles(theta, jnp.asarray(count)), jnp.asarray(theta))
    # Angles per token are multiples of 2^-32 turns, of a float's digits.
    allowed = 2e-6 + count[..., None] * (2.0**-30 + 2.0**-23 * np.abs(theta))
    difference = np.asarray(got, np.float64) - count[..., None] * theta.astype(np.float64)
    assert (np.abs(difference - 2 * np.pi * np.round(difference / (2 * np.pi))) < allowed).all()
    together = np.asarray(got)[0, 3] - 100 * np.asarray(got)[0, 2] - 100 * np.asarray(got)[0, 1]
    assert np.abs(together - 2 * np.pi * np.round(together / (2 * np.pi))).max() < 1e-4
    np.testing.assert_array_equal(pullback(jnp.ones_like(got))[0], np.full(5, count.sum(), np.float32))


def test_lower_bounds_start_as_the_cumulative_softmax_of_zeros():
    depth = 4
    shares = np.full(depth, 1 / depth)
    for layer in range(depth):
        model = make(layer=layer, depth=depth)
        bound = model.bounded[...] * jax.nn.sigmoid(model.bound_logit[...])
        np.testing.assert_allclose(bound, np.cumsum(shares)[layer] - shares[0], atol=1e-6)
    np.testing.assert_allclose(make().theta[...], 10_000.0 ** (-np.arange(WIDTH) / 3), rtol=1e-5)


def test_deeper_layers_cannot_forget_faster_than_their_bound():
    """With gates that want to forget at once, what is left of a state after a step is the bound."""
    for layer, left in ((0, 0.0), (1, 1 / 3), (2, 2 / 3)):
        model = make(state="real", layer=layer, depth=3)
        model.forget.bias[...] = jnp.full_like(model.forget.bias[...], -100.0)
        model.input.kernel[...] = jnp.zeros_like(model.input.kernel[...])
        state = model.init_state(2)
        _, after = model(jnp.asarray(inputs()[:, :1]), state._replace(carried=jnp.ones_like(state.carried)))
        np.testing.assert_allclose(after.carried, left, atol=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"state": "quaternion"}, "state='quaternion'"),
        ({"norm": "batch_norm"}, "norm='batch_norm'"),
        ({"layer": 3, "depth": 3}, "layer=3, depth=3"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        HGRNConfig(width=WIDTH, **options)
