"""H3 against its two recurrences in NumPy, one step at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.mixers.state_space.h3 import H3, H3Config
from tests.layers.mixers.literal import apply, heads, wide

WIDTH, TIME = 6, 13


def make(**options):
    return H3(H3Config(width=WIDTH, **{"state_size": 4, **options}), rngs=nnx.Rngs(1))


def inputs():
    return jax.random.normal(jax.random.key(0), (2, TIME, WIDTH))


def literal(model, x):
    """The shift system as a matrix, the diagonal one with both halves of its modes, head by head in complex128."""
    config, ssm = model.config, model.ssm
    size, count, r = config.state_size, config.heads, config.head_dim
    shift = np.eye(size, k=-1)
    a = -np.exp(wide(ssm.modes.log_rate)) + 1j * wide(ssm.modes.frequency)
    b, c = wide(ssm.modes.b)[0] + 1j * wide(ssm.modes.b)[1], (wide(ssm.c)[0] + 1j * wide(ssm.c)[1])[0]
    a, b, c = (np.concatenate([v, v.conj()], axis=1) for v in (a, b, c))
    a_bar = np.exp(np.exp(wide(ssm.log_dt))[:, None] * a)
    b_bar = (a_bar - 1) / a * b
    rows = []
    for row in np.asarray(x, np.float64):
        q, k, v = (apply(part, row) for part in (model.query, model.key, model.value))
        past, h, outputs = np.zeros((WIDTH, size)), np.zeros((count, r, r, size), complex), []
        for t in range(len(row)):
            past = past @ shift.T + wide(model.shift_b) * k[t][:, None]
            key = (wide(model.shift_c) * past).sum(1) + wide(model.shift_d) * k[t]
            query, key, value = (heads(part[None], count)[0] for part in (q[t], key, v[t]))
            product = key[:, :, None] * value[:, None, :]
            h = a_bar[:, None, None] * h + b_bar[:, None, None] * product[..., None]
            seen = (c[:, None, None] * h).sum(-1).real + wide(ssm.d)[:, None, None] * product
            outputs.append(np.einsum("hi,hij->hj", query, seen).reshape(-1))
        rows.append(apply(model.output, np.stack(outputs)))
    return np.stack(rows)


@pytest.mark.sample(2)
@pytest.mark.parametrize("head_dim", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("trained", [False, True])
def test_equals_the_equation(head_dim, trained):
    model = make(head_dim=head_dim)
    if trained:
        model.shift_b[...] = jax.random.normal(jax.random.key(1), model.shift_b.shape)
    want = literal(model, inputs())
    np.testing.assert_allclose(model(inputs())[0], want, atol=1e-5 * np.abs(want).max())
    np.testing.assert_allclose(model(inputs(), model.init_state(2))[0], want, atol=1e-5 * np.abs(want).max())


def test_initial_shift_is_a_filter_with_taps_c():
    model = make(state_size=64)
    np.testing.assert_array_equal(wide(model.shift_b), np.eye(64)[:1].repeat(WIDTH, 0))
    np.testing.assert_allclose(model._shift_taps(), wide(model.shift_c), atol=1e-6)
    assert np.abs(wide(model.shift_c)).max() <= 1 / 8
    assert wide(model.shift_c).std() == pytest.approx(1 / 8 / np.sqrt(3), rel=0.1)
    np.testing.assert_allclose(
        wide(model.ssm.modes.frequency), np.pi * np.arange(32)[None].repeat(WIDTH, 0), rtol=1e-6
    )


@pytest.mark.slow
def test_one_key_recalls_one_value():
    """With a shift of one step and a sum that never decays, a query reads the value that followed the same key."""
    model = H3(H3Config(width=4, head_dim=4, state_size=2), rngs=nnx.Rngs(0))
    model.shift_c[...] = jnp.zeros((4, 2)).at[:, 1].set(1.0)
    model.shift_d[...] = jnp.zeros(4)
    # A frequency and a rate of zero sum what came before, 2 Re(c b) = 1 at step 1.
    model.ssm.modes.log_rate[...] = jnp.full((1, 1), -30.0)
    model.ssm.log_dt[...] = jnp.zeros(1)
    model.ssm.c[...] = jnp.zeros((2, 1, 1, 1)).at[0].set(0.5)
    model.ssm.d[...] = jnp.zeros(1)
    for part in (model.query, model.key, model.value, model.output):
        part.kernel[...] = jnp.eye(4)
    tokens = jnp.array([[0, 2, 1, 3, 1, 0, 0]])
    y = np.asarray(model(jax.nn.one_hot(tokens, 4))[0][0])
    # After "0 2" a second 0 recalls 2; after "1 3" a second 1 recalls 3; the third 0 recalls 2 and 0 itself.
    np.testing.assert_allclose(y[4], [0, 0, 0, 1], atol=1e-5)
    np.testing.assert_allclose(y[5], [0, 0, 1, 0], atol=1e-5)
    np.testing.assert_allclose(y[6], [1, 0, 1, 0], atol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [({"head_dim": 4}, "head_dim=4 does not divide width=6"), ({"state_size": 3}, "state_size=3")],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
