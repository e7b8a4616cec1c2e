"""Mamba and Mamba-2 against their equations in NumPy, their initialisation, and what only they do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.mixers.state_space.mamba import Mamba, MambaConfig
from layers.mixers.state_space.mamba2 import Mamba2, Mamba2Config
from tests.layers.mixers.literal import apply, rms, silu, softplus, wide

WIDTH, TIME = 6, 13


def scrambled(model):
    """The model with parameters that no initialisation gives, so that none of them is idle."""
    rng = np.random.default_rng(5)
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        variable[...] = jnp.asarray(0.5 * rng.standard_normal(variable.shape), jnp.float32)
    return model


def inputs(width=WIDTH, time=TIME):
    return np.random.default_rng(0).standard_normal((2, time, width)).astype(np.float32)


def filtered(convolution, x):
    """A causal convolution written as a sum over taps, the last for the current token; then silu."""
    weight, y = wide(convolution.weight), np.zeros_like(x) + wide(convolution.bias)
    for t in range(len(x)):
        for tap in range(len(weight)):
            source = t - (len(weight) - 1) + tap
            if source >= 0:
                y[t] += weight[tap] * x[source]
    return silu(y)


def literal_mamba(model, x):
    config = model.config
    channels, size, rank = config.channels, config.state_size, config.rank
    a, outputs = -np.exp(wide(model.log_a)), []
    for row in np.asarray(x, np.float64):
        mixed = apply(model.input, row)
        u, gate = filtered(model.convolution, mixed[:, :channels]), mixed[:, channels:]
        selected = apply(model.selection, u)
        if config.inner_norm:
            parts = np.split(selected, [rank, rank + size], axis=1)
            normed = zip(parts, model.inner_norms, strict=True)
            selected = np.concatenate(
                [rms(part, config.epsilon) * wide(n.scale) for part, n in normed], axis=1
            )
        dt = softplus(selected[:, :rank] @ wide(model.dt.kernel) + wide(model.dt_bias))
        h, y = np.zeros((channels, size)), np.zeros_like(u)
        for t in range(len(row)):
            b, c = selected[t, rank : rank + size], selected[t, rank + size :]
            h = np.exp(dt[t][:, None] * a) * h + np.outer(dt[t] * u[t], b)
            y[t] = h @ c + wide(model.d) * u[t]
        outputs.append(apply(model.output, y * silu(gate)))
    return np.stack(outputs)


def literal_mamba2(model, x):
    config = model.config
    channels, shared, size = config.channels, config.groups * config.state_size, config.state_size
    per_group, outputs = config.heads // config.groups, []
    for row in np.asarray(x, np.float64):
        mixed = apply(model.input, row)
        gate, dt = mixed[:, :channels], mixed[:, 2 * (channels + shared) :]
        convolved = filtered(model.convolution, mixed[:, channels : 2 * (channels + shared)])
        u, b, c = np.split(convolved, [channels, channels + shared], axis=1)
        dt = np.clip(softplus(dt + wide(model.dt_bias)), *config.dt_limit)
        y = np.zeros_like(u)
        for head in range(config.heads):
            mine = slice(head * config.head_dim, (head + 1) * config.head_dim)
            group = slice(head // per_group * size, (head // per_group + 1) * size)
            s = np.zeros((size, config.head_dim))
            for t in range(len(row)):
                decay = np.exp(-dt[t, head] * np.exp(wide(model.log_a)[head]))
                s = decay * s + np.outer(b[t, group], dt[t, head] * u[t, mine])
                y[t, mine] = s.T @ c[t, group] + wide(model.d)[head] * u[t, mine]
        y = y * silu(gate)
        for part in np.split(y, config.groups, axis=1):
            part /= np.sqrt((part**2).mean(1, keepdims=True) + 1e-5)
        outputs.append(apply(model.output, y * wide(model.scale)))
    return np.stack(outputs)


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "options",
    [{}, {"dt_rank": 2, "bias": True, "taps": 3}, {"dt_rank": 3, "inner_norm": True, "epsilon": 0.1}],
)
def test_mamba_equals_the_equation(options):
    model = scrambled(Mamba(MambaConfig(width=WIDTH, state_size=4, **options), rngs=nnx.Rngs(0)))
    got, _ = jax.jit(model)(jnp.asarray(inputs()))
    np.testing.assert_allclose(got, literal_mamba(model, inputs()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"groups": 2, "bias": True}, {"dt_limit": (0.4, 0.9)}])
def test_mamba2_equals_the_equation(options):
    config = Mamba2Config(width=WIDTH, state_size=5, head_dim=3, **options)
    model = scrambled(Mamba2(config, rngs=nnx.Rngs(0)))
    got, _ = jax.jit(model)(jnp.asarray(inputs()))
    np.testing.assert_allclose(got, literal_mamba2(model, inputs()), rtol=1e-4, atol=1e-5)


def test_initial_rates_steps_and_projections_are_those_of_the_authors():
    model = Mamba(MambaConfig(width=64, depth=4), rngs=nnx.Rngs(0))
    np.testing.assert_allclose(np.exp(wide(model.log_a)), np.tile(np.arange(1.0, 17), (128, 1)), rtol=1e-6)
    bound = 128**-0.5 / 2
    assert bound * 0.98 < np.abs(wide(model.output.kernel)).max() <= bound
    bound = 4**-0.5
    assert bound * 0.95 < np.abs(wide(model.dt.kernel)).max() <= bound
    second = Mamba2(Mamba2Config(width=1024, head_dim=4, state_size=4), rngs=nnx.Rngs(0))
    rates = np.exp(wide(second.log_a))
    assert 1 <= rates.min() < 1.2
    assert 15.8 < rates.max() <= 16.0001
    assert rates.mean() == pytest.approx(8.5, abs=0.6)
    for bias in (model.dt_bias, second.dt_bias):
        steps = softplus(wide(bias))
        assert steps.min() >= 0.999e-3
        assert steps.max() <= 0.1001
        assert np.log(steps).mean() == pytest.approx(np.log(0.01), abs=0.3)


def test_a_token_that_chooses_no_step_is_not_there():
    """With softplus(dt) = 0 nothing is written and nothing decays: selection can skip a token."""
    model = Mamba(MambaConfig(width=WIDTH, state_size=4), rngs=nnx.Rngs(0))
    model.dt_bias[...] = jnp.full_like(model.dt_bias[...], -200.0)
    state = model.init_state(2)
    h = jax.random.normal(jax.random.key(1), state.carried.h.shape)
    _, after = model(jnp.asarray(inputs()), state._replace(carried=state.carried._replace(h=h)))
    np.testing.assert_array_equal(after.carried.h, h)


def test_mamba2_does_not_feel_the_scale_of_what_it_norms():
    """The norm is behind the gate, so that a larger D, B and C leave the outputs where they were."""
    model = Mamba2(Mamba2Config(width=WIDTH, state_size=4, head_dim=3), rngs=nnx.Rngs(0))
    want, _ = model(jnp.asarray(inputs()))
    model.log_a[...] = jnp.full_like(model.log_a[...], -100.0)
    model.dt_bias[...] = jnp.full_like(model.dt_bias[...], -100.0)
    only_skip, _ = model(jnp.asarray(inputs()))
    model.d[...] = 100 * model.d[...]
    louder, _ = model(jnp.asarray(inputs()))
    np.testing.assert_allclose(louder, only_skip, rtol=0.05, atol=0.02)
    assert np.abs(want - only_skip).max() > 1e-4


@pytest.mark.parametrize(
    "config, options, message",
    [
        (MambaConfig, {"state_size": 0}, "state_size=0"),
        (MambaConfig, {"dt_rank": 0}, "dt_rank=0"),
        (MambaConfig, {"dt_min": 0.1, "dt_max": 0.01}, "dt_min=0.1"),
        (Mamba2Config, {"head_dim": 5}, "head_dim=5 does not divide expand . width = 12"),
        (Mamba2Config, {"head_dim": 4, "groups": 2}, "groups=2 does not divide the 3 heads"),
        (Mamba2Config, {"head_dim": 4, "a_min": 0.0}, "a_min=0.0"),
        (Mamba2Config, {"head_dim": 4, "dt_limit": (1.0, 0.5)}, "dt_limit="),
    ],
)
def test_impossible_options_are_refused(config, options, message):
    with pytest.raises(ValueError, match=message):
        config(width=WIDTH, **options)
