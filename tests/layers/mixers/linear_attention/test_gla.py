"""Gated linear attention against its equation in NumPy, and what the gate does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.mixers.linear_attention.gla import GLA, GLAConfig
from tests.layers.mixers.literal import (
    apply,
    by_row,
    filtered,
    heads,
    low_rank,
    rms,
    sigmoid,
    silu,
    stirred,
    wide,
)

WIDTH, TIME = 8, 11


def make(**options):
    return GLA(GLAConfig(width=WIDTH, heads=2, **options), rngs=nnx.Rngs(0))


def inputs(time=TIME):
    return jax.random.normal(jax.random.key(0), (2, time, WIDTH))


def literal(model, row):
    config = model.config
    count, (key_dim, value_dim) = config.heads, config.sizes
    q, k, v = (apply(getattr(model, name), row) for name in ("query", "key", "value"))
    if config.taps:
        taps = np.split(wide(model.convolution.weight), np.cumsum([q.shape[1], k.shape[1]]), axis=1)
        q, k, v = (silu(filtered(x, weight)) for x, weight in zip((q, k, v), taps, strict=True))
    q, k, v = heads(q, count), heads(k, config.groups), heads(v, config.groups)
    alpha = heads(sigmoid(low_rank(model.decay, row)) ** (1 / config.temperature), config.groups)
    # Every head of queries gets keys, values and decays of its own, those of a group alike.
    k, v, alpha = (np.repeat(x, count // config.groups, axis=1) for x in (k, v, alpha))
    outputs = np.zeros((len(row), count, value_dim))
    for h in range(count):
        state = np.zeros((key_dim, value_dim))
        for t in range(len(row)):
            state = np.diag(alpha[t, h]) @ state + np.outer(k[t, h], v[t, h])
            outputs[t, h] = state.T @ q[t, h] / np.sqrt(key_dim)
    normed = rms(outputs, config.epsilon) * wide(model.norm.scale)
    return apply(model.output, normed.reshape(len(row), -1) * silu(apply(model.gate, row)))


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "options", [{}, {"key_dim": 3, "value_dim": 5, "temperature": 1.0}, {"kv_heads": 1, "taps": 3}]
)
def test_equals_the_equation(options):
    model, x = stirred(make(**options)), inputs()
    np.testing.assert_allclose(model(x)[0], by_row(lambda row: literal(model, row), x), atol=5e-6)


def test_initial_decays_are_near_the_sixteenth_root_of_a_half():
    model = make()
    decay = np.exp(jax.nn.log_sigmoid(model.decay(inputs())) / model.config.temperature)
    assert decay.shape == (2, TIME, WIDTH // 2)
    np.testing.assert_allclose(decay, 2 ** (-1 / 16), atol=0.02)


def test_an_open_gate_remembers_and_a_shut_one_sees_only_its_own_token():
    model, x = make(), inputs()
    changed = x.at[:, 0].add(1.0)

    def influence(bias):
        model.decay.outer.bias[...] = jnp.full(WIDTH // 2, bias)
        return float(jnp.abs(model(changed)[0] - model(x)[0])[:, -1].max())

    assert influence(-4000.0) == 0
    assert influence(4000.0) > 1e-3


def test_parameters_of_a_layer_are_four_times_the_width_squared():
    """The sizes of the paper: keys of half the width, values of the width, a gate of low rank."""
    width = 64
    count = sum(
        v.size for v in jax.tree.leaves(nnx.state(GLA(GLAConfig(width), rngs=nnx.Rngs(0)), nnx.Param))
    )
    assert count == 4 * width**2 + (width + width // 2) * 16 + width // 2 + width // 4


def test_refuses_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"heads=3 cannot share 0\.5 x width=8"):
        GLAConfig(width=8, heads=3)
    with pytest.raises(ValueError, match="value_dim=0"):
        GLAConfig(width=8, heads=2, value_dim=0)
    with pytest.raises(ValueError, match="kv_heads=3 does not divide heads=2"):
        GLAConfig(width=8, heads=2, kv_heads=3)
    with pytest.raises(ValueError, match="taps=1; expected 2 to 8"):
        make(taps=1)
    with pytest.raises(ValueError, match="gate_rank=0"):
        GLAConfig(width=8, heads=2, gate_rank=0)
    with pytest.raises(ValueError, match="temperature=-1"):
        GLAConfig(width=8, heads=2, temperature=-1)
