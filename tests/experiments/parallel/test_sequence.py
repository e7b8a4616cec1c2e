"""Training with time divided over devices gives the losses of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.config.loading import MeshConfig
from experiments.parallel.mesh import Devices
from experiments.parallel.over_time import without_form
from experiments.training import experiment
from layers import mixers
from layers.kernels import dispatch
from layers.segments import Segments
from layers.sharding_rules import ShardingRules
from tests.layers.mixers.table import MIXERS as TABLE
from tests.layers.mixers.test_partitioned import WITHOUT

STEPS = 3
MESHES = {
    "sequence 8": MeshConfig(sequence=8),
    "data 2 x tensor 2 x sequence 2": MeshConfig(data=2, tensor=2, sequence=2),
    "data 2 x fsdp 2 x sequence 2": MeshConfig(data=2, fsdp=2, sequence=2, states="all_scan"),
}
BY = {
    method: MeshConfig(data=2, fsdp=2, sequence=2, method=method)
    for method in ("ulysses", "ring", "zigzag", "balanced_ring", "token_ring", "score_ring")
}
MIXERS = {
    "s5": {"state_size": 8},
    "mamba": {"state_size": 4},
    "mamba2": {"head_dim": 8, "state_size": 4},
    "gated_deltanet": {"heads": 2, "key_dim": 4, "value_dim": 8},
    "attention": {"heads": 4, "kv_heads": 2},
    "kda": {"heads": 2, "head_dim": 4},
    "mla": {"heads": 4, "head_dim": 4, "latent": 8, "rope_dim": 2},
    "hyena": {"max_length": 16, "filter_features": 3, "filter_width": 8},
}
MODELS = {name: (name,) for name in MIXERS} | {"hybrid": ("gated_deltanet",) * 3 + ("attention",)}
MODELS["window"] = ("attention",)
OPTIONS = {"window": {"attention": MIXERS["attention"] | {"window": 5}}}
DEFAULT = "mamba2", "sequence 8"
CASES = [
    DEFAULT,
    *((model, "data 2 x tensor 2 x sequence 2") for model in ("s5", "mamba", "mamba2", "gated_deltanet")),
    ("kda", "data 2 x fsdp 2 x sequence 2"),
    ("hyena", "data 2 x fsdp 2 x sequence 2"),
    ("attention", "data 2 x tensor 2 x sequence 2"),
    ("attention", "ulysses"),
    ("mla", "ring"),
    ("window", "token_ring"),
    ("hybrid", "sequence 8"),
    ("hybrid", "zigzag"),
    ("hybrid", "balanced_ring"),
    ("attention", "score_ring"),
]


def config(model):
    """Tiny language models on rows of 16 tokens, with padding. So large an epsilon makes Adam move by the gradient."""
    pattern = MODELS[model]
    return dict(
        seed=0,
        task=dict(
            name="parity", running=True, lengths=(4, 16), extrapolate=(), train=64, validation=16, test=16
        ),
        model=dict(
            kind="language_model",
            width=16,
            depth=len(pattern),
            pattern=pattern,
            mixers=OPTIONS.get(model, {name: MIXERS[name] for name in set(pattern)}),
        ),
        optimizer=dict(learning_rate=0.02, warmup_steps=2, clip_norm=1.0, epsilon=1.0),
        train=dict(batch_size=8, steps=STEPS),
        data=dict(prefetch=0, bucket_bounds=(16,)),
    )


@functools.cache
def stored(model):
    layout = experiment.build(config(model)).step_functions(on(MeshConfig(), 1)).layout
    return jax.device_get(layout.to_stored(layout.initial(0)))


def on(mesh, count=8):
    return Devices(jax.devices()[:count], mesh, ShardingRules(smallest=1))


def losses(model, devices):
    """The losses of the first steps, and the sums of an evaluation after them."""
    plan = experiment.build(config(model))
    functions = plan.step_functions(devices)
    state, found = functions.layout.from_stored(stored(model)), []
    for batch in plan.train_batches():
        state, metrics = functions.train(state, devices.put_batch(batch))
        sums = dict(zip(functions.train_metric_names, np.asarray(metrics), strict=False))
        found.append(sums["loss"] / sums["count"])
    batch = devices.put_batch(next(iter(plan.eval_batches("validation"))))
    arguments = state.parameters, state.statistics, functions.zero_totals(), batch
    sums = dict(zip(functions.metric_names, np.asarray(functions.evaluate(*arguments)), strict=True))
    return np.array([*found, sums["loss"] / sums["count"]])


@functools.cache
def alone(model):
    return losses(model, on(MeshConfig(), 1))


@pytest.mark.parametrize(
    "model, mesh", [pytest.param(*case, marks=[pytest.mark.slow] * (case != DEFAULT)) for case in CASES]
)
def test_losses_are_those_of_one_device(model, mesh):
    np.testing.assert_allclose(losses(model, on((MESHES | BY)[mesh])), alone(model), rtol=1e-5)


def test_a_batch_lies_in_rows_and_time():
    devices = on(MESHES["data 2 x tensor 2 x sequence 2"])
    batch = {"inputs": np.zeros((4, 6), np.int32), "odd": np.zeros((4, 3)), "weight": np.ones(4)}
    shapes = {name: x.addressable_shards[0].data.shape for name, x in devices.put_batch(batch).items()}
    assert shapes == {"inputs": (2, 3), "odd": (2, 3), "weight": (2,)}
    assert all(
        x.sharding == devices.put_batch(batch)[name].sharding
        for name, x in devices.abstract_batch(batch).items()
    )
    assert devices.of_batch((3, 4, 6), micro=True).shard_shape((3, 4, 6)) == (3, 2, 3)


def test_a_length_that_the_axis_does_not_divide_is_named():
    options = config("mamba2")
    options["data"]["bucket_bounds"] = (18,)
    with pytest.raises(
        ValueError, match="a training batch of 18 tokens .* sequence=8; use 16 or 24, .*bucket_bounds"
    ):
        experiment.build(options).check_devices(on(MESHES["sequence 8"]))


def with_mixer(mixer, **options):
    config_ = config("mamba2")
    return config_ | dict(model=config_["model"] | dict(pattern=(mixer,), mixers={mixer: options}, depth=1))


@pytest.mark.parametrize(
    "mixer, options, reason",
    [
        ("lstm", {}, "LSTM has no form over time for mesh.sequence=8: it calls no primitive"),
        ("slstm", {"heads": 2}, "SLSTM has no form over time .* a loop runs along whole rows"),
        (
            "gss",
            {"ssm_width": 6, "state_size": 4},
            "GSS has no form over time .* long_conv takes whole rows here",
        ),
    ],
)
def test_a_mixer_without_a_form_over_time_is_named_before_anything_is_computed(mixer, options, reason):
    plan = experiment.build(with_mixer(mixer, **options))
    with pytest.raises(
        ValueError, match=f"stack/blocks/0/mixer: {reason}.*; use .*mesh.otherwise='partitioned'"
    ):
        plan.check_devices(on(MESHES["sequence 8"]))
    plan.check_devices(on(MeshConfig(sequence=8, otherwise="partitioned")))


def test_attention_may_be_left_to_the_compiler_by_its_method():
    plan = experiment.build(config("attention"))
    plan.check_devices(on(MeshConfig(sequence=8, method="partitioned")))
    with pytest.raises(
        ValueError, match="q has 4 heads, .* 8 devices .*; use a multiple of 8, or method='ring'"
    ):
        plan.check_devices(on(MeshConfig(sequence=8, method="ulysses")))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shortformer", "softplus_attention", "transformer_xl"])
def test_attention_with_changed_keys_or_logits_over_time(name):
    entry, options = TABLE[name]
    mixer = mixers.make_mixer(entry, options, given=dict(width=8, dtype=jnp.float32), rngs=nnx.Rngs(0))
    graph, variables = nnx.split(mixer)
    x, weights = (
        jnp.asarray(a, jnp.float32) for a in np.random.default_rng(0).standard_normal((2, 2, 24, 8))
    )
    ids = jnp.asarray(np.repeat([[1, 2, 0], [1, 1, 3]], [7, 11, 6], axis=1), jnp.int32)

    def gradients():
        def loss(variables, x):
            mixer = nnx.merge(graph, variables, copy=True)
            return (weights * mixer(x, segment_ids=Segments.of(ids, padding="end"))[0]).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(variables, x)

    want = gradients()
    with on(MeshConfig(sequence=4), 4).active(), dispatch.over_time_noted() as calls:
        got = gradients()
    assert calls
    assert all(divided for _, divided in calls)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * max(1, np.abs(other).max()))


@pytest.mark.slow
def test_which_mixers_have_a_form_over_time():
    """All but those whose results by the compiler are compared in tests/layers/mixers/test_partitioned.py."""
    devices = on(MeshConfig(sequence=4), 4)

    def has_form(name):
        made, kind = mixers.MIXERS[TABLE[name][0]]
        config = made(width=8, dtype=jnp.float32, **TABLE[name][1])
        return without_form(devices, kind, config, 2, 24) is None

    assert {name for name in TABLE if not has_form(name)} == set(WITHOUT)
