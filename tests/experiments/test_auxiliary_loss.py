"""What layers add to the loss of training reaches the gradient, under scan, remat and micro-batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.parallel.mesh import Devices
from experiments.training import experiment
from seqmodels.names import split_layers
from tests.experiments.tiny import make_tiny_task, tiny_config

BALANCE = 5.0


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(experiment, "make_task", make_tiny_task)


def plan_of(*, accumulate=1, balance=BALANCE, **model):
    config = tiny_config(train=dict(accumulate=accumulate), optimizer=dict(clip_norm=None))
    moe = dict(experts=3, hidden=4, balance=balance, z_loss=0.0)
    mixers = {"attention": dict(heads=1)}
    config["task"] = dict(name="tiny")
    config["model"] = dict(
        kind="classifier",
        width=4,
        depth=2,
        pattern=("attention",),
        mixers=mixers,
        channel="moe",
        channels={"moe": moe},
    )
    config["model"] |= model
    return experiment.build(config)


def objective(plan, batch, number=0):
    """The mean loss with the auxiliary part, and that part, as a micro-batch of the first step should see them."""
    key = jax.random.fold_in(jax.random.key(0), 1)
    key = jax.random.fold_in(jax.random.fold_in(key, 0), number)

    def run(parameters):
        output, statistics = plan.model(parameters, initial(plan)[1], batch, key=key)
        auxiliary = plan.model.auxiliary_loss(statistics)
        return plan.task.loss(output, batch)[0] + auxiliary, auxiliary

    return run


def initial(plan):
    """Parameters and statistics before training."""
    return jax.jit(plan.model.initialise)(jax.random.key(0))


def by_layer(plan, arrays):
    """Arrays of parameters or statistics by the names of their layers."""
    declared = {**plan.model.parameters, **plan.model.statistics}
    return {
        name: part
        for path, a in arrays.items()
        for name, part in split_layers(declared[path].names, a).items()
    }


def first_batch(plan):
    return jax.tree.map(jnp.asarray, next(plan.train_batches()))


def first_step(plan, batch):
    devices = Devices.first(1)
    functions = plan.step_functions(devices)
    state, metrics = functions.train(functions.layout.initial(0), devices.put_batch(batch))
    names = (*functions.train_metric_names, "gradient_norm", "learning_rate", "tokens")
    return state, dict(zip(names, np.asarray(metrics), strict=True))


OTHERS = dict(scan=False), dict(remat="full"), dict(remat="dots")


def routers(plan, gradients):
    found = {name: g for name, g in by_layer(plan, gradients).items() if "router" in name}
    assert len(found) == 2
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", [dict(), *(pytest.param(other, marks=pytest.mark.slow) for other in OTHERS)]
)
def test_every_router_has_a_gradient_from_the_auxiliary_loss_alone(model):
    plan = plan_of(**model)
    batch = first_batch(plan)
    gradients, value = jax.jit(
        lambda p: (jax.grad(lambda p: objective(plan, batch)(p)[1])(p), objective(plan, batch)(p)[1])
    )(initial(plan)[0])
    assert 2 * BALANCE <= value < 6 * BALANCE
    for path, gradient in routers(plan, gradients).items():
        assert np.abs(gradient).max() > 1e-3, path
    reference = plan_of(scan=False)
    want = jax.jit(jax.grad(lambda p: objective(reference, batch)(p)[1]))(initial(reference)[0])
    want = by_layer(reference, want)
    for name, gradient in by_layer(plan, gradients).items():
        np.testing.assert_allclose(gradient, want[name], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_follows_the_loss_with_its_auxiliary_part(accumulate):
    plan = plan_of(accumulate=accumulate)
    batch = first_batch(plan)
    parts = [{k: v[i::accumulate] for k, v in batch.items()} for i in range(accumulate)]
    both = [
        jax.jit(jax.value_and_grad(objective(plan, part, i), has_aux=True))(initial(plan)[0])
        for i, part in enumerate(parts)
    ]
    gradients = [gradient for _, gradient in both]
    mean = jax.tree.map(lambda *g: sum(g) / accumulate, *gradients)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in mean.values()))
    state, metrics = first_step(plan, batch)
    assert metrics["gradient_norm"] == pytest.approx(norm, rel=1e-4)
    auxiliary = np.mean([value[1] for value, _ in both])
    assert metrics["auxiliary_loss"] / metrics["count"] == pytest.approx(auxiliary, rel=1e-5)
    loss = np.mean([value[0] for value, _ in both]) - auxiliary
    assert metrics["loss"] / metrics["count"] == pytest.approx(loss, rel=1e-4)
    # The statistics hold the last value; the next step must not add it again.
    left = state.statistics
    assert float(plan.model.auxiliary_loss(left)) > 0
    _, statistics = jax.jit(plan.model.__call__)(initial(plan)[0], left, batch, key=None)
    assert float(plan.model.auxiliary_loss(statistics)) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        *(pytest.param(other, marks=pytest.mark.slow) for other in (dict(accumulate=2), dict(remat="full"))),
    ],
)
def test_biases_of_experts_move_in_a_step_and_rest_in_evaluation(options):
    """Every layer has its own, and every micro-batch moves it."""
    rate, accumulate = 2.0**-10, options.get("accumulate", 1)
    moe = dict(experts=3, hidden=4, scores="sigmoid", bias_rate=rate, balance=0.0, z_loss=0.0)
    plan = plan_of(**options, channels={"moe": moe})
    batch = first_batch(plan)
    state, _ = first_step(plan, batch)
    left = state.statistics
    parameters, want = initial(plan)
    run = jax.jit(plan.model.__call__)
    for i in range(accumulate):
        part = {k: v[i::accumulate] for k, v in batch.items()}
        _, want = run(parameters, want, part, key=jax.random.key(0))
    _, after = run(parameters, left, batch, key=None)
    left, want, after = (by_layer(plan, arrays) for arrays in (left, want, after))
    biases = {name: value for name, value in left.items() if name.endswith("/bias")}
    assert len(biases) == 2
    for path, bias in biases.items():
        assert np.abs(bias).max() in (rate, accumulate * rate)
        np.testing.assert_array_equal(bias, want[path])
        np.testing.assert_array_equal(bias, after[path])


def test_a_model_without_auxiliary_loss_has_no_such_metric():
    plan = plan_of(channel="swiglu", channels={})
    assert not plan.model.has_auxiliary_loss
    assert "auxiliary_loss" not in first_step(plan, first_batch(plan))[1]
