"""Log-linear Mamba-2 against its equation in NumPy, with Fenwick's update of states, over two calls."""

import numpy as np

from tests.layers.mixers.literal import (
    apply,
    by_row,
    drawn,
    filtered,
    heads,
    in_two_calls,
    rms,
    silu,
    softplus,
    tokens,
    wide,
)

# The first call ends where blocks of 2 and 4 tokens end, and within one of 8.
WIDTH, TIME, LEVELS = 8, 24, 5
OPTIONS = {"state_size": 3, "head_dim": 4, "groups": 2, "levels": LEVELS}


def literal(model, row):
    config = model.config
    z, mixed, dt = np.split(
        apply(model.input, row),
        [config.channels, 2 * config.channels + 2 * config.groups * config.state_size],
        axis=1,
    )
    convolution = model.convolution
    mixed = silu(filtered(mixed, wide(convolution.weight)) + wide(convolution.bias))
    shared = config.groups * config.state_size
    u, b, c = np.split(mixed, [config.channels, config.channels + shared], axis=1)
    u, b, c = heads(u, config.heads), heads(b, config.groups), heads(c, config.groups)
    dt = np.clip(softplus(dt + wide(model.dt_bias)), *config.dt_limit)
    weights = softplus(heads(apply(model.level, row), config.heads) * wide(model.level_scale))
    outputs = np.zeros_like(u)
    for h in range(config.heads):
        g = h // (config.heads // config.groups)
        states = np.zeros((LEVELS + 1, config.state_size, config.head_dim))
        for t in range(len(row)):
            if t:
                # The lowest bit that is set in t: its level takes the states of all lower levels.
                merged = (t & -t).bit_length()
                states[merged] = states[: merged + 1].sum(0)
                states[:merged] = 0
            states = np.exp(-dt[t, h] * np.exp(wide(model.log_a)[h])) * states
            states[0] = np.outer(b[t, g], dt[t, h] * u[t, h])
            read = sum(w * state.T @ c[t, g] for w, state in zip(weights[t, h], states, strict=True))
            outputs[t, h] = read + wide(model.d)[h] * u[t, h]
    y = outputs.reshape(len(row), -1) * silu(z)
    y = rms(heads(y, config.groups), config.epsilon).reshape(y.shape) * wide(model.scale)
    return apply(model.output, y)


def test_equals_the_equation():
    model, x = drawn("log_linear_mamba2", WIDTH, **OPTIONS), tokens(TIME, WIDTH)
    got, _ = in_two_calls(model, x)
    np.testing.assert_allclose(got, by_row(lambda row: literal(model, row), x), atol=1e-5)
