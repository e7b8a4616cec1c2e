"""`attention` by cuDNN: which calls it takes, and that it computes them as defined."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from layers.kernels.attention import (
    Logits,
    Mask,
    Tokens,
    attention,
    attention_with_lse,
    cudnn,
)
from layers.kernels.attention.options import read_options
from layers.kernels.segments import Segments
from tests.layers.kernels.test_attention import (
    close,
    draw,
    normal,
)


def cudnn_refusal(monkeypatch, options, dtype=jnp.bfloat16, sizes=(64, 64), capability="9.0", length=8):
    client = types.SimpleNamespace(platform_version="PJRT C API\ncuda 13000")
    device = types.SimpleNamespace(
        platform="gpu", client=client, compute_capability=capability, device_kind="NVIDIA"
    )
    monkeypatch.setattr(cudnn, "_device", lambda: device)
    q = k = jnp.zeros((1, length, 2, sizes[0]), dtype)
    v = jnp.zeros((1, length, 2, sizes[1]), dtype)
    return cudnn.refuses(q, k, v, read_options(q, k, v, **options))


def test_cudnn_takes_only_what_it_computes_as_defined(monkeypatch):
    refusal = functools.partial(cudnn_refusal, monkeypatch)
    ids = jnp.ones((1, 8), jnp.int32)
    whole = Segments.of(ids, padding="end", packed=False)
    for options in ({}, {"causal": True}, {"causal": True, "mask": Mask(window=4), "scale": 1.0}):
        assert refusal(options) is None
    for options in ({}, {"causal": True}, {"causal": True, "mask": Mask(window=4)}):
        assert refusal({**options, "segment_ids": whole}) is None
        assert refusal({**options, "segment_ids": Segments.of(ids, padding="end", packed=3)}) is None
        for less in (ids, Segments.of(ids, packed=False)):
            assert "Segments.of(segment_ids, padding='end')" in refusal({**options, "segment_ids": less})
        for most, said in ((True, "an unknown number"), (65, "65")):
            less = Segments.of(ids, padding="end", packed=most)
            assert f"at most 64 segments, and these hold {said}" in refusal({**options, "segment_ids": less})
    assert "window is causal" in refusal({"mask": Mask(window=4)})
    assert "not sink_tokens" in refusal({"mask": Mask(window=4, sink_tokens=1)})
    assert "not dilation" in refusal({"causal": True, "mask": Mask(window=4, dilation=2)})
    first = jnp.zeros((1, 1), jnp.int32)
    assert "not global_queries" in refusal({"causal": True, "mask": Mask(window=4, global_queries=first)})
    assert "not kv_lengths" in refusal({"tokens": Tokens(kv_lengths=jnp.ones(1, jnp.int32))})
    assert "not kv_segment_ids" in refusal({"segment_ids": whole, "tokens": Tokens(kv_segment_ids=ids)})
    assert "not logit_cap" in refusal({"logits": Logits(logit_cap=5.0)})
    assert "float32" in refusal({}, dtype=jnp.float32)
    assert "multiple of 8" in refusal({}, sizes=(60, 60))
    assert refusal({}, sizes=(192, 128)) is None
    packed = Segments.of(ids, padding="end", packed=3)
    assert "of one size for k and v in packed rows" in refusal({"segment_ids": packed}, sizes=(192, 128))
    assert "packed rows from" in refusal({"segment_ids": packed}, capability="8.0")
    assert "of one size for k and v below" in refusal({}, sizes=(64, 128), capability="8.0")
    assert "up to 128" in refusal({}, sizes=(256, 256), capability="8.0")
    assert "compute capability 8.0" in refusal({}, capability="7.5")
    assert "even lengths" in refusal({}, length=7)


def test_cudnn_takes_whole_rows(monkeypatch):
    mesh = jax.make_mesh((2,), ("sequence",), (AxisType.Auto,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        assert "the mesh divides time over 'sequence'" in cudnn_refusal(monkeypatch, {"causal": True})
        whole = functools.partial(cudnn_refusal, monkeypatch, {"causal": True})
        local = jax.shard_map(
            lambda x: x + (whole() is None), in_specs=P("sequence"), out_specs=P("sequence")
        )
        assert local(jnp.zeros(2)).all()


def test_cudnn_says_why_not():
    narrow = {n: v.astype(jnp.bfloat16) for n, v in draw(40, 40).items()}
    with pytest.raises(
        ValueError, match="impl='cudnn' of attention cannot take this call: it needs an NVIDIA GPU"
    ):
        attention(**narrow, impl="cudnn")
    with pytest.raises(ValueError, match="impl='cudnn' is not an implementation of attention_with_lse"):
        attention_with_lse(**narrow, impl="cudnn")


IDS = jnp.repeat(jnp.array([[1, 1, 1, 0], [2, 0, 0, 0], [0, 0, 0, 0], [1, 2, 2, 1]]), 32, 1)
PADDED = Segments.of(IDS[:3], padding="end", packed=False)
PACKED = Segments.of(IDS, padding="end", packed=4)


def test_lengths_and_starts_are_those_of_the_segments():
    ids = jnp.array([[3, 3, 5, 3, 0], [2, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    lengths, starts = cudnn._where(Segments.of(ids, padding="end", packed=4))
    np.testing.assert_array_equal(lengths, [[2, 1, 1, -1], [1, -1, -1, -1], [-1] * 4])
    np.testing.assert_array_equal(starts, [[0, 2, 3, -1, -1], [0, -1, -1, -1, -1], [-1] * 5])
    lengths, starts = cudnn._where(Segments.of(ids.at[0].set(1), padding="end", packed=False))
    assert starts is None
    np.testing.assert_array_equal(lengths, [5, 1, 0])


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "mask": Mask(window=20)}])
@pytest.mark.parametrize("segments", [PADDED, PACKED], ids=["padded", "packed"])
def test_cudnn_leaves_out_padding_and_other_segments(segments, options):
    """Whatever stands there, not a number included, outputs and gradients are those of the reference, zero at padding."""
    rows = segments.shape[0]
    shapes = {"q": (rows, 128, 8, 64), "k": (rows, 128, 2, 64), "v": (rows, 128, 2, 64)}
    arguments = {n: normal(i, *shape).astype(jnp.bfloat16) for i, (n, shape) in enumerate(shapes.items())}

    def loss(arguments, impl):
        output = attention(**arguments, **options, segment_ids=segments, impl=impl).astype(jnp.float32)
        return (output * normal(9, *output.shape)).sum(), output

    run = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    spoilt = {n: jnp.where(segments.real[..., None, None], v, jnp.nan) for n, v in arguments.items()}
    got = run(spoilt, "cudnn")
    want = run({n: v.astype(jnp.float32) for n, v in arguments.items()}, "reference")
    close(got[1], want[1], 1e-2, "output")
    assert (np.asarray(got[1])[~np.asarray(segments.real)] == 0).all()
    for name in want[0]:
        close(got[0][name].astype(jnp.float32), want[0][name], 1e-2, f"gradient of {name}")
        assert (np.asarray(got[0][name], np.float32)[~np.asarray(segments.real)] == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"causal": True, "mask": Mask(window=50), "scale": 0.2}]
)
@pytest.mark.parametrize("t", [2, 130, 512])
def test_cudnn_matches_the_reference(options, t):
    shapes = {"q": (2, t, 8, 64), "k": (2, t, 2, 64), "v": (2, t, 2, 64)}
    arguments = {n: normal(i, *shape).astype(jnp.bfloat16) for i, (n, shape) in enumerate(shapes.items())}

    def loss(arguments, impl):
        output = attention(**arguments, **options, impl=impl).astype(jnp.float32)
        return (output * normal(9, *output.shape)).sum(), output

    run = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    got, want = (
        run(arguments, "cudnn"),
        run({n: v.astype(jnp.float32) for n, v in arguments.items()}, "reference"),
    )
    close(got[1], want[1], 1e-2, "output")
    for name in want[0]:
        close(got[0][name].astype(jnp.float32), want[0][name], 1e-2, f"gradient of {name}")


@pytest.mark.gpu
def test_cudnn_takes_values_of_another_size_than_keys():
    shapes = {"q": (2, 130, 4, 192), "k": (2, 130, 4, 192), "v": (2, 130, 4, 128)}
    arguments = {n: normal(i, *shape).astype(jnp.bfloat16) for i, (n, shape) in enumerate(shapes.items())}

    def loss(arguments, impl):
        output = attention(**arguments, causal=True, impl=impl).astype(jnp.float32)
        return (output * normal(9, *output.shape)).sum(), output

    run = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    got = run(arguments, "cudnn")
    want = run({n: v.astype(jnp.float32) for n, v in arguments.items()}, "reference")
    close(got[1], want[1], 1e-2, "output")
    for name in want[0]:
        close(got[0][name].astype(jnp.float32), want[0][name], 1e-2, f"gradient of {name}")


@pytest.mark.gpu
@pytest.mark.parametrize("segments", [None, PADDED, PACKED], ids=["whole", "padded", "packed"])
def test_cudnn_under_vmap_is_a_call_of_more_rows(segments):
    rows = 2 if segments is None else segments.shape[0]
    q, k, v = (normal(i, 3, rows, 128, 2, 64).astype(jnp.bfloat16) for i in range(3))

    def loss(q, k, v, segments):
        return (attention(q, k, v, causal=True, segment_ids=segments, impl="cudnn") ** 2).sum()

    both = jax.value_and_grad(loss, argnums=(0, 1, 2))
    got = jax.jit(jax.vmap(both, in_axes=(0, None, 0, None)))(q, k[0], v, segments)
    for i in range(3):
        want = both(q[i], k[0], v[i], segments)
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            close(one[i].astype(jnp.float32), other.astype(jnp.float32), 1e-2, f"replica {i}")


@pytest.mark.gpu
def test_more_segments_than_stated_give_nan():
    q, k, v = (normal(i, 4, 128, 2, 64).astype(jnp.bfloat16) for i in range(3))
    segments = Segments.of(IDS, padding="end", packed=2)
    output = attention(q, k, v, causal=True, segment_ids=segments, impl="cudnn")
    np.testing.assert_array_equal(np.isnan(np.asarray(output, np.float32)).any((2, 3)), segments.numbers > 2)
