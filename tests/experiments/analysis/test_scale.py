"""Scales by layer, against the model itself and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments.analysis.scale import scales
from seqmodels import build_model

VALUES = dict(
    kind="language_model",
    vocab_size=11,
    width=8,
    depth=3,
    pattern=("attention",),
    mixers={"attention": dict(heads=2)},
    scan=True,
    dropout=0.5,
)
BATCH, LENGTH, SEED = 2, 6, 3


def rms(x):
    return float(jnp.sqrt(jnp.mean(jnp.square(x))))


def test_scales_are_those_of_the_model():
    rows = scales(VALUES, batch=BATCH, length=LENGTH, seed=SEED)
    assert [row.place for row in rows] == ["embedding", "layer 0", "layer 1", "layer 2", "logits"]
    model = build_model(VALUES | dict(scan=False, dropout=0.0), rngs=nnx.Rngs(SEED))
    keys = jax.random.split(jax.random.key(SEED), 3)
    inputs = jax.random.randint(keys[0], (BATCH, LENGTH), 0, 11)
    logits = model(inputs)[0]
    labels = jax.random.randint(keys[2], (BATCH, LENGTH), 0, 11)
    assert rows[0].activation == pytest.approx(rms(model.embedding(inputs)[0]), rel=1e-4)
    assert rows[-1].activation == pytest.approx(rms(logits), rel=1e-4)
    by_logits = jax.nn.softmax(logits) - jax.nn.one_hot(labels, 11)
    assert rows[-1].gradient == pytest.approx(rms(by_logits), rel=1e-4)
    # The loss along the gradient at the last layer, whose output is normalized and projected.
    x = model.stack(model.embedding(inputs)[0])[0]
    assert rows[3].activation == pytest.approx(rms(x), rel=1e-4)

    def loss(x):
        logits = (
            model.norm(x) @ model.head.kernel[...]
            if model.head
            else model.norm(x) @ model.embedding.table[...].T
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum()

    assert rows[3].gradient == pytest.approx(rms(jax.grad(loss)(x)), rel=1e-4)


@pytest.mark.slow
def test_growing_depth_and_classifiers_of_vectors():
    values = VALUES | dict(
        kind="classifier", num_classes=4, norm="batch_norm", dtype="bfloat16", input_size=5
    )
    del values["vocab_size"]
    rows = scales(values, batch=BATCH, length=LENGTH, seed=0)
    assert np.isfinite([(row.activation, row.gradient) for row in rows]).all()
    assert all(row.gradient > 0 for row in rows)


@pytest.mark.slow
def test_a_route_past_layers_is_left_out():
    values = dict(batch=BATCH, length=LENGTH, seed=SEED)
    assert scales(VALUES | dict(route=(1, 2), route_rate=0.6), **values) == scales(VALUES, **values)


@pytest.mark.slow
def test_the_loss_of_a_regressor_is_half_the_squared_error():
    values = VALUES | dict(kind="regressor", output_size=2)
    rows = scales(values, batch=BATCH, length=LENGTH, seed=SEED)
    keys = jax.random.split(jax.random.key(SEED), 3)
    inputs = jax.random.randint(keys[0], (BATCH, LENGTH), 0, 11)
    outputs = build_model(values | dict(scan=False, dropout=0.0), rngs=nnx.Rngs(SEED))(inputs)[0]
    labels = jax.random.normal(keys[2], outputs.shape)
    assert rows[-1].gradient == pytest.approx(rms(outputs - labels), rel=1e-4)
