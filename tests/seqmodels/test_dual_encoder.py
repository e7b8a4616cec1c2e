"""A dual encoder pools each sequence of a pair by itself, whatever the mixer, and combines the two as published."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.config.models import check_model, with_sizes
from experiments.training.model import SplitModel
from seqmodels import build_model

MODEL = dict(kind="dual_encoder", width=8, depth=1, vocab_size=9, num_classes=2, mixer_defaults=dict(heads=2))
IDS = np.array([[[1] * 7, [1] * 4 + [0] * 3], [[1] * 2 + [0] * 5, [1] * 7]], np.int32)
INPUTS = np.random.default_rng(0).integers(0, 9, IDS.shape).astype(np.int32)


def made(**options):
    return build_model(MODEL | dict(pattern=("gla",)) | options, rngs=nnx.Rngs(0))


def numpy_head(model, u, v, activation):
    x = np.concatenate([u, v, u * v, u - v], axis=-1)
    for number, layer in enumerate(model.head):
        x = x @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])
        x = activation(x) if number + 1 < len(model.head) else x
    return x


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "pattern",
    ["linformer", "s5", "fnet", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gla", "mega"))],
)
def test_each_sequence_is_encoded_alone(pattern):
    mixers = {"linformer": dict(max_length=7, heads=2)} if pattern == "linformer" else {}
    model = made(pattern=(pattern,), mixers=mixers)
    logits, state = model(jnp.asarray(INPUTS), segment_ids=jnp.asarray(IDS))
    assert (logits.shape, state) == ((2, 2), None)
    single = build_model(MODEL | dict(kind="classifier", pattern=(pattern,), mixers=mixers), rngs=nnx.Rngs(0))
    for name in ("embedding", "stack", "norm"):
        nnx.update(getattr(single, name), nnx.state(getattr(model, name)))
    single.head = lambda pooled: pooled
    u, v = (
        np.asarray(single(jnp.asarray(INPUTS[:, n]), segment_ids=jnp.asarray(IDS[:, n]))[0]) for n in (0, 1)
    )
    expected = numpy_head(model, u, v, lambda x: np.asarray(jax.nn.gelu(x)))
    np.testing.assert_allclose(logits, expected, atol=2e-5)


def test_the_head_of_long_range_arena():
    model = made(interaction="none", head_sizes=(6, 3), head_activation="relu")
    assert [layer.kernel.shape for layer in model.head] == [(16, 6), (6, 3), (3, 2)]
    model = made(head_sizes=(6, 3), head_activation="relu")
    assert [layer.kernel.shape for layer in model.head] == [(32, 6), (6, 3), (3, 2)]
    logits = model(jnp.asarray(INPUTS))[0]
    u, v = (np.asarray(model.encode(jnp.asarray(INPUTS[:, n]))) for n in (0, 1))
    np.testing.assert_allclose(logits, numpy_head(model, u, v, lambda x: np.maximum(x, 0)), atol=2e-5)


def test_a_training_step_sees_pairs_of_batches():
    options = dict(norm="batch_norm", dropout=0.1)
    split = SplitModel(
        lambda rngs: build_model(MODEL | dict(pattern=("s5",)) | options, rngs=rngs),
        padding="end",
        packed=False,
    )
    parameters, statistics = split.initialise(jax.random.key(0))
    batch = dict(inputs=jnp.asarray(INPUTS), segment_ids=jnp.asarray(IDS))
    logits, new = jax.jit(split)(parameters, statistics, batch, key=jax.random.key(1))
    assert logits.shape == (2, 2)
    assert any(np.any(new[name] != statistics[name]) for name in statistics)
    # What stands in the padding is not seen.
    changed = batch | dict(inputs=jnp.where(batch["segment_ids"] == 0, 8, batch["inputs"]))
    np.testing.assert_array_equal(
        jax.jit(split)(parameters, statistics, changed, key=jax.random.key(1))[0], logits
    )


def test_what_is_no_pair_is_refused():
    model = made()
    with pytest.raises(ValueError, match=r"inputs have shape \(2, 7\); expected pairs \(b, 2, t\)"):
        model(jnp.asarray(INPUTS[:, 0]))
    with pytest.raises(ValueError, match="takes no state"):
        model(jnp.asarray(INPUTS), {})


def test_models_that_do_not_fit_the_task_are_refused():
    config = dict(
        seed=0, task=dict(name="aan"), model=dict(kind="classifier", width=8, depth=1, pattern=("gla",))
    )
    with pytest.raises(
        ValueError, match=r"'aan' has one label per pair of rows.*expected kind='dual_encoder'"
    ):
        check_model(config)
    config["model"]["kind"] = "dual_encoder"
    check_model(config)
    config["task"]["name"] = "listops"
    with pytest.raises(ValueError, match=r"'listops' has one label per row, .*expected kind='classifier'"):
        with_sizes(config, dict(num_classes=2, vocab_size=3))
