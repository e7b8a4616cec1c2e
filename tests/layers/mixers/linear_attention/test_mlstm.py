"""mLSTM against its equation without stabilization in NumPy, over two calls, and its gates far beyond float32."""

import jax
import jax.numpy as jnp
import numpy as np

from layers.mixers.linear_attention.mlstm import relative_gates
from layers.parts.running_maximum import EMPTY
from tests.layers.mixers.literal import (
    apply,
    by_row,
    drawn,
    filtered,
    heads,
    in_two_calls,
    layer_norm,
    sigmoid,
    silu,
    tokens,
    wide,
)

WIDTH, TIME, HEADS, BLOCK = 8, 12, 2, 4


def blockwise(matrices, x):
    return np.concatenate([x[:, BLOCK * i : BLOCK * (i + 1)] @ m for i, m in enumerate(matrices)], axis=1)


def literal(model, row):
    u, z = np.split(apply(model.input, row), 2, axis=1)
    c = silu(filtered(u, wide(model.convolution.weight)) + wide(model.convolution.bias))
    to_q, to_k, to_v = wide(model.projections)
    q, k, v = blockwise(to_q, c), blockwise(to_k, c), blockwise(to_v, u)
    gates = np.concatenate([q, k, v], axis=1) @ wide(model.gates) + wide(model.gate_bias)
    write, forget = np.exp(gates[:, :HEADS]), sigmoid(gates[:, HEADS:])
    q, k, v = (heads(part, HEADS) for part in (q, k, v))
    size = q.shape[2]
    outputs = np.zeros_like(v)
    for h in range(HEADS):
        memory, normalizer = np.zeros((size, size)), np.zeros(size)
        for t in range(len(row)):
            key = k[t, h] / np.sqrt(size)
            memory = forget[t, h] * memory + write[t, h] * np.outer(key, v[t, h])
            normalizer = forget[t, h] * normalizer + write[t, h] * key
            outputs[t, h] = memory.T @ q[t, h] / max(abs(normalizer @ q[t, h]), 1)
    y = layer_norm(outputs, model.config.epsilon).reshape(len(row), -1) * wide(model.norm.scale)
    return apply(model.output, (y + wide(model.skip) * c) * silu(z))


def test_equals_the_equation():
    model, x = drawn("mlstm", WIDTH, heads=HEADS), tokens(TIME, WIDTH)
    # Gates over a wide range, so that the floor of the denominator and the sums decide in turn.
    model.gates[...] = 4 * model.gates[...]
    got, _ = in_two_calls(model, x)
    np.testing.assert_allclose(got, by_row(lambda row: literal(model, row), x), atol=2e-5)


def test_gates_stay_in_range_and_sum_to_the_logarithms():
    rng = np.random.default_rng(0)
    log_in = 300 * rng.standard_normal((1, 9, 1)).astype(np.float32)
    log_forget = -100 * rng.uniform(size=(1, 9, 1)).astype(np.float32)
    empty = jnp.full((1, 1), EMPTY, jnp.float32)
    gates = jax.jit(relative_gates)(jnp.asarray(log_in), jnp.asarray(log_forget), empty, None)
    weight, log_decay, tops = gates
    assert (np.asarray(log_decay) <= 0).all()
    assert np.isfinite(weight).all()
    # The scale of a token's weight and all later decays give its weight at the end.
    later = np.cumsum(np.asarray(log_decay)[0, ::-1, 0])[::-1] - np.asarray(log_decay)[0, :, 0]
    wanted = log_in[0, :, 0] + np.cumsum(log_forget[0, ::-1, 0])[::-1] - log_forget[0, :, 0]
    with np.errstate(divide="ignore"):
        got = np.log(np.asarray(weight)[0, :, 0]) + later + np.asarray(tops)[0, -1, 0]
    assert (wanted > tops[0, -1, 0] - 80).any()
    np.testing.assert_allclose(
        np.maximum(got, -1e4), np.where(np.isfinite(got), wanted, -1e4), rtol=1e-5, atol=1e-3
    )
