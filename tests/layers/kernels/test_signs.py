"""A log-decay, a rate or a step size of the wrong sign is refused by name, or makes NaN in compiled code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.kernels import delta_rule, gated_linear_attention, selective_scan
from layers.kernels.ssm_kernel import ssm_kernel

ONES = jnp.ones((1, 3, 1, 2))
GLA = functools.partial(gated_linear_attention.gated_linear_attention, ONES, ONES, ONES)
BETA = jnp.ones((1, 3, 1))
X = jnp.ones((1, 3, 2))
GROUPS = jnp.ones((1, 3, 1, 2))


RATES = -jnp.ones((2, 2))


def scan(impl=None, dt=X, a=RATES, **options):
    return selective_scan.selective_scan(X, dt, a, GROUPS, GROUPS, impl=impl, **options)


def decays(*shapes):
    """Log-decays of which one number is 1, the others -0.1."""
    return [jnp.full(shape, -0.1).at[(0,) * len(shape)].set(1.0) for shape in shapes]


PER_STEP = decays((1, 3, 1), (1, 3, 1, 2))
NUMBERS = {
    "gated_linear_attention": [
        ("log_decay", lambda g, **o: GLA(log_decay=g, **o), g) for g in [*decays((1,)), *PER_STEP]
    ],
    "summarize": [
        (
            "log_decay",
            lambda g, **o: gated_linear_attention.summarize(ONES, ONES, log_decay=g, **o),
            PER_STEP[0],
        )
    ],
    "delta_rule": [
        ("log_decay", lambda g, **o: delta_rule.delta_rule(ONES, ONES / 2, ONES, BETA, log_decay=g, **o), g)
        for g in PER_STEP
    ],
    "dplr_delta_rule": [
        (
            "log_decay",
            lambda g, **o: delta_rule.dplr_delta_rule(ONES, ONES, ONES, ONES, -ONES, log_decay=g, **o),
            g,
        )
        for g in PER_STEP
    ],
    "selective_scan": [
        ("a", lambda a, **o: scan(a=a, **o), jnp.array([[-1.0, 0.1], [-1.0, -1.0]])),
        ("dt", lambda dt, **o: scan(dt=dt, **o), X.at[0, 0, 0].set(-1.0)),
        ("dt", lambda b, **o: scan(dt_bias=b, **o), jnp.array([-2.0, 0.0])),
        ("a", lambda a, **o: selective_scan.summarize(X, X, a, GROUPS, **o), jnp.full((2, 2), 0.1)),
    ],
    "ssm_kernel": [
        (
            "dt",
            lambda dt, **o: ssm_kernel(-jnp.ones((1, 2)), None, jnp.ones((2, 2)), dt, length=3, **o),
            -jnp.ones(2),
        )
    ],
}
CALLS = [
    pytest.param(name, *call, marks=[pytest.mark.slow] * (i > 0 or name in ("summarize", "dplr_delta_rule")))
    for name, calls in NUMBERS.items()
    for i, call in enumerate(calls)
]


@pytest.mark.sample(2)
@pytest.mark.parametrize("name, argument, function, wrong", CALLS)
def test_the_wrong_sign(name, argument, function, wrong):
    for impl in ("reference", "xla"):
        with pytest.raises(
            ValueError, match=rf"{argument}.* holds .*; expected numbers of at (most|least) 0: .*, such as"
        ):
            function(wrong, impl=impl)
        run = jax.jit(functools.partial(function, impl=impl))
        assert any(jnp.isnan(leaf).any() for leaf in jax.tree.leaves(run(wrong)))
        right = -jnp.abs(wrong) if argument in ("log_decay", "a") else jnp.abs(wrong)
        allowed = [function(right, impl=impl), run(right)]
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(allowed))


@pytest.mark.slow
def test_a_log_decay_of_minus_infinity_forgets():
    for shape in ((1, 3, 1), (1, 3, 1, 2)):
        for impl in ("reference", "xla"):
            o, _ = GLA(log_decay=jnp.full(shape, -jnp.inf), scale=1.0, impl=impl)
            np.testing.assert_allclose(o, 2 * ONES, rtol=1e-6)


@pytest.mark.parametrize("differentiated", [lambda f: f, jax.grad])
def test_the_mistake_of_passing_a_decay(differentiated):
    with pytest.raises(ValueError, match="log_decay holds 0.9; .* pass the logarithm of the decay"):
        differentiated(lambda g: GLA(log_decay=g)[0].sum())(jnp.full((1, 3, 1), 0.9))
