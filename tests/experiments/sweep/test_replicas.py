"""Copies that train together do what each does alone through `experiments.training.step`."""

import time

import jax
import numpy as np
import pytest

from experiments.parallel.mesh import Devices
from experiments.runs.interrupts import Interrupted
from experiments.sweep import replicas
from experiments.sweep.replicas import Replicas
from experiments.training import experiment

CONFIG = dict(
    seed=3,
    task=dict(
        name="parity", running=True, lengths=(2, 6), extrapolate=(9,), train=50, validation=10, test=20
    ),
    model=dict(kind="language_model", width=4, depth=1, pattern=("s5",), mixers={"s5": {"state_size": 4}}),
    optimizer=dict(
        learning_rate=0.5,
        weight_decay=0.1,
        warmup_steps=2,
        clip_norm=1.0,
        groups={"ssm": {"learning_rate": 0.25, "weight_decay": 0.0}},
    ),
    train=dict(batch_size=8, steps=10),
    data=dict(prefetch=0),
)
RUNS = [(0.01, 0), (0.01, 1), (0.04, 0), (0.04, 1)]


@pytest.fixture(scope="module")
def trained():
    copies = Replicas(CONFIG, (0.01, 0.04), (0, 1))
    return copies, copies.train()


def alone(rate, seed):
    """Losses and test metrics of one run, with the data in the order of the seed of CONFIG."""
    groups = {"ssm": {"learning_rate": rate / 2, "weight_decay": 0.0}}
    optimizer = CONFIG["optimizer"] | dict(learning_rate=rate, groups=groups)
    plan = experiment.build(CONFIG | dict(seed=seed, optimizer=optimizer))
    batches = experiment.build(CONFIG).train_batches()
    functions = plan.step_functions(Devices(jax.local_devices()[:1]))
    state = functions.layout.initial(seed)
    losses = []
    for batch in batches:
        state, metrics = functions.train(state, batch)
        sums = dict(zip(functions.train_metric_names, np.asarray(metrics), strict=False))
        losses.append(sums["loss"] / sums["count"])
    totals = functions.zero_totals()
    for batch in plan.eval_batches("length_9"):
        totals = functions.evaluate(state.evaluated, state.statistics, totals, batch)
    sums = dict(zip(functions.metric_names, np.asarray(totals), strict=True))
    return losses, sums["loss"] / sums["count"]


@pytest.mark.slow
def test_every_copy_is_the_run_of_its_rate_and_seed(trained):
    copies, found = trained
    assert copies.runs == RUNS
    assert found["losses"].shape == (1, 4)
    metrics = copies.evaluate("length_9")
    assert set(metrics[0]) == {"loss", "accuracy", "sequence_accuracy"}
    for copy in (1, 2):
        losses, loss = alone(*RUNS[copy])
        np.testing.assert_allclose(found["losses"][0, copy], np.mean(losses), rtol=1e-4)
        np.testing.assert_allclose(metrics[copy]["loss"], loss, rtol=1e-4)
    assert len({round(float(x), 6) for x in found["losses"][0]}) == 4


@pytest.mark.slow
def test_evaluation_counts_every_row_once(trained, monkeypatch):
    copies, _ = trained
    whole = copies.evaluate("length_9")
    monkeypatch.setattr(replicas, "EVAL_TOKENS", 60)  # batches of 6 for 20 rows
    for one, other in zip(copies.evaluate("length_9"), whole, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_the_deadline_is_kept(trained):
    with pytest.raises(Interrupted, match="the time limit"):
        trained[0].train(deadline=time.monotonic() - 1)


def test_errors():
    with pytest.raises(ValueError, match="steps is None"):
        Replicas(CONFIG | dict(train=dict(batch_size=8, epochs=1)), (0.1,), (0,))
    taught = dict(batch_size=8, steps=1, distill=dict(teacher="runs/teacher"))
    with pytest.raises(
        ValueError, match="train.distill is given; a sweep of rates trains on the task's loss"
    ):
        Replicas(CONFIG | dict(train=taught), (0.1,), (0,))
