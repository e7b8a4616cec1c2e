"""Visits of keys by cuDNN's kernels, with plain forms in place of the kernels here, and with the kernels on two GPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from layers.kernels.attention import Mask, attention, attention_with_lse, cudnn
from layers.kernels.dispatch import noted
from layers.kernels.segments import Segments
from layers.kernels.sequence_parallel import attention_by

METHODS = "ring", "zigzag", "balanced_ring", "token_ring"


def mesh_of(count):
    return jax.make_mesh((count,), ("sequence",), (AxisType.Auto,), devices=jax.devices()[:count])


def plain_forward(static, q, k, v, lengths, starts):
    """What `cudnn.forward` returns."""
    scale, causal, _ = static
    repeats = q.shape[2] // k.shape[2]
    logits = scale * jnp.einsum("bthd,bshd->bhts", q, jnp.repeat(k, repeats, axis=2))
    if causal:
        logits = jnp.where(jnp.tril(jnp.ones(logits.shape[2:], bool)), logits, -jnp.inf)
    output = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(logits), jnp.repeat(v, repeats, axis=2))
    return output, jax.nn.logsumexp(logits, axis=-1)


def plain_backward(static, q, k, v, lengths, starts, lse, output, gradient):
    """What `cudnn.backward` returns: the gradients for probabilities exp(a - lse), which need not sum to 1 over these keys."""
    scale, causal, _ = static

    def weighted(q, k, v):
        repeats = q.shape[2] // k.shape[2]
        logits = scale * jnp.einsum("bthd,bshd->bhts", q, jnp.repeat(k, repeats, axis=2))
        p = jnp.exp(logits - lse[..., None])
        if causal:
            p = jnp.where(jnp.tril(jnp.ones(p.shape[2:], bool)), p, 0)
        delta = (gradient * output).sum(-1)
        read = jnp.einsum("bhts,bshd->bthd", p, jnp.repeat(v, repeats, axis=2))
        return (gradient * read).sum() - (jnp.moveaxis(p.sum(-1), 1, 2) * jax.lax.stop_gradient(delta)).sum()

    return jax.grad(weighted, argnums=(0, 1, 2))(q, k, v)


@pytest.fixture
def plain(monkeypatch):
    monkeypatch.setattr(cudnn, "forward", plain_forward)
    monkeypatch.setattr(cudnn, "backward", plain_backward)
    monkeypatch.setattr(cudnn, "refuses_on_device", lambda q, k, v, options: cudnn._unknown_option(options))


def drawn(time, heads=4, of_keys=2, features=8, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = (2, time, heads, features), (2, time, of_keys, features), (2, time, of_keys, features)
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def value_and_gradients(run, q, k, v):
    weights = jnp.asarray(np.random.default_rng(1).standard_normal(q.shape), jnp.float32)

    def loss(q, k, v):
        output = run(q, k, v)
        return (output * weights).sum(), output

    gradients, output = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    return jax.device_get((output, *gradients))


@pytest.mark.parametrize(
    "count, causal",
    [(4, True), *(pytest.param(*x, marks=pytest.mark.slow) for x in ((2, True), (4, False), (5, True)))],
)
@pytest.mark.parametrize(
    "method",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in ("ring", "token_ring"))) for name in METHODS],
)
def test_equals_one_device(plain, method, count, causal):
    arguments = drawn(8 * count)
    run = functools.partial(attention, causal=causal)
    want = value_and_gradients(functools.partial(run, impl="reference"), *arguments)
    with jax.set_mesh(mesh_of(count)), attention_by(method), noted() as taken:
        got = value_and_gradients(run, *arguments)
    assert ("attention", "cudnn") in taken
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_what_they_cannot_take_is_left_to_plain_jax(plain):
    q, k, v = drawn(32)
    segments = Segments.of(jnp.ones((2, 32), jnp.int32))
    with jax.set_mesh(mesh_of(4)), attention_by("ring"), noted() as taken:
        calls = [
            lambda: attention(q, k, v, causal=True, mask=Mask(window=5)),
            lambda: attention(q, k, v, causal=True, segment_ids=segments),
            lambda: attention(q, k, v, causal=True, impl="xla"),
            lambda: attention_with_lse(q, k, v, causal=True),
        ]
        for call in calls:
            jax.eval_shape(call)
        assert [name for _, name in taken] == ["xla"] * 4
        with pytest.raises(
            ValueError,
            match="impl='cudnn' of attention cannot take the visits of method='ring': they know no segm",
        ):
            attention(q, k, v, causal=True, segment_ids=segments, impl="cudnn")
        with pytest.raises(ValueError, match="impl='reference' of attention takes whole rows of keys"):
            attention(q, k, v, causal=True, impl="reference")
    with (
        jax.set_mesh(mesh_of(4)),
        attention_by("zigzag"),
        pytest.raises(ValueError, match="a device has 6 tokens"),
    ):
        attention(*drawn(24), causal=True, impl="cudnn")


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_two_gpus_equal_one(method):
    """Runs on the first two GPUs; a machine with one measures the same program on a mesh of one device, without visits."""
    count = min(2, jax.device_count())
    q, k, v = drawn(512, heads=8, of_keys=2, features=64, dtype=jnp.bfloat16)
    wide = tuple(x.astype(jnp.float32) for x in (q, k, v))
    want = value_and_gradients(functools.partial(attention, causal=True, impl="reference"), *wide)
    mesh = mesh_of(count)
    with jax.set_mesh(mesh), attention_by(method):
        parts = jax.device_put((q, k, v), jax.NamedSharding(mesh, P(None, "sequence")))
        got = value_and_gradients(functools.partial(attention, causal=True, impl="cudnn"), *parts)
    for one, other in zip(got, want, strict=True):
        assert np.abs(one.astype(np.float32) - other).max() <= 2e-2 * np.abs(other).max()
