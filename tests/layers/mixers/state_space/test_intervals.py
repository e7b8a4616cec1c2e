"""S5 and S4D on tokens that are not evenly spaced, against the recurrence of the paper in NumPy, and as the contract has it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.mixers import make_mixer
from layers.segments import Segments

WIDTH, TIME = 4, 70  # more than a chunk of S4D's recurrence
OPTIONS = {
    "s5": dict(state_size=4, dt_min=0.05, dt_max=0.5),
    "s5, bilinear": dict(state_size=4, discretization="bilinear", step_rescale=0.5),
    "s4d": dict(state_size=4, dt_min=0.05, dt_max=0.5),
    "s4d, bilinear": dict(state_size=4, systems=2, discretization="bilinear"),
}
RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, TIME, WIDTH)).astype(np.float32)
GAPS = RNG.uniform(0.1, 3.0, (2, TIME)).astype(np.float32)


def made(name, **more):
    mixer, options = name.partition(",")[0], OPTIONS.get(name, {}) | more
    return make_mixer(mixer, options, given=dict(width=WIDTH, dtype=jnp.float32), rngs=nnx.Rngs(0))


def run(mixer, x, gaps, state=None, ids=None, **facts):
    segments = Segments.of(ids, intervals=jnp.asarray(gaps), **facts)
    return mixer(jnp.asarray(x), state, segment_ids=segments)


def discretized(a, dt, rule):
    z = a * dt
    if rule == "zoh":
        return np.exp(z), np.expm1(z) / a
    return (1 + z / 2) / (1 - z / 2), dt / (1 - z / 2)


def literal(name, mixer, x, gaps):
    """h_t = a(dt gap_t) h_{t-1} + b(dt gap_t) B x_t, y_t = 2 Re(C h_t) + D x_t, step by step in float64."""
    config, dt = mixer.config, np.exp(np.float64(mixer.log_dt[...]))
    d = np.float64(mixer.d[...])
    if name.startswith("s5"):
        a = np.float64(mixer.eigenvalues[0]) + 1j * np.float64(mixer.eigenvalues[1])
        b = np.float64(mixer.b[0]) + 1j * np.float64(mixer.b[1])
        c = np.float64(mixer.c[0][0]) + 1j * np.float64(mixer.c[0][1])
        h, y = np.zeros(len(a), complex), []
        for token, gap in zip(x, gaps, strict=True):
            bar, scale = discretized(a, config.step_rescale * dt * gap, config.discretization)
            h = bar * h + scale * (b @ token)
            y.append(2 * (c @ h).real + d * token)
        return np.stack(y)
    a, b = (
        np.broadcast_to(np.asarray(v, complex), (WIDTH, config.state_size // 2)) for v in mixer.modes(WIDTH)
    )
    c = np.float64(mixer.c[0][0]) + 1j * np.float64(mixer.c[1][0])
    h, y = np.zeros(a.shape, complex), []
    for token, gap in zip(x, gaps, strict=True):
        bar, scale = discretized(a, dt[:, None] * gap, config.discretization)
        h = bar * h + scale * b * token[:, None]
        y.append(2 * (c * h).sum(1).real + d * token)
    return np.stack(y)


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", OPTIONS)
def test_the_recurrence_of_the_paper(name):
    mixer = made(name)
    graph, variables = nnx.split(mixer)
    call = jax.jit(lambda gaps: run(nnx.merge(graph, variables), X, gaps)[0])
    y = call(GAPS)
    for row in range(2):
        np.testing.assert_allclose(y[row], literal(name, mixer, X[row], GAPS[row]), atol=2e-5)
    # Intervals of 1 are what no intervals mean.
    np.testing.assert_allclose(call(np.ones_like(GAPS)), mixer(jnp.asarray(X))[0], atol=2e-5)


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ["s5", "s4d"])
def test_cut_packed_and_padded_rows_give_the_same(name):
    mixer = made(name)
    graph, variables = nnx.split(mixer)

    @functools.partial(jax.jit, static_argnames=("padding", "packed"))
    def call(x, gaps, state=None, ids=None, **facts):
        return run(nnx.merge(graph, variables), x, gaps, state, ids, **facts)

    whole = np.asarray(call(X, GAPS)[0])
    first, state = call(X[:, :35], GAPS[:, :35], mixer.init_state(2))
    second, _ = call(X[:, 35:], GAPS[:, 35:], state)
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), whole, atol=2e-5)
    # Two segments in a row are what they are alone, and what stands in padding reaches nothing.
    ids = np.repeat([1, 2, 0], [35, 30, 5])[None].repeat(2, 0)
    dirty = np.where(ids == 0, np.nan, GAPS)
    packed = np.asarray(call(X, dirty, ids=ids, padding="end")[0])
    np.testing.assert_allclose(packed[:, :35], first, atol=2e-5)
    alone = call(X[:, 35:], dirty[:, 35:], ids=np.minimum(ids, 1)[:, 35:], padding="end", packed=False)[0]
    np.testing.assert_allclose(packed[:, 35:65], alone[:, :30], atol=2e-5)


@pytest.mark.parametrize("name", ["s5", "s4d"])
def test_gradients_reach_parameters_and_intervals(name):
    graph, parameters = nnx.split(made(name))

    def loss(parameters, gaps):
        return jnp.sum(run(nnx.merge(graph, parameters), X[:, :6], gaps)[0] ** 2)

    by_parameters, by_gaps = jax.jit(jax.grad(loss, argnums=(0, 1)))(parameters, GAPS[:, :6])
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(by_parameters))
    assert np.all(np.isfinite(by_gaps))
    assert np.any(by_gaps != 0)


@pytest.mark.parametrize(
    "mixer, options",
    [
        ("s5", dict(bidirectional=True)),
        ("s4d", dict(bidirectional=True)),
        ("gla", dict(heads=2)),
        ("bidirectional", dict(inner="s5")),
        ("fnet", {}),
    ],
)
def test_mixers_that_take_no_intervals_refuse_them(mixer, options):
    mixer = make_mixer(mixer, options, given=dict(width=WIDTH, dtype=jnp.float32), rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match="takes no intervals between tokens here; S5 and S4D with bidirectional"
    ):
        run(mixer, X, GAPS)


def test_intervals_have_the_shape_of_the_ids():
    with pytest.raises(ValueError, match=r"intervals have shape \(2, 70\); expected \(2, 3\)"):
        Segments.of(jnp.ones((2, 3), jnp.int32), intervals=jnp.asarray(GAPS))
    cut = Segments.of(None, intervals=jnp.asarray(GAPS)).cut(2, 5)
    np.testing.assert_array_equal(cut.intervals, GAPS[:, 2:5])
