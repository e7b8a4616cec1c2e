"""One training step: accumulation, averages, keys, metrics and devices."""

import functools

import jax
import numpy as np
import pytest

from experiments.parallel.mesh import Devices
from experiments.training import experiment
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
    return plan, functions, devices, functions.layout.initial(config["seed"])


def run(config, steps, devices=None):
    """Metrics of the first steps, by name, and the last state on the host."""
    plan, functions, devices, state = start(config, devices)
    names = (*functions.metric_names, "gradient_norm", "learning_rate", "tokens")
    rows = []
    for batch, _ in zip(plan.train_batches(), range(steps)):
        state, metrics = functions.train(state, devices.put_batch(batch))
        rows.append(np.asarray(metrics))
    stored = jax.device_get(functions.layout.to_stored(state))
    return {name: np.array(column) for name, column in zip(names, np.transpose(rows))}, stored


def assert_close(got, expected, **tolerance):
    close = functools.partial(np.testing.assert_allclose, **tolerance)
    jax.tree.map(close, got, expected)


PLAIN = dict(norm=False, dropout=0.0)


@pytest.mark.sample(2)
@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_steps_equal_full_ones(accumulate):
    expected = run(tiny_config(model=PLAIN), 4)
    got = run(tiny_config(model=PLAIN, train=dict(accumulate=accumulate)), 4)
    assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_micro_batches_update_the_statistics_one_after_the_other():
    config = tiny_config(train=dict(accumulate=2))
    plan = experiment.build(config)
    batch = next(plan.train_batches())
    _, functions, _, state = start(config)
    table = functions.layout.packing.cut(state.parameters)["table"]
    embedded = table[batch["inputs"]] * batch["segment_ids"][..., None]
    first, second = (embedded[start::2].mean((0, 1)) for start in (0, 1))
    got = run(config, 1)[1]["statistics/mean"]
    np.testing.assert_allclose(got, 0.9 * 0.1 * first + 0.1 * second, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.sample(2)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_eight_devices_equal_one(accumulate):
    config = tiny_config(train=dict(batch_size=16, accumulate=accumulate))
    one = run(config, 3)
    eight = run(config, 3, Devices(jax.devices()[:8]))
    assert_close(eight, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_without_labels_changes_nothing_but_the_number_of_steps(accumulate):
    config = tiny_config(train=dict(accumulate=accumulate))
    plan, functions, devices, state = start(config)
    names = (*functions.metric_names, "gradient_norm", "learning_rate", "tokens")
    batches = plan.train_batches()
    state, _ = functions.train(state, devices.put_batch(next(batches)))
    before = jax.device_get(functions.layout.to_stored(state))
    batch = next(batches)
    nothing = {**batch, "labelled": 0 * batch["labelled"]}
    state, metrics = functions.train(state, devices.put_batch(nothing))
    after = jax.device_get(functions.layout.to_stored(state))
    counts = [name for name, array in before.items() if name.endswith("step") or "count" in name]
    moved = [name for name in before if not np.array_equal(before[name], after[name])]
    assert set(moved) <= set(counts)
    assert after["step"] == 2
    values = dict(zip(names, map(float, metrics), strict=True))
    assert values["count"] == values["loss"] == values["gradient_norm"] == 0


def test_a_gradient_norm_above_the_limit_changes_nothing_but_the_number_of_steps():
    plain = run(tiny_config(), 3)[0]["gradient_norm"]
    limit = float(plain[0] * 0.999)
    assert plain[0] > limit
    skipping = dict(skip_norm=limit, schedule="constant", warmup_steps=0)
    plan, functions, devices, state = start(tiny_config(optimizer=skipping))
    before = jax.device_get(functions.layout.to_stored(state))
    state, metrics = functions.train(state, devices.put_batch(next(plan.train_batches())))
    after = jax.device_get(functions.layout.to_stored(state))
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved
    assert all(name.endswith("step") or "count" in name for name in moved)
    assert float(metrics[len(functions.metric_names)]) == plain[0]
    unlimited = run(tiny_config(optimizer=dict(skip_norm=float(plain.max() * 1.001))), 3)
    assert_close(unlimited, run(tiny_config(), 3))


def test_micro_batches_count_by_their_labels():
    config = tiny_config(model=PLAIN, train=dict(accumulate=2))
    plan, functions, devices, state = start(config)
    batch = next(plan.train_batches())
    first = {**batch, "labelled": (np.arange(8) % 2 == 0).astype(np.float32)}
    state, metrics = functions.train(state, devices.put_batch(first))
    whole = start(tiny_config(model=PLAIN))
    expected, others = whole[1].train(whole[3], devices.put_batch(first))
    assert_close(np.asarray(metrics), np.asarray(others), rtol=1e-4)
    stored = [jax.device_get(f.layout.to_stored(s)) for f, s in ((functions, state), (whole[1], expected))]
    assert_close(*stored, rtol=1e-4, atol=1e-5)


def test_a_batch_that_devices_do_not_divide_is_refused():
    with pytest.raises(
        ValueError,
        match=r"train.batch_size=12 cannot be divided over 8 parts \(data=8 x fsdp=1\); use 8 or 16",
    ):
        start(tiny_config(train=dict(batch_size=12)), Devices(jax.devices()[:8]))
    with pytest.raises(ValueError, match=r"over 8 parts .* times 2 micro-batches; use 16, or fewer devices"):
        start(tiny_config(train=dict(batch_size=8, accumulate=2)), Devices(jax.devices()[:8]))


def test_more_devices_than_there_are_is_refused():
    with pytest.raises(ValueError, match="num_devices=99; JAX sees 8"):
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
    _, before = run(config, 0)
    _, after = run(config, 1)
    for name in ("table", "head", "log_dt", "bias"):
        expected = 0.75 * before[f"average/{name}"] + 0.25 * after[f"parameters/{name}"]
        np.testing.assert_allclose(after[f"average/{name}"], expected, rtol=1e-6)


def test_metrics_are_those_of_the_batch():
    config = tiny_config(model=PLAIN)
    plan = experiment.build(config)
    metrics, _ = run(config, 1)
    batch = next(plan.train_batches())
    _, functions, _, state = start(config)
    loss, gradients = jax.value_and_grad(
        lambda p: plan.task.loss(plan.model(p, state.statistics, batch, key=None)[0], batch)[0]
    )(functions.layout.packing.cut(state.parameters))
    assert metrics["count"][0] == 8
    assert metrics["tokens"][0] == np.sum(batch["segment_ids"])
    np.testing.assert_allclose(metrics["loss"][0] / 8, loss, rtol=1e-5)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in gradients.values()))
    np.testing.assert_allclose(metrics["gradient_norm"][0], norm, rtol=1e-5)
    np.testing.assert_allclose(metrics["learning_rate"][0], 0.05 / 3, rtol=1e-6)


def test_means_divide_by_the_count():
    assert means(("accuracy", "count", "loss"), np.array([3.0, 4.0, 8.0])) == {"accuracy": 0.75, "loss": 2.0}


def test_a_stored_state_comes_back():
    _, functions, _, state = start(tiny_config())
    stored = functions.layout.to_stored(state)
    parameters = {name for name in stored if name.startswith("parameters/")}
    assert parameters == {f"parameters/{name}" for name in ("bias", "head", "log_dt", "table")}
    assert_close(functions.layout.from_stored(stored), jax.device_get(state), rtol=0)


def test_a_stored_state_of_another_model_is_refused():
    _, functions, _, state = start(tiny_config())
    stored = functions.layout.to_stored(state)
    other = start(tiny_config(model=dict(width=6)))[1].layout
    with pytest.raises(
        ValueError, match=r"does not fit the model: .*table is \(5, 4\), but \(5, 6\) in the model"
    ):
        other.from_stored(stored)
    del stored["parameters/bias"]
    with pytest.raises(ValueError, match="parameters/bias is missing"):
        functions.layout.from_stored(stored)
