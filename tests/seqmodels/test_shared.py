"""Blocks that several layers share, against their equations in NumPy: outputs, gradients, states and counts of parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import describe
from layers.adapters import new_adapter
from seqmodels import build_model
from seqmodels.adapters import linear_maps, merge_adapters
from seqmodels.config import StackConfig
from seqmodels.shared import SharedBlock, Use
from tests.seqmodels.test_published_options import rms

SHARED = {
    "layers": (0, 1, 2),
    "blocks": 2,
    "mixer": {"heads": 2, "position": "none", "output_projection": False},
    "channel": {"channel": "mlp", "hidden": 6, "activation": "relu"},
    "adapters": ("mixer/query", "mixer/key+mixer/value", "channel/up"),
    "rank": 3,
}
MODEL = {
    "kind": "language_model",
    "vocab_size": 11,
    "width": 8,
    "depth": 3,
    "pattern": ("attention+none",),
    "mixers": {"attention": {"heads": 2, "position": "none"}},
    "shared": SHARED,
}
IDS = jnp.arange(12).reshape(2, 6) % 11


def make(**options):
    """Returns a model of random numbers, without what initial values take to compile."""
    model = nnx.eval_shape(lambda: build_model(MODEL | options, rngs=nnx.Rngs(0)))
    draws = np.random.default_rng(0)
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        base = 1.0 if variable.ndim == 1 else 0.0
        variable.set_value(jnp.asarray(base + 0.4 * draws.standard_normal(variable.shape), jnp.float32))
    return model


def softmax(x):
    y = np.exp(x - x.max(-1, keepdims=True))
    return y / y.sum(-1, keepdims=True)


def attention(u, query, key, value):
    """Two heads of causal attention, side by side."""
    q, k, v = (np.split(u @ matrix, 2, axis=-1) for matrix in (query, key, value))
    size, time = q[0].shape[-1], u.shape[1]
    seen = np.tril(np.ones((time, time), bool))
    logits = [
        np.where(seen, a @ np.swapaxes(b, 1, 2) / size**0.5, -np.inf) for a, b in zip(q, k, strict=True)
    ]
    return np.concatenate([softmax(a) @ b for a, b in zip(logits, v, strict=True)], axis=-1)


def reference(model, ids):
    """The logits of the model of this file in float64."""

    def numbers(variable):
        return np.asarray(variable[...], np.float64)

    def norm(x, module):
        return rms(x) * numbers(module.scale)

    def kernels(module, *names):
        return [numbers(getattr(module, name).kernel) for name in names]

    entered = x = numbers(model.embedding.table)[np.asarray(ids)]
    for layer, block in enumerate(model.stack.blocks):
        read = x
        if layer in SHARED["layers"]:
            shared, use = model.stack.shared[SHARED["layers"].index(layer) % 2], block.use
            query, both, up = (numbers(one.a) @ numbers(one.b) for one in use.adapters)
            own = kernels(shared.mixer, "query", "key", "value")
            u = norm(np.concatenate([x, entered], axis=-1), shared.mixer_norm)
            y = attention(u, own[0] + query, own[1] + both[:, :16], own[2] + both[:, 16:])
            y = norm(y @ numbers(shared.projection.kernel), shared.channel_norm)
            y = np.maximum(y @ (numbers(shared.channel.up.kernel) + up), 0) @ numbers(
                shared.channel.down.kernel
            )
            read = x + y @ numbers(use.output.kernel)
        heads = attention(norm(read, block.mixer_norm), *kernels(block.mixer, "query", "key", "value"))
        x = x + heads @ numbers(block.mixer.output.kernel)
    return norm(x, model.norm) @ numbers(model.embedding.table).T


@pytest.fixture(scope="module")
def model():
    return make()


def loss(logits):
    return (logits**2).mean()


def test_outputs_states_and_gradients(model):
    """The gradient of a shared matrix is the sum over its uses: the derivative of the reference."""
    graph, variables = nnx.split(model)

    @jax.jit
    def run(variables):
        def backward(variables):
            logits = nnx.merge(graph, variables, copy=True)(IDS)[0]
            return loss(logits), logits

        model = nnx.merge(graph, variables, copy=True)
        head, state = model(IDS[:, :3], model.init_state(2, max_length=6))
        tail, _ = model(IDS[:, 3:], state)
        (_, logits), gradient = jax.value_and_grad(backward, has_aux=True)(variables)
        return logits, jnp.concatenate([head, tail], axis=1), gradient

    logits, parts, gradient = run(variables)
    np.testing.assert_allclose(logits, reference(model, IDS), atol=3e-5)
    np.testing.assert_allclose(parts, logits, atol=3e-5)
    assert all(jnp.any(one) for one in jax.tree.leaves(gradient))
    kernel = model.stack.shared[0].projection.kernel
    own, step = kernel[...], 1e-3 * np.random.default_rng(1).standard_normal(kernel.shape)
    losses = []
    for sign in (1, -1):
        kernel.set_value(own + sign * step)
        losses.append(loss(reference(model, IDS)))
    kernel.set_value(own)
    found = gradient["stack"]["shared"][0]["projection"]["kernel"][...]
    np.testing.assert_allclose((found * step).sum(), (losses[0] - losses[1]) / 2, rtol=1e-3)


@pytest.mark.slow
def test_rematerialised_padded_and_packed_rows(model):
    graph, variables = nnx.split(model)
    saving = nnx.split(make(remat="full"))[0]
    ids, segments = jnp.concatenate([IDS[:1], IDS[1:]], axis=1), jnp.repeat(jnp.array([[1, 2]]), 6, axis=1)
    padded = [jnp.pad(each, ((0, 0), (2, 1))) for each in (ids, segments)]

    @jax.jit
    def run(variables):
        def backward(variables, graph):
            logits = nnx.merge(graph, variables, copy=True)(IDS)[0]
            return loss(logits), logits

        (_, logits), gradient = jax.value_and_grad(backward, has_aux=True)(variables, graph)
        again = jax.grad(backward, has_aux=True)(variables, saving)[0]
        rows = nnx.merge(graph, variables)(padded[0], segment_ids=padded[1])[0]
        return logits, rows[:, 2:-1].reshape(logits.shape), gradient, again

    logits, rows, gradient, again = run(variables)
    np.testing.assert_allclose(rows, logits, atol=3e-5)
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4, rtol=1e-3)


def test_low_rank_adapters_of_a_user_beside_those_of_uses(model):
    """They add to the shared matrices of all uses, before and after they are merged."""
    own = nnx.merge(*nnx.split(model), copy=True)
    for name in (("stack/shared/0/mixer/query",), ("stack/shared/1/channel/up",)):
        module = linear_maps(own)[name]
        module.adapter = new_adapter(module, 2, alpha=3.0, stabilized=False, rngs=nnx.Rngs(5))
        module.adapter.b[...] = jax.random.normal(jax.random.key(1), module.adapter.b.shape)
    before = jax.jit(lambda ids: own(ids)[0])(IDS)
    merge_adapters(own)
    np.testing.assert_allclose(before, reference(own, IDS), atol=3e-5)
    assert np.abs(before - reference(model, IDS)).max() > 1e-2


def test_shared_parameters_are_counted_once():
    given = {name: value for name, value in MODEL.items() if name != "vocab_size"} | {"kind": "classifier"}
    config = {"seed": 0, "task": {"name": "listops"}, "model": given}
    record = describe.describe(config, [8])
    block = 3 * 16 * 16 + 16 * 8 + 2 * 8 * 6 + 16 + 8
    assert record["shared_blocks"]["parameters"] == 2 * block
    layers = sum(row["parameters"] for row in record["layers"])
    assert record["parameters"] == layers + 2 * block + record["embedding_and_head"]["parameters"]
    uses = 8 * 8 + 3 * (16 + 16 + 16 + 32 + 8 + 6)
    assert record["layers"][1]["parameters"] - uses == 4 * 8 * 8 + 8
    (row,) = (line for line in describe.table(record).splitlines() if "shared blocks" in line)
    assert row.split()[-1] == f"{2 * block:,}"


def test_a_use_begins_with_adapters_that_add_nothing():
    config = StackConfig(
        width=8, depth=1, pattern=("attention",), shared=SHARED | {"layers": (0,), "blocks": 1}
    )
    use = Use(config, SharedBlock(config, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    assert all(not jnp.any(one.b[...]) and jnp.any(one.a[...]) for one in use.adapters)
