"""One training step: accumulation, averages, keys, metrics and devices."""

import functools

import jax
import numpy as np
import pytest

from experiments.parallel.devices import Devices
from experiments.training import experiment
from experiments.training.state import from_stored, initial_state, to_stored
from experiments.training.step import means
from tests.experiments.tiny import build_tiny_model, make_tiny_task, tiny_config


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(experiment, "make_task", make_tiny_task)
    monkeypatch.setattr(experiment, "build_model", build_tiny_model)


def start(config, devices=None):
    """The plan, the jitted functions and the first state."""
    plan = experiment.build(config)
    devices = devices or Devices(jax.devices()[:1])
    functions = plan.step_functions(devices)
    state = initial_state(plan.model, plan.layouts, plan.optimizer, config["seed"])
    return plan, functions, devices, devices.replicate(state)


def run(config, steps, devices=None):
    """Metrics of the first steps, by name, and the last state on the host."""
    plan, functions, devices, state = start(config, devices)
    names = (*functions.metric_names, "gradient_norm", "learning_rate", "tokens")
    rows = []
    for batch, _ in zip(plan.train_batches(), range(steps)):
        state, metrics = functions.train(state, devices.put_batch(batch))
        rows.append(np.asarray(metrics))
    return {name: np.array(column) for name, column in zip(names, np.transpose(rows))}, to_stored(
        state, plan.layouts
    )


def assert_close(got, expected, **tolerance):
    close = functools.partial(np.testing.assert_allclose, **tolerance)
    jax.tree.map(close, got, expected)


PLAIN = dict(norm=False, dropout=0.0)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_steps_equal_full_ones(accumulate):
    expected = run(tiny_config(model=PLAIN), 4)
    got = run(tiny_config(model=PLAIN, train=dict(accumulate=accumulate)), 4)
    assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_micro_batches_update_the_statistics_one_after_the_other():
    config = tiny_config(train=dict(accumulate=2))
    plan = experiment.build(config)
    batch = next(plan.train_batches())
    embedded = plan.model.parameters["table",][batch["inputs"]] * batch["segment_ids"][..., None]
    first, second = (embedded[start::2].mean((0, 1)) for start in (0, 1))
    got = run(config, 1)[1]["statistics"]["mean"]
    np.testing.assert_allclose(got, 0.9 * 0.1 * first + 0.1 * second, rtol=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_eight_devices_equal_one(accumulate):
    config = tiny_config(train=dict(batch_size=16, accumulate=accumulate))
    one = run(config, 3)
    eight = run(config, 3, Devices(jax.devices()[:8]))
    assert_close(eight, one, rtol=1e-4, atol=1e-5)


def test_a_batch_that_devices_do_not_divide_is_refused():
    with pytest.raises(
        ValueError, match=r"train.batch_size=12 cannot be divided over 8 devices; use 8 or 16"
    ):
        start(tiny_config(train=dict(batch_size=12)), Devices(jax.devices()[:8]))
    with pytest.raises(ValueError, match=r"over 8 devices times 2 micro-batches; use 16, or fewer devices"):
        start(tiny_config(train=dict(batch_size=8, accumulate=2)), Devices(jax.devices()[:8]))


def test_more_devices_than_there_are_is_refused():
    with pytest.raises(ValueError, match="num_devices=99; this machine has 8"):
        Devices.first(99)


def test_every_step_has_its_own_key():
    plan, functions, devices, state = start(
        tiny_config(optimizer=dict(learning_rate=1e-12, weight_decay=0.0))
    )
    batch = next(plan.train_batches())
    losses = []
    for _ in range(2):
        state, metrics = functions.train(state, devices.put_batch(batch))
        losses.append(float(metrics[functions.metric_names.index("loss")]))
    assert losses[0] != losses[1]  # by dropout alone


def test_the_average_follows_the_parameters():
    config = tiny_config(optimizer=dict(ema=0.75))
    before = to_stored(start(config)[3], start(config)[0].layouts)
    after = run(config, 1)[1]
    expected = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, before["average"], after["parameters"])
    assert_close(after["average"], expected, rtol=1e-6)


def test_metrics_are_those_of_the_batch():
    config = tiny_config(model=PLAIN)
    plan = experiment.build(config)
    metrics, _ = run(config, 1)
    batch = next(plan.train_batches())
    loss, gradients = jax.value_and_grad(
        lambda p: plan.task.loss(plan.model(p, plan.model.statistics, batch, key=None)[0], batch)[0]
    )(plan.model.parameters)
    assert metrics["count"][0] == 8
    assert metrics["tokens"][0] == np.sum(batch["segment_ids"])
    np.testing.assert_allclose(metrics["loss"][0] / 8, loss, rtol=1e-5)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in gradients.values()))
    np.testing.assert_allclose(metrics["gradient_norm"][0], norm, rtol=1e-5)
    np.testing.assert_allclose(metrics["learning_rate"][0], 0.05 / 3, rtol=1e-6)


def test_means_divide_by_the_count():
    assert means(("accuracy", "count", "loss"), np.array([3.0, 4.0, 8.0])) == {"accuracy": 0.75, "loss": 2.0}


def test_a_stored_state_comes_back():
    plan, _, _, state = start(tiny_config())
    stored = to_stored(state, plan.layouts)
    assert stored["parameters"].keys() == {"bias", "head", "log_dt", "table"}
    assert_close(from_stored(stored, plan.layouts), jax.device_get(state), rtol=0)


def test_a_stored_state_of_another_model_is_refused():
    plan, _, _, state = start(tiny_config())
    stored = to_stored(state, plan.layouts)
    other = start(tiny_config(model=dict(width=6)))[0]
    with pytest.raises(
        ValueError, match=r"does not fit the model: .*table is \(5, 4\), but \(5, 6\) in the model"
    ):
        from_stored(stored, other.layouts)
    del stored["parameters"]["bias"]
    with pytest.raises(ValueError, match="bias is missing"):
        from_stored(stored, plan.layouts)
