"""FLOPs of training steps, against the formula of the field, and the peaks of devices."""

import jax
import jax.numpy as jnp
import pytest

from experiments.analysis.utilization import Utilization, peak_flops, training_flops
from experiments.tasks import tokens
from experiments.training.model import SplitModel
from seqmodels import build_model

WIDTH, DEPTH, VOCABULARY, BATCH, TIME = 64, 3, 256, 2, 128


def transformer(**options):
    config = dict(
        kind="language_model",
        vocab_size=VOCABULARY,
        width=WIDTH,
        depth=DEPTH,
        pattern=("attention",),
        mixers={"attention": dict(heads=4)},
        **options,
    )
    return SplitModel(lambda rngs: build_model(config, rngs=rngs), unprojected=True)


def batch(time=TIME):
    tokens = jax.ShapeDtypeStruct((BATCH, time), jnp.int32)
    return dict(inputs=tokens, labels=tokens, weight=jax.ShapeDtypeStruct((BATCH,), jnp.float32))


@pytest.mark.parametrize("options", [{}, dict(remat="full"), dict(scan=False)])
def test_a_transformer_takes_six_times_its_matrices_and_its_attention(options):
    model = transformer(**options)
    matrices = sum(d.size for d in model.parameters.values() if len(d.shape) - d.names.stacked == 2)
    expected = BATCH * TIME * (6 * matrices + 12 * DEPTH * WIDTH * TIME)
    assert training_flops(model, tokens.cross_entropy, batch()) == pytest.approx(expected, rel=0.02)


def test_peaks_of_devices():
    assert peak_flops(["NVIDIA H100 80GB HBM3"] * 2) == 2 * 989e12
    assert peak_flops(["NVIDIA H100 PCIe"]) == 756e12
    assert peak_flops(["NVIDIA H100 80GB HBM3", "cpu"]) is None
    unknown = Utilization(transformer(), tokens.cross_entropy, ["cpu"])
    assert (unknown.peak, unknown.flops(batch())) == (None, 0.0)
    known = Utilization(transformer(), tokens.cross_entropy, ["TPU v4"])
    assert known.flops(batch()) > known.flops(batch(TIME // 2)) > 0
