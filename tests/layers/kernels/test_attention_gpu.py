"""The Triton kernels of attention of one query per row: interpreted, lowered, and on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from layers.kernels import devices, pallas_triton
from layers.kernels.attention import Logits, Mask, Tokens, attention, attention_with_lse
from layers.kernels.attention.gpu import kernels

# Both round weights and values to bfloat16.
TOLERANCE = 1e-2
OPTIONS = {
    "causal": {"causal": True},
    "bidirectional_capped": {"logits": Logits(logit_cap=2.0), "scale": 0.7},
    "window_sinks": {"causal": True, "mask": Mask(window=30, sink_tokens=4)},
    "sink_logits": {"causal": True, "logits": Logits(sink_logits=jnp.arange(8.0) - 4)},
}


def draw(batch, keys, heads, groups, size, values, seed=0):
    """A cache (b, s) that is full up to a length per row, the first row throughout, what is not finite behind it, and a last query."""
    rng = np.random.default_rng(seed)
    shapes = (batch, 1, heads, size), (batch, keys, groups, size), (batch, keys, groups, values)
    q, k, v = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes)
    lengths = jnp.asarray([keys, *rng.integers(1, keys // 4, batch - 1)], jnp.int32)[:, None]
    places = jnp.broadcast_to(jnp.arange(keys, dtype=jnp.int32), (batch, keys))
    full = places < lengths
    k, v = jnp.where(full[..., None, None], k, jnp.nan), jnp.where(full[..., None, None], v, jnp.inf)
    tokens = Tokens(full.astype(jnp.int32), lengths - 1, places)
    return (q, k, v), {"segment_ids": jnp.ones((batch, 1), jnp.int32), "tokens": tokens}


def close(got, want):
    got, want = (np.asarray(jnp.asarray(x, jnp.float32)) for x in (got, want))
    assert np.isfinite(got).all()
    assert np.linalg.norm(got - want) <= TOLERANCE * np.linalg.norm(want)


def check(arrays, options):
    """Compares outputs and log-sum-exps with the reference in float32."""
    found = attention_with_lse(*arrays, impl="gpu", **options)
    want = attention_with_lse(*(x.astype(jnp.float32) for x in arrays), impl="reference", **options)
    close(found.output, want.output)
    close(found.lse, want.lse)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "causal")) for n in OPTIONS]
)
def test_interpreted(name, monkeypatch):
    """Three parts of the keys and an empty one; the second row sees keys of the first alone."""
    monkeypatch.setattr(kernels, "PROGRAMS", 16)
    arrays, options = draw(2, 150, 8, 2, 24, 16)
    with pallas_triton.interpreted():
        check(arrays, options | OPTIONS[name])


@pytest.mark.slow
def test_rows_that_see_nothing_are_zero(monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", 8)
    arrays, options = draw(2, 70, 4, 4, 16, 16)
    options["segment_ids"] = jnp.asarray([[0], [1]], jnp.int32)
    with pallas_triton.interpreted():
        found = attention(*arrays, impl="gpu", causal=True, **options)
    assert not found[0].any()
    assert found[1].any()


@pytest.mark.slow
def test_batches_are_more_rows():
    arrays, options = draw(2, 70, 4, 2, 16, 16)
    with pallas_triton.interpreted():
        want = attention(*arrays, impl="gpu", causal=True, **options)

        def one(q):
            return attention(q, *arrays[1:], impl="gpu", causal=True, **options)

        found = jax.vmap(one)(jnp.stack([arrays[0], 2 * arrays[0]]))
        assert str(jax.make_jaxpr(jax.vmap(one))(jnp.stack([arrays[0]] * 2))).count("pallas_call[") == 2
    np.testing.assert_array_equal(found[0], want)


@pytest.mark.slow
def test_gradients_are_those_of_xla():
    arrays, options = draw(2, 70, 4, 2, 16, 16)
    arrays = tuple(jnp.where(jnp.isfinite(x), x, 0) for x in arrays)

    def gradients(impl):
        def loss(*arrays):
            return jnp.square(attention(*arrays, impl=impl, causal=True, **options).astype(jnp.float32)).sum()

        return jax.grad(loss, (0, 1, 2))(*arrays)

    with pallas_triton.interpreted():
        found = gradients("gpu")
    for got, want in zip(found, gradients("xla"), strict=True):
        close(got, want)


def test_lowers_for_a_gpu_by_shards():
    """Rows and heads are shared out as those of the keys are."""
    mesh = pallas_triton.hopper_mesh(data=4, model=2)
    spec = P("data", None, "model")
    q, k = (
        jax.ShapeDtypeStruct((8, t, h, 64), jnp.bfloat16, sharding=jax.NamedSharding(mesh, spec))
        for t, h in ((1, 8), (300, 4))
    )

    def run(q, k):
        place = jnp.zeros((8, 1), jnp.int32)
        tokens = Tokens(jnp.ones((8, 300), jnp.int32), place, jnp.zeros((8, 300), jnp.int32))
        return attention(q, k, k, causal=True, segment_ids=place + 1, tokens=tokens, impl="gpu")

    with devices.as_on("gpu"), jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(run).trace(q, k).lower(lowering_platforms=("cuda",)).as_text()
    assert "tensor<2x300x2x64xbf16>" in text


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": jnp.zeros((1, 2, 4, 16), jnp.bfloat16)}, "it takes one query per row"),
        ({"q": jnp.zeros((1, 1, 4, 16))}, "all bfloat16 or all float16"),
        ({"logits": Logits(slopes=jnp.ones(4))}, "it takes no slopes"),
        ({"mask": Mask(window=3, global_keys=jnp.zeros((1, 1, 1), jnp.int32))}, "it takes no global_keys"),
        ({"k": jnp.zeros((1, 8, 4, 16), jnp.bfloat16)}, "needs a Hopper GPU"),
    ],
)
def test_refusals(change, message):
    given = {
        "q": jnp.zeros((1, 1, 4, 16), jnp.bfloat16),
        "k": jnp.zeros((1, 8, 4, 16), jnp.bfloat16),
        "v": jnp.zeros((1, 8, 4, 16), jnp.bfloat16),
    } | change
    if "mask" in change:
        places = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 8), jnp.int32)
        given["tokens"] = Tokens(q_positions=places[0], kv_positions=places[1])
    elif "logits" in change:
        given["tokens"] = Tokens(
            q_positions=jnp.zeros((1, 1), jnp.int32), kv_positions=jnp.zeros((1, 8), jnp.int32)
        )
    with pytest.raises(ValueError, match=f"impl='gpu' .*{message}"):
        attention(**given, impl="gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("batch, keys, sizes", [(1, 4480, (32, 8, 64, 64)), (32, 700, (8, 8, 128, 96))])
def test_on_gpu(batch, keys, sizes, name):
    arrays, options = draw(batch, keys, *sizes)
    more = dict(OPTIONS[name])
    if name == "sink_logits":
        more["logits"] = Logits(sink_logits=jnp.linspace(-4.0, 4.0, sizes[0]))
    check(arrays, options | more)
