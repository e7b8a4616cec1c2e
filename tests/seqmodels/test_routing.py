"""TREAD: tokens that pass layers by in training, which rejoin as they were, with packed rows and true positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.reduction.kept import kept_segments
from layers.segments import Segments
from seqmodels import build_model
from seqmodels.routing import kept_tokens
from tests.layers.mixers.literal import apply, heads, masked_softmax, rms, wide

TIME, HEADS = 12, 2
CONFIG = {
    "kind": "masked_language_model",
    "vocab_size": 7,
    "width": 8,
    "depth": 3,
    "pattern": ("attention+none",),
    "mixer_defaults": {"heads": HEADS, "causal": False, "position": {"name": "rope", "base": 50.0}},
}
IDS = np.array([[1] * 5 + [2] * 7, [1] * 8 + [0] * 4])
X = np.random.default_rng(0).standard_normal((2, TIME, 8)).astype(np.float32)


def stack(**changes):
    return build_model(CONFIG | changes, rngs=nnx.Rngs(0)).stack


def attended(block, x, positions, numbers):
    """x + attention of the norm of one row of kept tokens, at their positions."""
    mixer = block.mixer
    u = rms(x, block.mixer_norm.config.epsilon) * wide(block.mixer_norm.scale)
    q, k, v = (heads(apply(f, u), HEADS) for f in (mixer.query, mixer.key, mixer.value))
    angles = np.exp(1j * positions[:, None, None] * 50.0 ** (-np.arange(0, 4, 2) / 4))
    q, k = ((y[..., :2] + 1j * y[..., 2:]) * angles for y in (q, k))
    logits = np.einsum("thk,shk->hts", q, k.conj()).real / 2
    weights = masked_softmax(logits, numbers[:, None] == numbers)
    return x + apply(mixer.output, np.einsum("hts,shk->thk", weights, v).reshape(x.shape))


def test_which_tokens_are_kept():
    segments = Segments.of(jnp.asarray(IDS))

    @jax.jit
    def run(key):
        kept = kept_tokens(key, (2, TIME), segments, 0.6)
        own, placed = kept_segments(kept, TIME, segments)
        return kept, own, placed, Segments.of(own.numbers)

    kept, own, placed, alone = run(jax.random.key(0))
    kept, rows = np.asarray(kept), np.arange(2)[:, None]
    assert (np.diff(kept) > 0).all()
    assert kept.shape == (2, TIME - 7)
    assert (IDS[1, kept[1]] != 0).all()  # padding goes last
    for found in (own, placed):
        np.testing.assert_array_equal(found.numbers, IDS[rows, kept])
    np.testing.assert_array_equal(placed.positions, np.asarray(segments.positions)[rows, kept])
    np.testing.assert_array_equal(own.positions, alone.positions)


def test_a_segment_that_loses_all_its_tokens_leaves_the_numbers_of_others():
    kept = jnp.asarray([[5, 8, 11], [2, 3, 9]])
    for found in kept_segments(kept, TIME, Segments.of(jnp.asarray(IDS))):
        np.testing.assert_array_equal(found.numbers, [[2, 2, 2], [1, 1, 0]])
        assert not found.starts.any()


@pytest.mark.slow
def test_kept_tokens_meet_at_their_positions_and_the_others_pass():
    routed = stack(route=(1, 2), route_rate=0.6)
    key, segments = jax.random.key(3), Segments.of(jnp.asarray(IDS))
    got = np.asarray(jax.jit(lambda x: routed(x, segment_ids=segments, key=key)[0])(X), np.float64)
    drawn = jax.random.fold_in(jax.random.split(key, 3)[1], 3)
    kept = np.asarray(kept_tokens(drawn, (2, TIME), segments, 0.6))
    assert (np.diff(kept) > 1).any()
    positions = np.asarray(segments.positions)
    for row in range(2):
        real = IDS[row] != 0
        x = np.where(real[:, None], X[row], 0).astype(np.float64)
        for layer, few in enumerate((np.arange(TIME), kept[row], np.arange(TIME))):
            few = few[real[few]]
            x[few] = attended(routed.block(layer), x[few], positions[row, few], IDS[row, few])
        np.testing.assert_allclose(got[row][real], x[real], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["attention", "mamba", "gated_deltanet"])
def test_segments_stay_apart_and_inference_has_no_route(mixer):
    options = {"pattern": (f"{mixer}+none",), "mixer_defaults": {"heads": HEADS, "state_size": 4}}
    routed, plain = stack(route=(0, 3), **options), stack(scan=False, **options)
    np.testing.assert_array_equal(routed(jnp.asarray(X))[0], plain(jnp.asarray(X))[0])
    ids, key = jnp.asarray([[1] * 6 + [2] * 6]), jax.random.key(1)
    y, pullback = jax.vjp(lambda x: routed(x, segment_ids=ids, key=key)[0], jnp.asarray(X[:1]))
    (reach,) = pullback(jnp.zeros_like(y).at[:, 6:].set(1.0))
    assert np.abs(reach[0, :6]).max() == 0
    kept = kept_tokens(jax.random.fold_in(jax.random.split(key, 3)[0], 3), (1, TIME), None, 0.5)
    passed = np.setdiff1d(np.arange(TIME), kept)
    np.testing.assert_array_equal(y[0, passed], X[0, passed])
    everything = stack(route=(1, 3), route_rate=0.01, **options)(jnp.asarray(X), key=key)[0]
    np.testing.assert_allclose(everything, plain(jnp.asarray(X))[0], atol=1e-5)
