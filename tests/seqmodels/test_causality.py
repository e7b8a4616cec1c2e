"""What lets a language model see the tokens that it predicts is refused, and a classifier that sees no later ones says so."""

import logging

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
