"""Retention against its recurrent and parallel forms in NumPy, with complex rotations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.mixers.linear_attention.retnet import RetNet, RetNetConfig
from tests.layers.mixers.literal import apply, by_row, heads, rms, silu, stirred, wide

WIDTH, TIME = 8, 13


def make(**options):
    return RetNet(RetNetConfig(width=WIDTH, **{"heads": 2, **options}), rngs=nnx.Rngs(0))


def inputs(time=TIME, scale=4.0):
    return scale * jax.random.normal(jax.random.key(0), (2, time, WIDTH))


def projections(model, row):
    """q, k (complex, one number a pair, not yet turned) and v by heads."""
    count, groups = model.config.heads, model.config.groups
    q = heads(apply(model.query, row), count)
    k, v = (
        np.repeat(heads(apply(part, row), groups), count // groups, 1) for part in (model.key, model.value)
    )
    half = q.shape[-1] // 2
    return q[..., :half] + 1j * q[..., half:], k[..., :half] + 1j * k[..., half:], v


def finish(model, o, row):
    o = rms(o, model.config.epsilon)
    if model.config.affine:
        o = o * wide(model.norm.scale)
    return apply(model.output, o.reshape(len(row), -1) * silu(apply(model.gate, row)))


def recurrent(model, row):
    """S_n = gamma e^{-i theta} S_{n-1} + k_n v_n with the rotation in the state, as the paper derives it."""
    q, k, v = projections(model, row)
    count, pairs = q.shape[1:]
    turn = np.exp(-1j * model.config.rope_base ** -np.linspace(0, 1, pairs))
    outputs = np.zeros((len(row), count, v.shape[2]))
    for h in range(count):
        state = np.zeros((pairs, v.shape[2]), complex)
        for t in range(len(row)):
            state = (1 - 2.0 ** (-5 - h)) * turn[:, None] * state + k[t, h][:, None] * v[t, h]
            outputs[t, h] = (q[t, h].conj() @ state).real / np.sqrt(2 * pairs)
    return finish(model, outputs, row)


def parallel(model, row):
    """Scores times the decay matrix, both divided as in the authors' code."""
    q, k, v = projections(model, row)
    count, pairs = q.shape[1:]
    angle = np.arange(len(row))[:, None] * model.config.rope_base ** -np.linspace(0, 1, pairs)
    n, m = np.indices((len(row), len(row)))
    outputs = np.zeros((len(row), count, v.shape[2]))
    for h in range(count):
        decay = np.where(n >= m, (1 - 2.0 ** (-5 - h)) ** np.maximum(n - m, 0), 0)
        decay /= np.sqrt(decay.sum(1, keepdims=True))
        turned_q, turned_k = q[:, h] * np.exp(1j * angle), k[:, h] * np.exp(1j * angle)
        scores = (turned_q @ turned_k.conj().T).real / np.sqrt(2 * pairs) * decay
        scores /= np.maximum(np.abs(scores.sum(1, keepdims=True)), 1)
        outputs[:, h] = scores @ v[:, h]
    return finish(model, outputs, row)


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "options", [{}, {"heads": 4, "kv_heads": 2, "value_dim": 3, "affine": True}, {"key_dim": 6}]
)
def test_equals_the_recurrent_form(options):
    model, x = stirred(make(**options)), inputs()
    np.testing.assert_allclose(model(x)[0], by_row(lambda row: recurrent(model, row), x), atol=5e-6)


def test_equals_the_parallel_form_whose_divisions_the_norm_takes_away():
    model, x = make(epsilon=1e-12), inputs()
    np.testing.assert_allclose(model(x)[0], by_row(lambda row: parallel(model, row), x), atol=5e-5)


@pytest.mark.slow
def test_a_head_forgets_at_its_own_rate():
    """After one token, tokens without values let the memory decay by 31/32, 63/64, ... per token."""
    model = make(heads=4)
    x = inputs(1)
    _, first = model(x, model.init_state(2))
    _, later = model(jnp.zeros((2, 10, WIDTH)), first)
    rates = (1 - 2.0 ** -(5.0 + np.arange(4))) ** 10
    np.testing.assert_allclose(later.carried, rates[None, :, None, None] * first.carried, rtol=1e-5)


@pytest.mark.slow
def test_positions_continue_in_the_state():
    model = make()
    _, state = model(inputs(5), model.init_state(2))
    np.testing.assert_array_equal(state.place.position, [5, 5])
    _, state = model(inputs(3), state, segment_ids=jnp.asarray([[1, 1, 0], [2, 2, 3]]))
    np.testing.assert_array_equal(state.place.position, [7, 1])


def test_initial_bounds_are_xavier_with_the_gain_of_the_authors():
    model = RetNet(RetNetConfig(width=64), rngs=nnx.Rngs(0))
    for name, gain in (("query", 2**-2.5), ("value", 2**-2.5), ("gate", 2**-2.5), ("output", 1.0)):
        kernel = np.asarray(getattr(model, name).kernel[...])
        bound = gain * np.sqrt(6 / sum(kernel.shape))
        assert 0.98 * bound < np.abs(kernel).max() <= bound


def test_refuses_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="key_dim=3 is odd"):
        RetNetConfig(width=8, heads=2, key_dim=3)
    with pytest.raises(ValueError, match="heads=3 cannot share"):
        RetNetConfig(width=8, heads=3)
    with pytest.raises(ValueError, match="rope_base=1"):
        RetNetConfig(width=8, heads=2, rope_base=1.0)
