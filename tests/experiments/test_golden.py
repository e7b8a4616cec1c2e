"""The first steps of S5 on generated ListOps, to the digit: data, initialisation, model, optimizer and order."""

import jax
import numpy as np
import pytest

from experiments.parallel.mesh import Devices
from experiments.training import experiment

NAMES = ("accuracy", "count", "loss", "gradient_norm", "learning_rate", "tokens")


def config(data_dir, dtype="float32"):
    return dict(
        seed=0,
        task=dict(
            name="listops", preset="short", train=32, validation=8, test=8, workers=1, data_dir=str(data_dir)
        ),
        model=dict(
            kind="classifier",
            width=8,
            depth=2,
            pattern=("s5",),
            mixers={"s5": dict(state_size=4, bidirectional=True)},
            channel="half_glu2",
            residual="joint",
            norm="batch_norm",
            dropout=0.1,
            dtype=dtype,
        ),
        optimizer=dict(
            learning_rate=0.01,
            weight_decay=0.05,
            warmup_steps=1,
            groups=dict(ssm=dict(learning_rate=0.002, weight_decay=0.05)),
        ),
        train=dict(batch_size=8, steps=3),
        data=dict(bucket_bounds=(100,), prefetch=0),
    )


def first_steps(config):
    plan = experiment.build(config)
    devices = Devices(jax.devices()[:1])
    functions = plan.step_functions(devices)
    assert (*functions.metric_names, "gradient_norm", "learning_rate", "tokens") == NAMES
    state = functions.layout.initial(0)
    rows = []
    for batch in plan.train_batches():
        state, metrics = functions.train(state, devices.put_batch(batch))
        rows.append(np.asarray(metrics))
    return {name: np.array(column) for name, column in zip(NAMES, np.transpose(rows))}, state


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    return first_steps(config(tmp_path_factory.mktemp("data")))[0]


def test_the_first_steps_are_as_ever(exact):
    np.testing.assert_array_equal(exact["tokens"], [273, 373, 333])
    np.testing.assert_allclose(exact["loss"] / 8, [2.2680211, 2.3537171, 2.2812545], rtol=1e-6)
    np.testing.assert_allclose(exact["gradient_norm"], [0.4973648, 0.5237022, 0.5064609], rtol=1e-6)


@pytest.mark.slow
def test_parameters_stay_float32_under_bfloat16_activations(exact, tmp_path):
    rounded, state = first_steps(config(tmp_path, "bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.parameters)} == {np.dtype("float32")}
    assert rounded["loss"][0] != exact["loss"][0]
    assert rounded["loss"] == pytest.approx(exact["loss"], rel=0.03)
