"""The Hopper kernels of `gated_linear_attention` for heads that share queries and keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from layers.kernels import mosaic_gpu
from layers.kernels.gated_linear_attention import gated_linear_attention, gpu
from layers.kernels.gated_linear_attention.gpu import grouped as gpu_grouped
from layers.kernels.gated_linear_attention.gpu import grouped_queries as gpu_grouped_queries
from layers.kernels.gated_linear_attention.gpu.kernels import Settings
from tests.layers.kernels.test_gated_linear_attention_gpu import arguments_of, check, ids_of
from tests.layers.kernels.test_linear_recurrence_gpu import poisoned


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels run in the interpreter, with a flow taken at every chunk, and take groups of two heads."""
    monkeypatch.setattr(gpu, "SPAN", 1)
    monkeypatch.setattr(gpu_grouped, "FEWEST", 2)
    with mosaic_gpu.interpreted():
        yield


@pytest.mark.slow
@pytest.mark.parametrize(
    "heads, width, settings, segments",
    [
        ((1, 1, 4), 128, Settings(), True),
        ((2, 2, 4), 128, Settings(pieces=2), False),
        ((1, 1, 4), 128, Settings(stages=1), False),
        ((2, 2, 4), 64, Settings(), True),
    ],
    ids=str,
)
def test_interpreted_heads_that_share_queries_and_keys(
    interpreted, monkeypatch, heads, width, settings, segments
):
    for name in ("FORWARD", "BACKWARD"):
        monkeypatch.setattr(gpu, name, settings)
    rng = np.random.default_rng(5)
    arguments = arguments_of(rng, (1, 150), heads, (width, 64), strong=0.03 if segments else 0.0)
    check(arguments, segment_ids=ids_of(rng, (1, 150)) if segments else None)


@pytest.mark.slow
@pytest.mark.parametrize("heads", [(1, 1, 2), (2, 2, 2)], ids=["shared", "own"])
def test_interpreted_unseen_tokens_have_no_influence(interpreted, heads):
    """Not even NaN at padding; and what a token does not see takes a gradient of exactly zero."""
    rng = np.random.default_rng(6)
    ids = jnp.asarray([[0] * 5 + [1] * 30 + [2] * 45], jnp.int32)
    arguments = arguments_of(rng, (1, 80), heads, (128, 64))
    names = ("q", "k", "v", "log_decay")

    def loss(arguments):
        o, _ = gated_linear_attention(**arguments, segment_ids=ids, impl="gpu")
        return o[:, 50].astype(jnp.float32).sum(), o

    (_, o), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        arguments | {name: arguments[name].at[:, :5].set(jnp.nan) for name in names}
    )
    assert np.isfinite(np.asarray(o, np.float32)).all()
    assert not np.asarray(o, np.float32)[:, :5].any()
    assert np.isfinite(np.asarray(gradients["log_decay"])).all()
    for name in names[:3]:
        gradient = np.asarray(gradients[name], np.float32)
        assert gradient[:, 35:51].any()
        assert not gradient[:, :35].any()
        assert not gradient[:, 51:].any()


def test_blocks_take_heads_of_one_group():
    def taken(heads=(1, 1, 8), width=64, count=8, pairs=True):
        q, k, v = (jax.ShapeDtypeStruct((1, 8, n, width), jnp.bfloat16) for n in heads)
        return gpu_grouped.in_pairs(q, k, v, count, Settings(pairs=pairs))

    assert taken()
    assert not taken(pairs=False)
    assert taken(heads=(1, 1, 10), count=10)
    assert not taken(heads=(1, 1, 9), count=9)
    for other in ({"width": 128}, {"heads": (1, 2, 8)}, {"heads": (2, 2, 8)}, {"count": 16}):
        assert not taken(**other)


@pytest.mark.slow
def test_explicit_mesh():
    """Every device has whole groups of its rows, and its part of their heads."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), (jax.sharding.AxisType.Explicit,) * 2)

    def array(heads, width, spec):
        sharding = jax.NamedSharding(mesh, P("data", None, spec, None))
        return jax.ShapeDtypeStruct((8, 24, heads, width), jnp.bfloat16, sharding=sharding)

    def loss(q, k, v):
        o, final = gpu.gated_linear_attention(q, k, v, None, None, 1.0, False, None, None, 0)
        return o.astype(jnp.float32).sum() + final.sum()

    inputs = array(1, 128, None), array(1, 128, None), array(16, 64, "model")
    with jax.set_mesh(mesh):
        result = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*inputs).lower(lowering_platforms=("cuda",))
    assert f"tensor<2x24x{8 // gpu_grouped_queries.HEADS}x128xbf16>" in result.as_text()
    assert [v.sharding.spec for v in result.out_info] == [v.sharding.spec for v in inputs]


SHAPES = {
    "two groups of many": ((3, 1000), (2, 2, 32), (128, 64)),
    "narrow keys": ((2, 300), (2, 2, 16), (64, 64)),
    "one row, in pieces": ((1, 8200), (1, 1, 8), (128, 64)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("segments", [False, True], ids=["whole", "segments"])
@pytest.mark.parametrize("shape", SHAPES)
def test_on_gpu(shape, segments):
    """Fresh random inputs over memory that was filled with NaN."""
    rng = np.random.default_rng()
    size, heads, widths = SHAPES[shape]
    arguments = arguments_of(rng, size, heads, widths, strong=0.03 if segments else 0.0)
    poisoned(2**26)
    check(arguments, segment_ids=ids_of(rng, size, 0.01) if segments else None)


@pytest.mark.gpu
@pytest.mark.parametrize("stages, pairs", [(2, False), (1, True)])
def test_layouts_of_groups_on_gpu(monkeypatch, stages, pairs):
    for name in ("FORWARD", "BACKWARD"):
        monkeypatch.setattr(gpu, name, Settings(stages=stages, pairs=pairs))
    rng = np.random.default_rng()
    check(arguments_of(rng, (2, 2100), (1, 1, 16), (128, 64)), segment_ids=ids_of(rng, (2, 2100), 0.002))
