"""Linformer against its equation in NumPy, against softmax attention, and its bound on length."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.kernels.attention import attention
from layers.mixers.attention.linformer import Linformer, LinformerConfig
from tests.layers.mixers.literal import apply, heads, wide

WIDTH, TIME, LONGEST = 6, 9, 12
X = np.random.default_rng(0).standard_normal((2, TIME, WIDTH)).astype(np.float32)


def make(**options):
    options = {"max_length": LONGEST, "projected": 5, "heads": 2, **options}
    return Linformer(LinformerConfig(WIDTH, **options), rngs=nnx.Rngs(0))


def literal(model, x):
    count = model.config.heads
    q, k, v = (heads(apply(m, x), count) for m in (model.query, model.key, model.value))
    e, f = (wide(p)[..., : len(x)] for p in (model.projections[0], model.projections[-1]))
    outputs = []
    for head in range(count):
        mine = head if len(e) > 1 else 0
        logits = q[:, head] @ (e[mine] @ k[:, head]).T / np.sqrt(q.shape[-1])
        weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        outputs.append(weights @ (f[mine] @ v[:, head]))
    return apply(model.output, np.concatenate(outputs, axis=1))


@pytest.mark.parametrize("sharing, stored", [("none", [2, 2]), ("heads", [1, 1]), ("key_value", [1])])
def test_equals_the_equation(sharing, stored):
    model = make(sharing=sharing, bias=True)
    assert [p.shape for p in model.projections] == [(n, 5, LONGEST) for n in stored]
    got, _ = model(jnp.asarray(X))
    want = np.stack([literal(model, row.astype(np.float64)) for row in X])
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_with_the_identity_for_projection_it_is_softmax_attention():
    model = make(projected=TIME, max_length=TIME, sharing="key_value")
    model.projections[0][...] = jnp.eye(TIME)[None]
    x = jnp.asarray(X)
    q, k, v = (m(x).reshape(2, TIME, 2, 3) for m in (model.query, model.key, model.value))
    want = model.output(attention(q, k, v).reshape(2, TIME, WIDTH))
    np.testing.assert_allclose(model(x)[0], want, atol=2e-6)


def test_sequences_longer_than_max_length_are_refused_or_give_nan():
    model = make(max_length=6)
    with pytest.raises(ValueError, match="x has 9 tokens; Linformer was made for max_length=6"):
        model(jnp.asarray(X))
    ids = jnp.asarray([[1] * 7 + [2] * 2, [1] * 3 + [2] * 6])
    got = np.asarray(model(jnp.asarray(X), segment_ids=ids)[0])
    assert np.isnan(got[0, :7]).all()
    assert np.isfinite(got[0, 7:]).all()
    assert np.isfinite(got[1]).all()
    np.testing.assert_allclose(got[1, 3:], literal(model, X[1, 3:].astype(np.float64)), atol=2e-6)


def test_initial_projections_have_the_scale_of_the_authors_code():
    model = make(projected=64, max_length=192, sharing="none")
    assert np.var(model.projections[0][...]) == pytest.approx(1 / (64 + 192), rel=0.05)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"heads": 4}, "heads=4 does not divide width=6"),
        ({"max_length": 0}, "max_length=0"),
        ({"sharing": "layers"}, "sharing='layers'"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
