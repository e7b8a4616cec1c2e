"""Low-rank adapters of linear maps, beside each mixer and merged into it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.adapters import alpha_of, dropping, new_adapter, scale_of
from layers.channel import make_channel_mixer
from layers.mixers import make_mixer
from layers.parameters import linear
from seqmodels import build_model
from seqmodels.adapters import LoraConfig, adapt, linear_maps, merge_adapters, without_adapters
from tests.layers.mixers.table import MIXERS

# One mixer that calls its maps, and those that use their matrices in other places.
BY_DEFAULT = {"attention", "mla", "mamba2", "luna"}
CHANNELS = {"moe": {"experts": 3, "hidden": 4, "shared": 1}, "swiglu": {"hidden": 6}}
X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 12, 8)), jnp.float32)


def test_a_linear_map_gains_a_scaled_product():
    layer = linear(8, 6, rngs=nnx.Rngs(0))
    before = layer(X)
    layer.adapter = new_adapter(layer, 3, alpha=5.0, stabilized=True, rngs=nnx.Rngs(1))
    a = np.asarray(layer.adapter.a[...], np.float64)
    assert np.abs(a).max() <= 8**-0.5
    assert np.abs(a).max() > 0.8 * 8**-0.5
    np.testing.assert_array_equal(layer(X), before)
    b = np.random.default_rng(1).standard_normal((3, 6))
    layer.adapter.b.set_value(jnp.asarray(b, jnp.float32))
    added = 5 / np.sqrt(3) * np.asarray(X, np.float64) @ a @ b
    np.testing.assert_allclose(layer(X), np.asarray(before) + added, atol=1e-5)
    np.testing.assert_allclose(layer.matrix, layer.kernel[...] + 5 / np.sqrt(3) * a @ b, atol=1e-6)
    half = linear(8, 6, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    half.adapter = layer.adapter
    assert half(X).dtype == jnp.bfloat16
    np.testing.assert_allclose(half(X), layer(X), atol=0.1)


def test_inputs_of_adapters_are_dropped_in_training():
    """An adapter that adds its inputs shows them: zero, or divided by 3/4; each map of a call draws anew."""
    layer = linear(8, 8, rngs=nnx.Rngs(0))
    layer.kernel.set_value(jnp.zeros((8, 8)))
    layer.adapter = new_adapter(layer, 8, alpha=8.0, stabilized=False, dropout=0.25, rngs=nnx.Rngs(1))
    layer.adapter.a.set_value(jnp.eye(8))
    layer.adapter.b.set_value(jnp.eye(8))
    np.testing.assert_allclose(layer(X), X, atol=1e-6)
    with dropping(None):
        np.testing.assert_allclose(layer(X), X, atol=1e-6)
    with dropping(jax.random.key(5)):
        first, second = (np.asarray(layer(X)) for _ in range(2))
        with pytest.raises(ValueError, match=r"dropout=0\.25 stands at a map whose layer takes the matrix"):
            _ = layer.matrix
    for got in (first, second):
        kept = got != 0
        np.testing.assert_allclose(got[kept], np.asarray(X)[kept] / 0.75, rtol=1e-5)
        assert 0.6 < kept.mean() < 0.9
    assert (first != second).any()


def test_layers_drop_inputs_of_adapters_with_the_key_of_a_call():
    """Every layer draws from its own key, under a scan too; without a key nothing is dropped."""
    config = dict(vocab_size=11, width=8, depth=2, pattern=("attention",), mixers={"attention": {"heads": 2}})
    model = build_model({"kind": "language_model", **config, "channel": "swiglu"}, rngs=nnx.Rngs(0))
    adapt(model, LoraConfig(rank=2, dropout=0.5, targets=("query", "down")), rngs=nnx.Rngs(1))
    for module in linear_maps(model).values():
        if module.adapter is not None:
            module.adapter.b.set_value(jnp.ones_like(module.adapter.b[...]))
    run = jax.jit(lambda model, key: model(jnp.arange(10)[None], key=key)[0])
    bare, first, second = (run(model, key) for key in (None, jax.random.key(0), jax.random.key(1)))
    assert not np.allclose(bare, first)
    assert not np.allclose(first, second)
    with pytest.raises(
        ValueError, match=r"lora.dropout=0.5 .* fits embedding: inputs are dropped inside layers only"
    ):
        adapt(model, LoraConfig(rank=2, dropout=0.5, targets="embedding"), rngs=nnx.Rngs(1))


def test_alpha_follows_from_the_scale():
    for stabilized in (False, True):
        for rank in range(1, 40):
            assert alpha_of(scale_of(16.0, rank, stabilized), rank, stabilized) == 16.0


def check_all_maps_take_an_adapter(module):
    before = jax.jit(lambda m, x: m(x))(module, X)
    maps = linear_maps(module)
    rank = min(2, *(min(each.kernel.shape) for each in maps.values()))
    assert len(adapt(module, LoraConfig(rank, alpha=3.0, targets=".*"), rngs=nnx.Rngs(2))) == len(maps)

    @jax.jit
    def run(module, x):
        whole = nnx.merge(*nnx.split(module), copy=True)
        merge_adapters(whole)
        return module(x), whole(x)

    for got in run(module, X):
        jax.tree.map(np.testing.assert_array_equal, got, before)
    for number, names in enumerate(maps):
        b = maps[names].adapter.b
        b.set_value(0.3 * jax.random.normal(jax.random.key(number), b.shape))
    beside, merged = run(module, X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5), beside, merged)
    changed = jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), beside, before))
    assert max(changed) > 1e-3
    assert all(each.adapter is None for each in linear_maps(without_adapters(module)).values())


@pytest.mark.parametrize(
    "entry", [pytest.param(entry, marks=[pytest.mark.slow] * (entry not in BY_DEFAULT)) for entry in MIXERS]
)
def test_every_mixer_takes_adapters(entry):
    name, options = MIXERS[entry]
    module = make_mixer(name, options, given={"width": 8, "dtype": jnp.dtype("float32")}, rngs=nnx.Rngs(0))
    if linear_maps(module):
        check_all_maps_take_an_adapter(module)


@pytest.mark.parametrize("name", CHANNELS)
def test_channel_mixers_take_adapters(name):
    given = {"width": 8, "dtype": jnp.dtype("float32")}
    check_all_maps_take_an_adapter(make_channel_mixer(name, CHANNELS[name], given=given, rngs=nnx.Rngs(0)))
