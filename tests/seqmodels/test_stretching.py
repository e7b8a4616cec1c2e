"""Positions of longer sequences in training: what is drawn, and which layers read it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.segments import Segments
from seqmodels import build_model
from seqmodels.stretching import stretched, stretched_positions

TIME = 12
CONFIG = {
    "kind": "language_model",
    "vocab_size": 7,
    "width": 8,
    "depth": 2,
    "pattern": ("attention+none",),
    "mixer_defaults": {"heads": 2},
    "scan": False,
}


def test_positions_are_a_subset_of_those_of_a_longer_sequence():
    draw = jax.jit(lambda key: stretched_positions(key, 400, TIME, 3))
    drawn = np.asarray(draw(jax.random.key(0)))
    assert (drawn[:, 0] == 0).all()
    assert (np.diff(drawn) > 0).all()
    factors, counts = np.unique((drawn[:, -1] + 1) / TIME, return_counts=True)
    np.testing.assert_array_equal(factors, [1, 2, 3])
    assert counts.min() > 100
    np.testing.assert_array_equal(drawn[drawn[:, -1] == TIME - 1], np.tile(np.arange(TIME), (counts[0], 1)))
    # Every position between the ends is as likely: (t - 2) / (2 t - 2) for twice the length.
    twice = drawn[drawn[:, -1] == 2 * TIME - 1][:, 1:-1]
    share = np.bincount(twice.ravel(), minlength=2 * TIME - 1)[1:] / len(twice)
    np.testing.assert_allclose(share, (TIME - 2) / (2 * TIME - 2), atol=0.2)


def test_every_segment_begins_at_zero_and_keeps_the_gaps():
    ids, key = jnp.asarray([[1] * 5 + [2] * 7, [0, 1, 1, 0, 1, 1, 3, 3, 3, 3, 0, 0]]), jax.random.key(3)

    @jax.jit
    def run():
        plain = Segments.of(ids)
        return plain, stretched(key, ids.shape, plain, 4), stretched_positions(key, *ids.shape, 4)

    plain, found, drawn = run()
    drawn = np.asarray(drawn)
    for row, places in ((0, range(5)), (0, range(5, 12)), (1, (1, 2, 4, 5)), (1, range(6, 10))):
        places = list(places)
        np.testing.assert_array_equal(
            np.asarray(found.positions)[row, places], drawn[row, places] - drawn[row, places[0]]
        )
    np.testing.assert_array_equal(found.numbers, plain.numbers)


@pytest.mark.parametrize("position", [{"name": "clex", "length": TIME, "max_factor": 4}, "alibi", "fire"])
def test_layers_read_the_drawn_positions_in_training_alone(position):
    config = CONFIG | {"mixer_defaults": {"heads": 2, "position": position}}
    model, plain = (build_model(config | {"stretch": s}, rngs=nnx.Rngs(0)) for s in (4, 1))
    tokens, key = jnp.arange(2 * TIME).reshape(2, TIME) % 7, jax.random.key(1)
    placed = stretched(jax.random.fold_in(key, 2), tokens.shape, None, 4)
    true, want = (jax.jit(lambda s: plain(tokens, segment_ids=s)[0])(s) for s in (None, placed))
    np.testing.assert_allclose(jax.jit(lambda: model(tokens)[0])(), true, atol=1e-6)
    assert np.abs(np.asarray(want - true)).max() > 1e-3
    np.testing.assert_allclose(jax.jit(lambda: model(tokens, key=key)[0])(), want, atol=1e-6)
