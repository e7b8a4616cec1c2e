"""`attention` of few queries over the keys of a cache, beside the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.kernels import devices, dispatch
from layers.kernels.attention import Logits, Mask, Tokens, attention, attention_with_lse

B, S, H, G, KEY, VALUE = 2, 150, 4, 2, 5, 3
RNG = np.random.default_rng(0)
# Unused slots, the segment of the queries, and one before it.
KV_SEGMENTS = np.repeat([[1, 2, 0], [2, 1, 0]], [40, 90, 20], axis=1).astype(np.int32)
KV_POSITIONS = (
    np.concatenate([np.arange(40), np.arange(90), np.zeros(20)])[None].repeat(B, 0).astype(np.int32)
)
SLOPES = jnp.asarray([1.0, 0.5, 0.25, 0.1])
CASES = {
    "causal": (1, {"causal": True}),
    "several": (3, {"causal": True, "logits": Logits(logit_cap=2.0), "scale": 0.7}),
    "window": (3, {"causal": True, "mask": Mask(window=9, sink_tokens=2), "logits": Logits(slopes=SLOPES)}),
    "dilated": (2, {"causal": True, "mask": Mask(window=5, dilation=3)}),
    "both_sides": (
        2,
        {"mask": Mask(window=6), "logits": Logits(sink_logits=jnp.asarray([0.3, -1.0, 0.0, 2.0]))},
    ),
}


def drawn(t):
    shapes = {"q": (B, t, H, KEY), "k": (B, S, G, KEY), "v": (B, S, G, VALUE)}
    return {name: jnp.asarray(RNG.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


def where(t):
    """Segments of queries, the last of row 1 padding, and places: the last tokens of segments 2 and 1."""
    ids = np.array([[2] * t, [1] * t], np.int32)
    positions = np.array([np.arange(90 - t, 90)] * 2, np.int32)
    return {
        "segment_ids": jnp.asarray(ids),
        "tokens": Tokens(jnp.asarray(KV_SEGMENTS), jnp.asarray(positions), jnp.asarray(KV_POSITIONS)),
    }


def run(impl, arrays, options):
    @jax.jit
    def both(arrays):
        def loss(arrays):
            piece = attention_with_lse(**arrays, **options, impl=impl)
            weights = jnp.cos(jnp.arange(piece.output.size, dtype=jnp.float32)).reshape(piece.output.shape)
            finite = jnp.where(jnp.isfinite(piece.output), piece.output, 0)
            return jnp.sum(weights * finite) + jnp.sum(0.1 * piece.lse), piece

        return jax.value_and_grad(loss, has_aux=True)(arrays)

    (_, piece), gradients = both(arrays)
    return jax.device_get((piece.output, piece.lse + piece.lost)), jax.device_get(gradients)


@pytest.mark.sample(5)
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(name):
    t, options = CASES[name]
    options = options | where(t)
    arrays = drawn(t)
    got, gradients = run("few_queries", arrays, options)
    with jax.enable_x64(True):
        wide = {key: jnp.asarray(np.asarray(x, np.float64)) for key, x in arrays.items()}
        want, want_gradients = run("reference", wide, options)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5, rtol=2e-5)
    for key in arrays:
        np.testing.assert_allclose(gradients[key], want_gradients[key], atol=2e-5, rtol=2e-5, err_msg=key)
    half = {key: x.astype(jnp.bfloat16) for key, x in arrays.items()}
    rounded = attention(**half, **options, impl="few_queries")
    assert rounded.dtype == jnp.bfloat16
    exact = attention(**{key: x.astype(jnp.float32) for key, x in half.items()}, **options, impl="reference")
    assert np.linalg.norm(rounded.astype(np.float32) - exact) <= 1e-2 * np.linalg.norm(exact)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_hidden_reaches_nothing_and_what_is_seen_spoils(value):
    options = CASES["several"][1] | where(3)
    arrays = drawn(3)
    hidden = {
        key: np.where((np.array([[2], [1]]) == KV_SEGMENTS)[..., None, None], arrays[key], value)
        for key in "kv"
    }
    run_one = jax.jit(lambda arrays: attention(**arrays, **options, impl="few_queries"))
    spoiled = run_one(arrays | {key: jnp.asarray(x, jnp.float32) for key, x in hidden.items()})
    np.testing.assert_array_equal(spoiled, run_one(arrays))
    for key in "kv":
        seen = {key: arrays[key].at[0, 128, 1, 0].set(value)}  # position 88, which the last two queries see
        output = np.isfinite(run_one(arrays | seen))
        assert output[1].all()
        assert output[0, 0].all()
        assert output[0, :, :2].all()
        assert not output[0, 1:, 2:].any()


def test_a_row_that_sees_nothing_is_zero():
    options = {"segment_ids": jnp.zeros((B, 1), jnp.int32), "tokens": where(1)["tokens"]}
    piece = attention_with_lse(**drawn(1), **options, impl="few_queries")
    assert not piece.output.any()
    assert np.all(piece.lse == -np.inf)


def test_steps_over_a_cache_take_it():
    for t, s, want in ((1, S, "few_queries"), (8, S, "few_queries"), (9, S, "xla"), (1, 100, "xla")):
        q, k, v = (jnp.ones((1, length, 2, 8)) for length in (t, s, s))
        with devices.as_on("gpu"), dispatch.noted() as taken:
            jax.eval_shape(lambda q, k, v: attention(q, k, v), q, k, v)
        assert taken == [("attention", want)]
    with pytest.raises(ValueError, match="not prefix_lengths"):
        attention(q, q, q, causal=True, mask=Mask(prefix_lengths=jnp.ones(1, jnp.int32)), impl="few_queries")
