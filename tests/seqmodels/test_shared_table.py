"""A table of values that several layers read: against layers with tables of their own that hold the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqmodels import build_model
from seqmodels.names import by_layer

KEYS = 4
CHANNEL = {"keys": KEYS, "key_dim": 4, "value_dim": 4, "gate_dim": 3, "top_k": 2}
MODEL = {
    "kind": "language_model",
    "vocab_size": 11,
    "width": 8,
    "depth": 4,
    "pattern": ("attention+ultra_memory", "attention+mlp"),
    "mixers": {"attention": {"heads": 2}},
}
# Layers with the memory.
READERS = (0, 2)
IDS = jnp.arange(12).reshape(2, 6) % 11


def make(shared, **options):
    """A model of random numbers; the permutations are drawn too."""
    channels = {"ultra_memory": CHANNEL | {"shared_table": shared}, "mlp": {"hidden": 6}}
    model = nnx.eval_shape(lambda: build_model(MODEL | {"channels": channels} | options, rngs=nnx.Rngs(0)))
    draws = np.random.default_rng(0)
    for path, variable in sorted(nnx.to_flat_state(nnx.state(model)), key=lambda item: str(item[0])):
        if path[-1] == "order":
            variable.set_value(jnp.asarray(draws.permutation(KEYS**2), jnp.float32))
        else:
            variable.set_value(jnp.asarray(0.5 * draws.standard_normal(variable.shape), jnp.float32))
    return model


def outputs_and_gradients(model):
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def run(parameters):
        def loss(parameters):
            logits = nnx.merge(graph, parameters, rest, copy=True)(IDS)[0]
            return (logits**2).mean(), logits

        return jax.value_and_grad(loss, has_aux=True)(parameters)

    (_, logits), gradients = run(parameters)
    return logits, by_layer(gradients)


def name(layer, table):
    return f"stack/blocks/{layer}/channel/{table}"


@pytest.mark.slow
def test_gradients_of_the_table_are_sums_over_layers():
    shared, own = make(True), make(False, scan=False)
    numbers = by_layer(shared)
    for layer in READERS:
        order = numbers[name(layer, "order")].astype(int)
        for path, variable in nnx.to_flat_state(nnx.state(own.stack.blocks[layer])):
            table = path[-1] in ("values", "gates") and path[0] == "channel"
            found = numbers[f"stack/blocks/{0 if table else layer}/{'/'.join(map(str, path))}"]
            variable.set_value(found[order] if table else found)
    for path, variable in nnx.to_flat_state(nnx.state(own)):
        if path[:2] != ("stack", "blocks") or path[2] not in READERS:
            variable.set_value(numbers["/".join(map(str, path))])
    (logits, gradients), (expected, each) = outputs_and_gradients(shared), outputs_and_gradients(own)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    for table in ("values", "gates"):
        total = jnp.zeros_like(gradients[name(0, table)])
        for layer in READERS:
            total = total.at[numbers[name(layer, "order")].astype(int)].add(each[name(layer, table)])
        assert jnp.abs(each[name(2, table)]).max() > 1e-4
        np.testing.assert_allclose(gradients[name(0, table)], total, atol=1e-6)


def test_the_table_is_there_once_under_the_first_layer_that_reads_it():
    model = nnx.eval_shape(
        lambda: build_model(
            MODEL | {"channels": {"ultra_memory": CHANNEL | {"shared_table": True}}}, rngs=nnx.Rngs(0)
        )
    )
    paths = {"/".join(map(str, path)): v for path, v in nnx.to_flat_state(nnx.state(model))}
    tables = [path for path in paths if path.endswith(("channel/values", "channel/gates"))]
    assert sorted(tables) == [name(0, "gates"), name(0, "values")]
    assert paths[name(0, "values")].get_metadata()["layers"] == (0,)
    assert not model.stack.repeats


@pytest.mark.slow
def test_orders_of_layers_differ_and_are_permutations():
    channels = {"ultra_memory": CHANNEL | {"shared_table": True}}
    model = build_model(MODEL | {"channels": channels}, rngs=nnx.Rngs(0))
    first, second = (np.asarray(model.stack.blocks[layer].channel.order[...]) for layer in READERS)
    assert (first != second).any()
    assert sorted(first) == sorted(second) == list(range(KEYS**2))


def test_a_shared_block_refuses_a_shared_table():
    channel = {"channel": "ultra_memory", **CHANNEL, "shared_table": True}
    with pytest.raises(ValueError, match="shared_table=True, and layers share the whole block"):
        nnx.eval_shape(
            lambda: build_model(
                MODEL | {"shared": {"layers": (0, 2), "channel": channel, "mixer": {"heads": 2}}},
                rngs=nnx.Rngs(0),
            )
        )
