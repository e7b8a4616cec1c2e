"""Heads, normalisers and bonuses that Hopper kernels take in parts: what is around the kernels, with XLA in their place."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.kernels import head_parts
from layers.kernels.gated_linear_attention import SMALLEST_DENOMINATOR, gpu, xla
from layers.kernels.gated_linear_attention.cases import SUITE
from layers.kernels.segments import Segments
from tests.layers.kernels import test_primitives as shared

IDS = np.array([[0] * 2 + [1] * 9 + [0] * 3 + [2] + [5] * 7 + [0] * 4, [3] * 26], np.int32)


@pytest.mark.parametrize(
    "features, count, width",
    [
        (1, 1, 64),
        (64, 1, 64),
        (65, 1, 128),
        (128, 1, 128),
        (192, 3, 64),
        (256, 2, 128),
        (288, 5, 64),
        (1024, 8, 128),
    ],
)
def test_parts_have_the_fewest_features(features, count, width):
    assert head_parts.value_parts(features) == (count, width)


def test_parts_of_keys():
    assert head_parts.key_parts(96) == [slice(0, 96)]
    assert head_parts.key_parts(192) == [slice(0, 128), slice(128, 192)]
    assert head_parts.key_parts(384) == [slice(start, start + 128) for start in (0, 128, 256)]


def test_parts_of_a_head_are_neighbours():
    parts = head_parts.Parts(3, 64)
    v = jnp.arange(2 * 3 * 2 * 150.0).reshape(2, 3, 2, 150)
    split = head_parts.split(v, parts)
    assert split.shape == (2, 3, 6, 64)
    assert (split[:, :, 4] == v[:, :, 1, 64:128]).all()
    assert not split[:, :, 5, 22:].any()
    assert (head_parts.join(split, parts, 150) == v).all()
    state = jnp.arange(2 * 2 * 5 * 150.0).reshape(2, 2, 5, 150)
    split = head_parts.split_state(state, parts)
    assert (split[:, 4] == state[:, 1, :, 64:128]).all()
    assert (head_parts.join_state(split, parts, 150) == state).all()


@pytest.fixture
def suite(monkeypatch):
    """A suite whose "gpu" is the kernels' function with XLA in place of kernels, which take what kernels take."""

    def run(call, q, k, v, g, number, state):
        assert q.shape[3] <= head_parts.WIDEST
        assert v.shape[3] <= head_parts.WIDEST
        return xla.gated_linear_attention(
            q, k, v, g, None, call.scale, False, state, Segments.of(number), SMALLEST_DENOMINATOR
        )

    monkeypatch.setattr(gpu, "_padded", run)

    def function(q, k, v, *, impl, **options):
        names = ("log_decay", "bonus", "initial_state")
        given = {"normalize": False} | dict.fromkeys(names) | options
        segments = Segments.of(given.pop("segment_ids", None))
        scale = q.shape[3] ** -0.5
        return gpu.gated_linear_attention(
            q, k, v, scale=scale, segments=segments, smallest=SMALLEST_DENOMINATOR, **given
        )

    return dataclasses.replace(SUITE, function=function)


def arguments_of(heads, widths, *, bonus, normalize, decay=True, alike=0.0):
    """Float32 arguments of two rows; with `normalize` features are positive and values have the mean `alike`."""
    rng = np.random.default_rng(1)
    count, (q, k, v), (keys, values) = max(heads), heads, widths
    drawn = {
        "q": rng.standard_normal((2, IDS.shape[1], q, keys)),
        "k": rng.standard_normal((2, IDS.shape[1], k, keys)),
        "v": rng.standard_normal((2, IDS.shape[1], v, values)) + alike,
    }
    state = rng.standard_normal((2, count, keys, values))
    if normalize:
        drawn |= {name: np.exp(0.5 * drawn[name]) for name in "qk"}
        state = np.concatenate([state, rng.uniform(1, 2, (2, count, keys, 1))], axis=-1)
    if decay:
        shape = 2, IDS.shape[1], count
        drawn["log_decay"] = np.where(rng.random(shape) < 0.2, -20.0, -0.1 * rng.random(shape))
    if bonus:
        drawn["bonus"] = np.abs(rng.standard_normal((count, keys)))
    return shared.cast(drawn | {"initial_state": state}, "float32")


CALLS = {
    "wide keys and values": (((1, 2, 2), (144, 150)), {}),
    "wide values that heads share": (((2, 1, 1), (6, 140)), {}),
    "bonus": (((1, 2, 2), (6, 5)), {"bonus": True}),
    "normalised": (((2, 2, 1), (6, 128)), {"normalize": True, "alike": 3.0}),
    "normalised, with a bonus, no decay": (
        ((2, 2, 2), (130, 5)),
        {"normalize": True, "bonus": True, "decay": False},
    ),
}


@pytest.mark.sample(5)
@pytest.mark.parametrize("name", CALLS)
def test_calls_in_parts_match_float64_reference(suite, name):
    """Values, states and all gradients, with segments, padding that holds NaN, and initial states."""
    sizes, given = CALLS[name]
    normalize = given.get("normalize", False)
    arguments = arguments_of(*sizes, **{"bonus": False, "normalize": normalize} | given)
    case = dataclasses.replace(SUITE.cases[0], options={"normalize": True} if normalize else {})
    ids = {"segment_ids": jnp.asarray(IDS)}
    want, weights = reference(case, arguments, **ids)
    spoilt = arguments | {n: arguments[n].at[0, :2].set(jnp.nan) for n in "qkv"}
    got = shared.value_and_gradients(suite, case, "gpu", spoilt, weights, **ids)
    shared.close(got[0], want[0], 2e-5, "outputs")
    shared.close_gradients(got[1], want[1], arguments, want[0], weights, 1e-4 if normalize else 2e-5)


def reference(case, arguments, **extra):
    """Outputs and gradients of the float64 reference, and what weights the outputs."""
    with jax.enable_x64(True):
        exact = jax.tree.map(jnp.asarray, shared.wide(arguments))
        shapes = jax.eval_shape(lambda a: shared.call(SUITE, case, "reference", a, **extra), exact)
        weights = shared.weights_like(jax.tree.map(lambda s: np.zeros(s.shape), shapes))
        want = shared.value_and_gradients(SUITE, case, "reference", exact, weights, **extra)
        return jax.tree.map(np.asarray, want), weights
