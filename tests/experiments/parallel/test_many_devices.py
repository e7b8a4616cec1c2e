"""Training on eight emulated devices gives the losses of one, and resumes on other numbers of devices."""

import dataclasses
import functools
import tempfile

import jax
import numpy as np
import pytest

from experiments.config.loading import MeshConfig
from experiments.parallel.mesh import Devices
from experiments.runs.checkpoints import Checkpoints
from experiments.training import experiment, loop
from experiments.training.model import SplitModel
from experiments.training.state import StateLayout
from layers.sharding_rules import ShardingRules
from seqmodels import build_model

STEPS = 20
MESHES = {
    "data 8": MeshConfig(),
    "fsdp 8": MeshConfig(fsdp=-1),
    "tensor 2 x fsdp 4": MeshConfig(tensor=2, fsdp=-1),
}
MIXERS = {
    "attention": {"heads": 2},
    "gated_deltanet": {"heads": 2, "key_dim": 4, "value_dim": 8},
    "mamba2": {"head_dim": 8, "state_size": 4},
}
HYBRID = tuple(MIXERS)
# One length for all batches, so that a step is compiled once.
LONGEST = {"listops": 200, "parity": 12}


@functools.cache
def folder():
    """Where the data of ListOps lie while this module runs."""
    return tempfile.TemporaryDirectory()


def config(model):
    """Tiny models whose parameters have every kind of axis.

    With so large an epsilon Adam moves by the gradient, not by its sign, and does not amplify rounding.
    """
    task = dict(
        name="parity", running=True, lengths=(4, 12), extrapolate=(), train=64, validation=16, test=16
    )
    if model == "s5":
        task = dict(
            name="listops", preset="short", train=64, validation=8, test=8, workers=1, data_dir=folder().name
        )
        sizes = dict(
            kind="classifier",
            pattern=("s5",),
            mixers={"s5": dict(state_size=8, bidirectional=True)},
            channel="half_glu2",
            residual="joint",
            norm="batch_norm",
        )
    else:
        pattern = HYBRID if model == "hybrid" else (model,)
        mixers = {name: MIXERS[name] for name in pattern}
        sizes = dict(kind="language_model", pattern=pattern, mixers=mixers)
    return dict(
        seed=0,
        task=task,
        model=dict(width=16, depth=max(2, len(sizes["pattern"])), **sizes),
        optimizer=dict(learning_rate=0.02, weight_decay=0.1, warmup_steps=2, clip_norm=1.0, epsilon=1.0),
        train=dict(batch_size=16, steps=STEPS),
        data=dict(prefetch=0, bucket_bounds=(LONGEST[task["name"]],)),
    )


def on(mesh, count=8):
    # Without a smallest size, so that the arrays of a tiny model are divided too.
    return Devices(jax.devices()[:count], mesh, ShardingRules(smallest=1))


def steps(model, devices, count=STEPS, state=None, skip=0):
    """Losses of the next steps, the state after them, and its layout."""
    plan = experiment.build(config(model))
    functions = plan.step_functions(devices)
    if state is None and model == "hybrid":
        # Initialising it compiles as long as a step does; the other models are initialised where they train.
        state = functions.layout.from_stored(first_state(model))
    state = functions.layout.initial(0) if state is None else state
    losses = []
    for number, batch in enumerate(plan.train_batches()):
        if not skip <= number < skip + count:
            continue
        state, metrics = functions.train(state, devices.put_batch(batch))
        sums = dict(zip(functions.train_metric_names, np.asarray(metrics), strict=False))
        losses.append(sums["loss"] / sums["count"])
    return np.array(losses), state, functions.layout


@functools.cache
def first_state(model):
    """The state before the first step, by layer, made on one device."""
    layout = experiment.build(config(model)).step_functions(on(MeshConfig(), 1)).layout
    return jax.device_get(layout.to_stored(layout.initial(0)))


@functools.cache
def alone(model):
    return steps(model, on(MeshConfig(), 1))[0]


# By default one mesh with two axes; the hybrid on "fsdp 8" trains in the test below.
BY_DEFAULT = {("s5", "tensor 2 x fsdp 4")}


@pytest.mark.parametrize(
    "model, mesh",
    [
        pytest.param(model, mesh, marks=[pytest.mark.slow] * ((model, mesh) not in BY_DEFAULT))
        for model in ("s5", "hybrid", *MIXERS)
        for mesh in MESHES
    ],
)
def test_losses_are_those_of_one_device(model, mesh):
    losses, state, _ = steps(model, on(MESHES[mesh]))
    np.testing.assert_allclose(losses, alone(model), rtol=1e-5)
    divided = [name for name, array in state.parameters.items() if not array.sharding.is_fully_replicated]
    if mesh == "data 8":
        assert not divided
    else:
        assert len(divided) > len(state.parameters) / 2


FEWER = {1: MeshConfig(), 2: MeshConfig(fsdp=-1), 4: MeshConfig(tensor=2)}


@pytest.mark.slow
@pytest.mark.parametrize("counts", [(2,), (1, 4)], ids=["two", "one and four"])
def test_a_checkpoint_of_eight_devices_resumes_on_fewer(tmp_path, counts):
    half = STEPS // 2
    _, state, layout = steps("hybrid", on(MESHES["fsdp 8"]), half)
    stored = jax.device_get(layout.to_stored(state))
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        checkpoints.save(half, layout.to_stored(state), {})
        checkpoints.wait()
        for count, mesh in FEWER.items():
            fewer = experiment.build(config("hybrid")).step_functions(on(mesh, count)).layout
            read, _ = loop.restore(fewer, checkpoints, half)
            assert all(len(leaf.sharding.device_set) == count for leaf in jax.tree.leaves(read))
            jax.tree.map(np.testing.assert_array_equal, jax.device_get(fewer.to_stored(read)), stored)
            if count in counts:
                rest, _, _ = steps("hybrid", on(mesh, count), 4, read, half)
                np.testing.assert_allclose(rest, alone("hybrid")[half : half + 4], rtol=1e-5)


@pytest.mark.slow
def test_no_device_holds_a_divided_state_whole_while_it_is_made():
    """By the memory that the compiled program needs per device: an eighth of the state, and less than that beside it."""
    model = dict(kind="language_model", width=512, depth=8, pattern=("attention",), vocab_size=4096)
    plan = experiment.build(config("hybrid"))
    wide = SplitModel(lambda rngs: build_model(model, rngs=rngs))
    optimizer = dataclasses.replace(plan.optimizer, declarations=wide.parameters)
    devices = Devices(sizes=MESHES["fsdp 8"])
    layout = StateLayout(wide, optimizer, devices)
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layout.abstract))
    with devices.active():
        make = jax.jit(lambda seed: layout.make(jax.random.key(seed)), out_shardings=layout.shardings)
        memory = make.lower(np.uint32(0)).compile().memory_analysis()
    assert memory.output_size_in_bytes < 1.1 * whole / 8
    assert memory.temp_size_in_bytes < 1.1 * whole / 8
