"""Softmax where all logits of a row are large and negative, against float64: values, gradients and pieces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.kernels.attention import Logits, Mask, Tokens, attention, attention_with_lse, compose, schedule

T, KEYS = 24, 24
LOWEST = float(np.finfo(np.float32).min)
SHIFTS = (-1e4, -1e9, LOWEST)


def draw(dtype):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, T, 2, 4)).astype(np.float32), dtype) for _ in range(3))
    return {"q": q, "k": k, "v": v}, jnp.asarray(rng.standard_normal((2, T, 2, 4)), dtype)


def outputs_and_gradients(shift, dtype, impl, sink=None, **options):
    arguments, weights = draw(dtype)
    # Products of 0.01 q k vanish beside the shift, alike in both types: the logits of the float64 reference are all equal.
    bias = jnp.full((1, 1, 1, 1), shift, dtype)

    def loss(arguments, sink):
        logits = Logits(bias=bias, sink_logits=sink)
        o = attention(**arguments, logits=logits, scale=0.0, impl=impl, **options)
        return (o * weights).sum(), o

    sink = None if sink is None else jnp.full(2, sink, dtype)
    (_, o), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(arguments, sink)
    return jax.tree.map(np.asarray, (o, gradients))


@pytest.mark.parametrize("shift", SHIFTS)
def test_one_key_of_each_is_a_gradient_of_one(shift):
    """q = k = 0 and a bias everywhere: dL/dv of sum(o) is 1 at every entry."""
    zeros, bias = jnp.zeros((1, 8, 1, 4)), jnp.full((1, 1, 8, 8), shift)
    gradient = jax.grad(lambda v: attention(zeros, zeros, v, logits=Logits(bias=bias)).sum())(
        jnp.ones((1, 8, 1, 4))
    )
    np.testing.assert_allclose(gradient, 1, rtol=1e-6)


OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"causal": True, "mask": Mask(window=5, sink_tokens=2)},
    "sink": {"causal": True, "sink": SHIFTS[1]},
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "causal")) for name in OPTIONS]
)
def test_large_negative_logits_match_float64(name, monkeypatch):
    monkeypatch.setattr(schedule, "CPU_STEP_BYTES", 4 * 4 * 8 * 8)
    monkeypatch.setattr(schedule, "PAIR_BLOCKS", (8, 8))
    with jax.enable_x64(True):
        want = outputs_and_gradients(SHIFTS[1], jnp.float64, "reference", **OPTIONS[name])
    for impl in ("reference", "xla"):
        got = outputs_and_gradients(SHIFTS[1], jnp.float32, impl, **OPTIONS[name])
        for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5 * max(np.abs(w).max(), 1))


@pytest.mark.slow
def test_pieces_of_large_negative_logits_compose():
    """One key against seven: the weights are 1/8 and 7/8, although both log-sum-exps round to -1e9."""
    zeros, v = jnp.zeros((1, 1, 1, 4)), jnp.arange(8.0).reshape(1, 8, 1, 1)
    bias = jnp.full((1, 1, 1, 1), -1e9)

    def joined(v):
        pieces = [
            attention_with_lse(
                zeros, jnp.zeros((1, n, 1, 4)), part, logits=Logits(bias=bias), tokens=Tokens()
            )
            for n, part in ((1, v[:, :1]), (7, v[:, 1:]))
        ]
        return compose(*pieces).output

    np.testing.assert_allclose(joined(v), 3.5, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda v: joined(v).sum())(v), 1 / 8, rtol=1e-6)
