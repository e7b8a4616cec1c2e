"""S5 against its equation in NumPy, and its initialisation against the figures of the paper's code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.mixers.state_space.s5 import S5, S5Config

WIDTH, TIME = 5, 19


def make(**options):
    return S5(S5Config(width=WIDTH, state_size=8, blocks=2, **options), rngs=nnx.Rngs(1))


def complex_of(parameter):
    real, imaginary = np.asarray(parameter[...], np.float64)
    return real + 1j * imaginary


def literal(model, x, method):
    """The dense continuous system, discretised as written in the paper, one step at a time in complex128."""
    a, b = complex_of(model.eigenvalues), complex_of(model.b)
    dt = np.exp(np.asarray(model.log_dt[...], np.float64))
    if method == "zoh":
        a_bar = np.exp(a * dt)
        b_bar = ((a_bar - 1) / a)[:, None] * b
    else:
        inverse = np.linalg.inv(np.eye(len(a)) - np.diag(a * dt) / 2)
        a_bar = np.diag(inverse @ (np.eye(len(a)) + np.diag(a * dt) / 2))
        b_bar = inverse @ (dt[:, None] * b)
    d = np.asarray(model.d[...], np.float64)
    x = np.asarray(x, np.float64)

    def scan(u):
        h, states = np.zeros(len(a), complex), []
        for step in u:
            h = a_bar * h + b_bar @ step
            states.append(h)
        return np.stack(states)

    outputs = []
    for row in x:
        y = scan(row) @ complex_of(model.c[0]).T
        if model.config.bidirectional:
            y = y + scan(row[::-1])[::-1] @ complex_of(model.c[1]).T
        outputs.append((2 if model.config.conj_sym else 1) * y.real + d * row)
    return np.stack(outputs)


@pytest.mark.sample(3)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("method", ["zoh", "bilinear"])
@pytest.mark.parametrize("conj_sym", [True, False])
def test_equals_the_equation(bidirectional, method, conj_sym):
    model = make(bidirectional=bidirectional, discretization=method, conj_sym=conj_sym)
    x = np.random.default_rng(0).standard_normal((2, TIME, WIDTH)).astype(np.float32)
    got, _ = model(jnp.asarray(x))
    np.testing.assert_allclose(got, literal(model, x, method), rtol=1e-4, atol=2e-6)


def test_half_spectrum_equals_full_spectrum_of_conjugate_pairs():
    half = make()
    full = S5(S5Config(width=WIDTH, state_size=8, blocks=2, conj_sym=False), rngs=nnx.Rngs(1))
    for name in ("eigenvalues", "b"):
        real, imaginary = getattr(half, name)[...]
        both = jnp.stack([jnp.concatenate([real, real]), jnp.concatenate([imaginary, -imaginary])])
        setattr(full, name, nnx.Param(both))
    full.log_dt[...] = jnp.tile(half.log_dt[...], 2)
    real, imaginary = half.c[0][...]
    full.c[0][...] = jnp.stack(
        [jnp.concatenate([v, w], 1) for v, w in ((real, real), (imaginary, -imaginary))]
    )
    full.d[...] = half.d[...]
    x = jax.random.normal(jax.random.key(0), (2, TIME, WIDTH))
    np.testing.assert_allclose(full(x)[0], half(x)[0], atol=2e-6)


def test_reversed_input_with_swapped_output_matrices_reverses_the_output():
    model = make(bidirectional=True)
    x = jax.random.normal(jax.random.key(0), (2, TIME, WIDTH))
    forward, _ = model(x)
    first, second = model.c[0][...], model.c[1][...]
    model.c[0][...], model.c[1][...] = second, first
    backward, _ = model(x[:, ::-1])
    np.testing.assert_allclose(backward[:, ::-1], forward, atol=2e-6)


def test_initial_eigenvalues_are_those_of_the_normal_part_of_hippo_legs_in_every_block():
    model = S5(S5Config(width=2, state_size=16, blocks=2), rngs=nnx.Rngs(0))
    golden = [0.427489, 1.957794, 5.354209, 19.857410]
    real, imaginary = np.asarray(model.eigenvalues[...])
    np.testing.assert_allclose(real, -0.5, atol=1e-6)
    np.testing.assert_allclose(np.sort(imaginary.reshape(2, 4), axis=1), [golden, golden], rtol=1e-5)


def test_initial_variances_are_those_of_the_papers_code():
    width, size = 256, 64
    model = S5(S5Config(width=width, state_size=size, blocks=4), rngs=nnx.Rngs(0))
    # B = V* B_real with V unitary and B_real of variance 1 / P.
    assert np.square(np.abs(complex_of(model.b))).mean() == pytest.approx(1 / size, rel=0.05)
    expected = {"lecun_normal": 2 / (width * size), "truncated_normal": 2 / size, "complex_normal": 1.0}
    for c_init, variance in expected.items():
        model = S5(S5Config(width=width, state_size=size, blocks=4, c_init=c_init), rngs=nnx.Rngs(0))
        measured = np.square(np.abs(complex_of(model.c[0]))).mean()
        assert measured == pytest.approx(variance, rel=0.25 if c_init == "truncated_normal" else 0.05)
    steps = np.asarray(model.log_dt[...])
    assert steps.min() >= np.log(0.001)
    assert steps.max() <= np.log(0.1)
    assert steps.mean() == pytest.approx(np.log(0.01), abs=0.7)


def test_clip_eigs_keeps_the_system_stable():
    free, clipped = make(), make(clip_eigs=True)
    x = jnp.ones((1, 400, WIDTH))
    for model in (free, clipped):
        model.eigenvalues[...] = model.eigenvalues[...].at[0].set(2.0)
        model.log_dt[...] = jnp.zeros_like(model.log_dt[...])
    assert not np.isfinite(free(x)[0]).all()
    assert np.isfinite(clipped(x)[0]).all()


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"state_size": 6, "blocks": 2},
            "state_size=6 cannot be cut into blocks=2 of conjugate pairs.*multiple of 4",
        ),
        ({"discretization": "euler"}, "discretization='euler'.*bilinear"),
        ({"c_init": "zeros"}, "c_init='zeros'"),
        ({"dt_min": 0.1, "dt_max": 0.01}, "dt_min=0.1"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        S5Config(width=4, **options)
