"""What lets a language model see the tokens that it predicts is refused, and a classifier that sees no later ones says so."""

import logging

import numpy as np
import pytest
from flax import nnx

from layers.norms import NORMS
from seqmodels import build_model, encoder

MODEL = {"width": 8, "vocab_size": 5, "depth": 1, "channel": "none"}


def made(**fields):
    return nnx.eval_shape(lambda: build_model(MODEL | fields, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("norm", NORMS)
def test_norms_over_time_are_refused_in_language_models(norm):
    options = {
        "kind": "language_model",
        "pattern": ("s5",),
        "mixers": {"s5": {"state_size": 4}},
        "norm": norm,
    }
    if norm != "batch_norm":
        made(**options)
        return
    with pytest.raises(
        ValueError, match="norm='batch_norm' takes statistics over time.*use 'layer_norm' or 'rms_norm'"
    ):
        made(**options)
    made(**options | {"kind": "classifier", "num_classes": 2})
    regressor = options | {"kind": "regressor", "output_size": 2}
    with pytest.raises(ValueError, match="a regressor with causal=True would see"):
        made(**regressor)
    made(**regressor, causal=False)


def test_a_regressor_whose_outputs_depend_on_later_inputs_must_say_so():
    fields = {
        "kind": "regressor",
        "output_size": 3,
        "vocab_size": None,
        "input_size": 2,
        "pattern": ("fnet",),
    }
    with pytest.raises(
        ValueError, match=r"layer 0 \(fnet\) is not causal; a regressor with causal=True must be"
    ):
        made(**fields)
    model = build_model(MODEL | fields | {"causal": False}, rngs=nnx.Rngs(0))
    first = np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32)
    rows = np.stack([first, first + np.eye(4, 2, -2, np.float32)])
    outputs, x = nnx.jit(
        lambda model, rows: (model(rows)[0], model.norm(model.stack(model.embedding(rows)[0])[0]))
    )(model, rows)
    assert outputs.shape == (2, 4, 3)
    assert outputs.dtype == np.float32
    assert (np.abs(outputs[0, :2] - outputs[1, :2]) > 1e-4).all()
    expected = np.asarray(x) @ np.asarray(model.head.kernel[...]) + np.asarray(model.head.bias[...])
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "mixer, options, message",
    [
        ("s5", {"state_size": 4}, "(s5) are all causal"),
        ("s5", {"state_size": 4}, "the option bidirectional=True of s5"),
        ("lstm", {}, "mixer='bidirectional'"),
        ("s5", {"state_size": 4, "bidirectional": True}, None),
    ],
)
def test_a_classifier_of_causal_mixers_says_so_once(mixer, options, message, caplog):
    encoder._say_causal.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            made(kind="classifier", num_classes=2, pattern=(mixer,), mixers={mixer: options})
    lines = [record.getMessage() for record in caplog.records if record.name == encoder.__name__]
    assert len(lines) == (message is not None)
    assert message is None or (message in lines[0] and "bidirectional" in lines[0])
