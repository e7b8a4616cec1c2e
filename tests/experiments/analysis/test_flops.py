"""Operations are counted as often as they run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from experiments.analysis.flops import count_flops

A, B = jnp.ones((3, 4)), jnp.ones((4, 5))
PRODUCT = 2 * 3 * 4 * 5


def repeated(times):
    return lambda a: lax.scan(lambda x, _: (x @ jnp.ones((4, 4)), None), a, None, length=times)[0]


@jax.custom_vjp
def squared(x):
    return x * x


squared.defvjp(lambda x: (x * x, x), lambda x, dy: (2 * x * dy,))


@pytest.mark.parametrize(
    "function, arguments, matrix, other",
    [
        (jnp.matmul, (A, B), PRODUCT, 0),
        (jax.jit(jnp.matmul), (A, B), PRODUCT, 0),
        (jax.checkpoint(jnp.matmul), (A, B), PRODUCT, 0),
        (repeated(7), (A,), 7 * 2 * 3 * 4 * 4, 0),
        (lambda a: lax.scan(lambda x, _: (repeated(7)(x), None), a, None, length=5)[0], (A,), 35 * 96, 0),
        (lambda a: lax.cond(True, repeated(2), repeated(3), a), (A,), 3 * 96, 0),
        (lambda a, b: jnp.matmul(a + 0j, b + 0j), (A, B), 4 * PRODUCT, None),
        (squared, (A,), 0, 12),
        (lambda a: jnp.tanh(a) + jnp.exp(a), (A,), 0, 36),
        (lambda a: a.sum(0), (A,), 0, 12),
        (lambda a: (a > 0).sum(), (A,), 0, 0),
        (lambda a: jnp.zeros(3).at[jnp.array([0, 1, 1, 2])].add(a[0]), (A,), 0, 4),
        (lambda a: jnp.fft.fft(a, axis=1), (A + 0j,), 0, 5 * 12 * 2),
        (lambda a: jnp.fft.rfft(a, axis=1), (A,), 0, 2.5 * 12 * 2),
        (lambda a, b: lax.ragged_dot(a, b, jnp.array([1, 2])), (A, jnp.ones((2, 4, 5))), PRODUCT, 0),
        (
            lambda x, w: lax.conv_general_dilated(x, w, (1,), "SAME", feature_group_count=6),
            (jnp.ones((2, 6, 9)), jnp.ones((6, 1, 3))),
            2 * 2 * 6 * 9 * 3,
            0,
        ),
    ],
)
def test_counts(function, arguments, matrix, other):
    got = count_flops(function, *arguments)
    assert got.exact
    assert got.matrix == matrix
    if other is not None:
        assert got.other == other


def test_a_loop_of_unknown_length_is_not_exact():
    got = count_flops(lambda n, a: lax.fori_loop(0, n, lambda _, x: x @ jnp.ones((4, 4)), a), 3, A)
    assert not got.exact
    assert got.matrix == 96


def test_agrees_with_xla_where_there_is_no_loop():
    def function(a, b):
        return jnp.tanh(a @ b) @ b.T

    analysis = jax.jit(function).lower(A, B).compile().cost_analysis()
    want = analysis["flops"] + analysis.get("transcendentals", 0)
    np.testing.assert_allclose(count_flops(function, A, B).total, want, rtol=0.02)
