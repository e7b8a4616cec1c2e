"""DeltaNet, Gated DeltaNet and Kimi Delta Attention against their equations in NumPy, and what ties them together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.mixers.delta_rule.deltanet import DeltaNet, DeltaNetConfig
from layers.mixers.delta_rule.gated_deltanet import GatedDeltaNet, GatedDeltaNetConfig
from layers.mixers.delta_rule.kda import KDA, KDAConfig
from tests.layers.mixers.literal import (
    apply,
    by_row,
    convolved,
    heads,
    low_rank,
    rms,
    sigmoid,
    silu,
    softplus,
    stirred,
    wide,
)

WIDTH, TIME = 8, 13
MIXERS = {
    "deltanet": (DeltaNetConfig, DeltaNet),
    "gated_deltanet": (GatedDeltaNetConfig, GatedDeltaNet),
    "kda": (KDAConfig, KDA),
}


def make(name, seed=0, **options):
    config, module = MIXERS[name]
    return module(config(width=WIDTH, **{"heads": 2, **options}), rngs=nnx.Rngs(seed))


def inputs(time=TIME):
    return jax.random.normal(jax.random.key(0), (2, time, WIDTH))


def literal(name, model, row):
    memory = model.memory
    q, k, v = convolved(memory, row)
    beta = memory.largest * sigmoid(apply(memory.strength, row))
    alpha = np.ones((len(row), memory.value_heads, memory.key_dim))
    if name == "gated_deltanet":
        rate = np.exp(wide(model.decay.log_rate)) * softplus(apply(model.rate, row) + wide(model.decay.bias))
        alpha *= np.exp(-rate)[..., None]
    elif name == "kda":
        f = heads(low_rank(model.rate, row), memory.value_heads)
        rate, f = np.exp(wide(model.decay.log_rate))[:, None], f + wide(model.decay.bias)
        lowest = model.config.lowest_decay
        alpha = np.exp(-rate * softplus(f) if lowest is None else lowest * sigmoid(rate * f))
    outputs = np.zeros((len(row), memory.value_heads, memory.value_dim))
    for h in range(memory.value_heads):
        g = h // (memory.value_heads // memory.key_heads)
        state = np.zeros((memory.key_dim, memory.value_dim))
        for t in range(len(row)):
            erase = np.eye(memory.key_dim) - beta[t, h] * np.outer(k[t, g], k[t, g])
            state = erase @ np.diag(alpha[t, h]) @ state + beta[t, h] * np.outer(k[t, g], v[t, h])
            outputs[t, h] = state.T @ q[t, g] / np.sqrt(memory.key_dim)
    y = (rms(outputs, model.config.epsilon) * wide(model.norm.scale)).reshape(len(row), -1)
    if name == "kda":
        y = y * sigmoid((apply if model.config.full_gate else low_rank)(model.gate, row))
    elif model.gate is not None:
        y = y * silu(apply(model.gate, row))
    return apply(model.output, y)


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deltanet", {}),
        ("deltanet", {"gate": True, "negative_eigenvalues": True, "key_dim": 5, "taps": 2}),
        ("gated_deltanet", {}),
        ("gated_deltanet", {"value_heads": 4, "value_dim": 5, "negative_eigenvalues": True}),
        ("kda", {}),
        ("kda", {"head_dim": 3, "negative_eigenvalues": True, "value_heads": 4}),
        pytest.param("kda", {"lowest_decay": -5.0, "full_gate": True}, marks=pytest.mark.slow),
    ],
)
def test_equals_the_equation(name, options):
    model, x = stirred(make(name, **options)), inputs()
    want = by_row(lambda row: literal(name, model, row), x)
    np.testing.assert_allclose(model(x)[0], want, atol=5e-6)


@pytest.mark.sample(2)
@pytest.mark.parametrize(("name", "low"), [("gated_deltanet", 0.01), ("kda", 1.0)])
def test_initial_rates_and_steps(name, low):
    config, module = MIXERS[name]
    decay = module(config(width=256, heads=64), rngs=nnx.Rngs(0)).decay
    rate, step = np.exp(decay.log_rate[...]), np.asarray(jax.nn.softplus(decay.bias[...]))
    assert low <= rate.min() < low + 2
    assert 14 < rate.max() <= 16
    assert np.mean(rate) == pytest.approx((low + 16) / 2, rel=0.2)
    assert 0.001 <= step.min() * 1.0001 < 0.0015
    assert 0.07 < step.max() <= 0.1001
    assert np.log(step).mean() == pytest.approx(np.log(0.01), abs=0.5)


def test_without_decay_the_gated_rule_is_that_of_deltanet():
    gated = make("gated_deltanet", key_dim=4, value_dim=4)
    plain = make("deltanet", gate=True, key_dim=4, value_dim=4, seed=1)
    for name in ("memory", "gate", "norm", "output"):
        nnx.update(getattr(plain, name), nnx.state(getattr(gated, name)))
    x = inputs()
    assert jnp.abs(gated(x)[0] - plain(x)[0]).max() > 1e-3
    gated.decay.log_rate[...] = jnp.full(2, -50.0)
    np.testing.assert_allclose(gated(x)[0], plain(x)[0], atol=1e-6)


def test_with_equal_channels_kimi_delta_attention_decays_by_head():
    """The same decay on every channel and the same gate make KDA and Gated DeltaNet differ in the gate's form alone."""
    kda, gated = make("kda"), make("gated_deltanet", key_dim=4, value_dim=4, seed=1)
    nnx.update(gated.memory, nnx.state(kda.memory))
    nnx.update(gated.output, nnx.state(kda.output))
    gated.rate.kernel[...] = jnp.zeros((WIDTH, 2))
    kda.rate.outer.kernel[...] = jnp.zeros((4, WIDTH))
    kda.decay.bias[...] = jnp.broadcast_to(gated.decay.bias[...][:, None], (2, 4))
    kda.decay.log_rate[...] = gated.decay.log_rate[...]
    kda.gate.outer.kernel[...] = jnp.zeros((4, WIDTH))
    kda.gate.outer.bias[...] = jnp.full(WIDTH, 50.0)
    x = inputs().at[..., 0].set(1.0)
    # silu of a large number is that number: 50 times the sigmoid of 50.
    gated.gate.kernel[...] = jnp.zeros((WIDTH, WIDTH)).at[0].set(50.0)
    np.testing.assert_allclose(gated(x)[0], 50 * kda(x)[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", MIXERS)
def test_a_key_written_twice_holds_the_second_value(name):
    """With full strength and no decay, reading what was written last forgets what was there before."""
    model = make(name, key_dim=4, value_dim=4) if name != "kda" else make(name)
    x = inputs()
    if name != "deltanet":
        model.decay.log_rate[...] = jnp.full(2, -50.0)
    model.memory.strength.kernel[...] = jnp.zeros((WIDTH, 2)).at[0].set(50.0)
    # Every token has the same key, so only the last value is left: the memory is k v^T, of rank one.
    taps = model.memory.convolution.weight
    taps[...] = jnp.zeros(taps.shape).at[-1].set(1.0)
    kernel = model.memory.projection.kernel
    kernel[...] = kernel[...].at[:, 8:16].set(0.0).at[0, 8:16].set(jnp.arange(1.0, 9.0))
    _, state = model(x.at[..., 0].set(1.0), model.init_state(2))
    q = jax.nn.silu(jnp.arange(1.0, 9.0)).reshape(2, 4)
    key = q / jnp.linalg.norm(q, axis=1, keepdims=True)
    value = jax.nn.silu(model.memory.projection(x.at[..., 0].set(1.0))[:, -1, 16:]).reshape(2, 2, 4)
    want = key[None, :, :, None] * value[:, :, None, :]
    np.testing.assert_allclose(state.carried.memory, want, atol=1e-5)


def test_parameters_of_gated_deltanet_are_six_times_the_width_squared():
    """Keys of 3/4 of the width and values of 3/2, as in the paper."""
    width, heads_, taps = 64, 4, 4
    model = GatedDeltaNet(GatedDeltaNetConfig(width, heads=heads_), rngs=nnx.Rngs(0))
    count = sum(v.size for v in jax.tree.leaves(nnx.state(model, nnx.Param)))
    small = 2 * width * heads_ + 2 * heads_ + 3 * width * taps + 24
    assert count == 6 * width**2 + small


def test_refuses_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="value_heads=3 is not a multiple of heads=2"):
        GatedDeltaNetConfig(width=8, heads=2, value_heads=3)
    with pytest.raises(ValueError, match="set head_dim"):
        KDAConfig(width=8, heads=3)
    with pytest.raises(ValueError, match="lowest_decay=0.0; expected a number below 0"):
        KDAConfig(width=8, heads=2, lowest_decay=0.0)
    with pytest.raises(ValueError, match="key_dim=-1"):
        DeltaNetConfig(width=8, heads=2, key_dim=-1)
    with pytest.raises(ValueError, match="taps=9"):
        make("deltanet", taps=9)
