"""Pieces of stretches: the text at their places, every place equally often, and the loss and its slope written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import log_softmax

from experiments.data.pipeline import train_iterator
from experiments.data.text.packing import pack
from experiments.data.text.pieces import Pieces
from experiments.tasks import tokens
from experiments.training.model import SplitModel, arrays_of
from seqmodels import build_model
from tests.experiments.data.text.test_packing import END, documents
from tests.layers.mixers.literal import rms

LENGTH, EXTENT, COUNT = 8, 24, 4
VOCABULARY, WIDTH, HEADS, BASE = END + 1, 8, 2, 50.0
CONFIG = {
    "kind": "language_model",
    "vocab_size": VOCABULARY,
    "width": WIDTH,
    "depth": 1,
    "pattern": ("attention+none",),
    "mixer_defaults": {"heads": HEADS, "position": {"name": "rope", "base": BASE}},
}


def stretches():
    sizes = np.random.default_rng(0).integers(1, 40, 60)
    return pack(documents(sizes), END, packing="concatenate", length=EXTENT, reset=False)


@pytest.fixture(scope="module")
def source():
    return Pieces(stretches(), length=LENGTH, pieces=COUNT)


def test_a_row_is_the_text_at_rising_places_of_a_stretch(source):
    batch = source.gather(np.arange(len(source)), LENGTH)
    whole, rows = stretches().gather(np.arange(len(source)), EXTENT), np.arange(len(source))[:, None]
    places = batch["positions"]
    assert (np.diff(places) > 0).all()
    np.testing.assert_array_equal(places[:, 1::2], places[:, ::2] + 1)  # pieces of two tokens
    for name in ("inputs", "labels"):
        np.testing.assert_array_equal(batch[name], whole[name][rows, places])
    wider = source.gather(np.arange(2), LENGTH + 3)
    np.testing.assert_array_equal(wider["segment_ids"], [[1] * LENGTH + [0] * 3] * 2)
    with pytest.raises(ValueError, match="does not fit"):
        source.gather(np.arange(2), LENGTH - 1)


def test_every_place_is_read_equally_often_and_every_pass_has_draws_of_its_own(source):
    passes = len(source) * np.arange(2000)
    counts = np.bincount(source.gather(passes, LENGTH)["positions"].ravel(), minlength=EXTENT)
    expected = 2000 * LENGTH / EXTENT
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)
    batches = train_iterator(source, batch_size=len(source), seed=0, num_steps=2, prefetch=0)
    first, second = (np.sort(batch["positions"].sum(1)) for batch in batches)
    assert (first != second).any()


def literal_loss(parameters, batch):
    """The mean loss of rows whose tokens see the earlier ones of the row, at the places that these have in the text."""
    p = {name: np.asarray(array, np.float64) for name, array in parameters.items()}
    table, total = p["embedding/table"], []
    for inputs, labels, places in zip(batch["inputs"], batch["labels"], batch["positions"], strict=True):
        x = table[inputs]
        u = rms(x, 1e-6) * p["stack/blocks/0/mixer_norm/scale"]
        q, k, v = (
            (u @ p[f"stack/blocks/0/mixer/{name}/kernel"]).reshape(LENGTH, HEADS, -1)
            for name in ("query", "key", "value")
        )
        turns = np.exp(1j * places[:, None, None] * BASE ** (-np.arange(0, 4, 2) / 4))
        q, k = ((y[..., :2] + 1j * y[..., 2:]) * turns for y in (q, k))
        logits = np.einsum("thk,shk->hts", q, k.conj()).real / 2
        logits = np.where(places[:, None] >= places, logits, -np.inf)
        weights = np.exp(log_softmax(logits, -1))
        y = np.einsum("hts,shk->thk", weights, v).reshape(LENGTH, -1)
        y = x + y @ p["stack/blocks/0/mixer/output/kernel"]
        h = rms(y, 1e-6) * p["norm/scale"]
        total.append(-log_softmax(h @ table.T, -1)[np.arange(LENGTH), labels])
    return np.mean(total)


@pytest.fixture(scope="module")
def trained(source):
    """The loss of two rows as a function of parameters, the rows, and parameters."""
    model = SplitModel(lambda rngs: build_model(CONFIG | {"scan": False}, rngs=rngs), padding="end")
    parameters, statistics = arrays_of(build_model(CONFIG | {"scan": False}, rngs=nnx.Rngs(0)))
    batch = source.gather(np.arange(2), LENGTH) | {"weight": np.ones(2, np.float32)}

    def loss(parameters, batch):
        batch = {name: jnp.asarray(array) for name, array in batch.items()}
        return tokens.cross_entropy(model(parameters, statistics, batch, key=None)[0], batch)[0]

    return loss, batch, parameters


def test_the_loss_is_the_equation(trained):
    loss, batch, parameters = trained
    value = float(loss(parameters, batch))
    np.testing.assert_allclose(value, literal_loss(parameters, batch), rtol=1e-5)
    adjacent = {name: array for name, array in batch.items() if name != "positions"}
    assert abs(float(loss(parameters, adjacent)) - value) > 1e-4


@pytest.mark.slow
def test_the_gradient_is_the_slope_of_the_equation(trained):
    loss, batch, parameters = trained
    gradient = jax.jit(jax.grad(loss))(parameters, batch)
    rng, step = np.random.default_rng(1), 1e-5
    direction = {name: rng.standard_normal(array.shape) for name, array in parameters.items()}
    moved = [
        literal_loss(
            {n: np.asarray(a, np.float64) + sign * step * direction[n] for n, a in parameters.items()}, batch
        )
        for sign in (1, -1)
    ]
    slope = sum(np.sum(np.asarray(gradient[name], np.float64) * direction[name]) for name in gradient)
    np.testing.assert_allclose(slope, (moved[0] - moved[1]) / (2 * step), rtol=1e-4)
