"""`ssm_kernel` against formulas written out in NumPy, and the properties that its callers rest on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import hippo
from layers.kernels import ssm_kernel as package
from layers.kernels.linear_recurrence import linear_recurrence
from layers.kernels.long_conv import long_conv
from layers.kernels.ssm_kernel import real_system, restore_output, truncate_output, zoh

STATIC = ("length", "discretization", "conjugate_pairs", "truncated")
ssm_kernel = jax.jit(package.ssm_kernel, static_argnames=STATIC)
BILINEAR = {"discretization": "bilinear"}
WIDTH = 3


def steps(rng, low=1e-3, high=0.1):
    return np.exp(rng.uniform(np.log(low), np.log(high), WIDTH)).astype(np.float32)


def complex_normal(rng, *shape):
    return (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(np.complex64)


def device(*arrays):
    """Arrays in 32 bits; a vector of modes gets the axis of channels that share it."""
    return [jnp.asarray(v, jnp.complex64 if np.iscomplexobj(v) else jnp.float32) for v in arrays]


def error(got, want):
    return np.linalg.norm(np.asarray(got) - want) / np.linalg.norm(want)


def dense_kernel(a, b, c, dt, length):
    """Bilinear discretisation of a dense real system and one step after the other, with its A_bar, in float64."""
    eye = np.eye(len(a))
    inverse = np.linalg.inv(eye - dt / 2 * a)
    a_bar, state, kernel = inverse @ (eye + dt / 2 * a), dt * inverse @ b, []
    for _ in range(length):
        kernel.append(c @ state)
        state = a_bar @ state
    return np.array(kernel), a_bar


def hippo_system(form, n, length, seed=0):
    """The arguments of a HiPPO system in half pairs, its kernel, and its truncated output vector."""
    rng = np.random.default_rng([seed, n, length])
    (a, _, b), dplr = getattr(hippo, f"nplr_{form}")(n), getattr(hippo, f"dplr_{form}")(n, half=True)
    dt, c = steps(rng), rng.standard_normal((WIDTH, n))
    kernels, truncated = [], []
    for row, step in zip(c, dt.astype(float), strict=True):
        kernel, a_bar = dense_kernel(a, b, row, step, length)
        kernels.append(kernel)
        truncated.append(row @ (np.eye(n) - np.linalg.matrix_power(a_bar, length)) @ dplr.v)
    arguments = (dplr.eigenvalues[None], dplr.b[None], c @ dplr.v, dt)
    return device(*arguments), device(dplr.p[None])[0], np.array(kernels), device(np.array(truncated))[0]


@pytest.mark.parametrize("form", ["legs", "legt", "fout"])
@pytest.mark.parametrize("length", [101, 128])
def test_low_rank_kernel_is_that_of_the_dense_hippo_system(form, length):
    arguments, p, want, _ = hippo_system(form, 16, length)
    assert error(ssm_kernel(*arguments, length=length, p=p, **BILINEAR), want) < 5e-6


@pytest.mark.parametrize("n, length", [(4, 1), (4, 2), (4, 3), (16, 101), (64, 256)])
def test_truncated_kernel_by_cauchy_sums(n, length):
    (a, b, _, dt), p, want, truncated = hippo_system("legs", n, length)
    got = ssm_kernel(a, b, truncated, dt, length=length, p=p, truncated=True, **BILINEAR)
    assert error(got, want) < 5e-6


def test_truncated_kernel_of_rank_two():
    (a, b, _, dt), p, want, truncated = hippo_system("legt", 16, 130)
    got = ssm_kernel(a, b, truncated, dt, length=130, p=p, truncated=True, **BILINEAR)
    assert error(got, want) < 2e-5


def test_low_rank_kernel_of_full_size():
    arguments, p, want, _ = hippo_system("legs", 64, 1000)
    assert error(ssm_kernel(*arguments, length=1000, p=p, **BILINEAR), want) < 1e-5


def test_output_truncated_and_restored():
    (a, _, c, dt), p, _, want = hippo_system("legs", 16, 77)
    got = truncate_output(a, c, dt, p, length=77)
    assert error(got, np.asarray(want)) < 2e-6
    assert error(restore_output(a, got, dt, p, length=77), np.asarray(c)) < 1e-3
    # C (I - A_bar^2L) = C (I - A_bar^L) + (C - C (I - A_bar^L)) (I - A_bar^L)
    twice = got + truncate_output(a, c - got, dt, p, length=77)
    assert error(truncate_output(a, c, dt, p, length=154), np.asarray(twice)) < 2e-6


def test_stepping_the_real_system_gives_the_kernel():
    (a, b, c, dt), p, want, _ = hippo_system("legs", 8, 40)
    a_bar, b_bar, row = (np.asarray(v, np.float64) for v in real_system(a, b, c, dt, p))
    state, got = b_bar, []
    for _ in range(40):
        got.append((row * state).sum(-1))
        state = np.einsum("dij,dj->di", a_bar, state)
    assert error(np.stack(got, -1), want) < 1e-5


FREQUENCIES = {
    "lin": -0.5 + 1j * np.pi * np.arange(32),
    "inv": -0.5 + 1j * 64 / np.pi * (64 / (2 * np.arange(32) + 1) - 1),
    "legs": hippo.dplr_legs(64, half=True).eigenvalues,
    "undamped": -1e-3 + 1j * np.pi * np.arange(32),
}


@pytest.mark.parametrize("name", FREQUENCIES)
def test_s4d_keeps_its_phase_over_long_kernels(name):
    """Fast modes turn thousands of times before they decay; angles in plain float32 are off by 1e-5 to 1e-2 here."""
    rng, length = np.random.default_rng(0), 5000
    a, dt, c = FREQUENCIES[name][None].astype(np.complex64), steps(rng), complex_normal(rng, WIDTH, 32)
    z = a.astype(complex) * dt[:, None].astype(float)
    weights = c * (np.exp(z) - 1) / a
    want = 2 * np.einsum("dn,dnl->dl", weights, np.exp(z[..., None] * np.arange(length))).real
    assert error(ssm_kernel(*device(a), None, *device(c, dt), length=length), want) < 1e-6


def test_bilinear_s4d_and_a_mode_that_is_gone_after_one_step():
    rng, length = np.random.default_rng(0), 60
    a, dt = np.array([[-1.0, -20.0, -19.99, -35.0, -300.0]]), np.array([0.1, 0.02, 0.001], np.float32)
    c = rng.standard_normal((WIDTH, 5))
    z = a * dt[:, None].astype(float) / 2
    a_bar, weights = (1 + z) / (1 - z), c * dt[:, None] / (1 - z)
    want = np.einsum("dn,dnl->dl", weights, a_bar[..., None] ** np.arange(length))
    options = {"length": length, "conjugate_pairs": False, **BILINEAR}
    got, pull = jax.vjp(lambda a: ssm_kernel(a, None, *device(c, dt), **options), *device(a))
    assert error(got, want) < 2e-6
    assert np.isfinite(pull(jnp.ones_like(got))[0]).all()


def dss(modes, w, dt, length):
    """DSS-exp and DSS-softmax as in the paper, in complex128: K = Re(W S), all modes free."""
    z = modes.astype(complex) * dt[:, None].astype(float)
    powers = np.exp(z[..., None] * np.arange(length))
    plain = np.einsum("dn,dnl->dl", w * (np.exp(z) - 1) / modes, powers).real
    softmax = np.einsum("dn,dnl->dl", w / modes, powers / powers.sum(-1, keepdims=True)).real
    return plain, softmax


def test_dss():
    rng, length = np.random.default_rng(0), 90
    modes = FREQUENCIES["lin"][None, 1:9] + np.array([0, 0, 2.0, 0, 0, 0.6, 0, 0])
    w, dt = complex_normal(rng, WIDTH, 8), steps(rng, 0.03, 0.3)
    plain, softmax = dss(modes, w, dt, length)
    arguments = (*device(modes), None, *device(w, dt))
    assert error(ssm_kernel(*arguments, length=length, conjugate_pairs=False), plain) < 5e-6
    options = {"conjugate_pairs": False, "discretization": "softmax"}
    assert error(ssm_kernel(*arguments, length=length, **options), softmax) < 1e-5
    longer = ssm_kernel(*arguments, length=40 * length, **options)
    assert np.isfinite(longer).all()


def test_half_the_conjugate_pairs_are_enough():
    rng = np.random.default_rng(0)
    a, c, dt = FREQUENCIES["lin"][None, :6], complex_normal(rng, WIDTH, 6), steps(rng)
    half = ssm_kernel(*device(a), None, *device(c, dt), length=50)
    both = device(np.concatenate([a, a.conj()], 1)), device(np.concatenate([c, c.conj()], 1), dt)
    full = ssm_kernel(*both[0], None, *both[1], length=50, conjugate_pairs=False)
    assert error(half, np.asarray(full)) < 1e-6


def test_convolution_equals_recurrence():
    rng, length = np.random.default_rng(0), 200
    a, c, dt = device(FREQUENCIES["lin"][None, :4], complex_normal(rng, WIDTH, 4), steps(rng))
    u = jnp.asarray(rng.standard_normal((2, length, WIDTH)), jnp.float32)
    y, _ = long_conv(u, ssm_kernel(a, None, c, dt, length=length))
    a_bar, b_scale = zoh(a, dt[:, None])
    for n in range(4):
        inputs = u * b_scale[None, None, :, n]
        h, _ = linear_recurrence(a_bar[None, None, :, n], inputs)
        y = y - 2 * (c[None, None, :, n] * h).real
    assert np.abs(y).max() < 2e-5


@pytest.mark.sample(2)
@pytest.mark.parametrize("low_rank", [False, True])
def test_shorter_kernel_is_a_prefix_and_outputs_may_have_any_axes(low_rank):
    rng = np.random.default_rng(0)
    a, b, c, dt, p = device(
        FREQUENCIES["legs"][None, :4],
        complex_normal(rng, 1, 4),
        complex_normal(rng, 2, 5, WIDTH, 4),
        steps(rng),
        complex_normal(rng, 1, 4, 1),
    )
    options = {"p": p, **BILINEAR} if low_rank else {}
    whole = ssm_kernel(a, b, c, dt, length=300, **options)
    assert whole.shape == (2, 5, WIDTH, 300)
    assert whole.dtype == jnp.float32
    for length in (1, 7, 64, 299):
        assert (
            error(ssm_kernel(a, b, c, dt, length=length, **options), np.asarray(whole[..., :length])) < 1e-6
        )
    one = ssm_kernel(a, b, c[1, 3], dt, length=300, **options)
    assert error(one, np.asarray(whole[1, 3])) < 1e-6
    assert ssm_kernel(a, b, c, dt, length=0, **options).shape == (2, 5, WIDTH, 0)


def largest_array(jaxpr):
    """The size of the largest array that a program computes, inner programs included."""
    size = max((v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars), default=0)
    for eqn in jaxpr.eqns:
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            size = max(size, largest_array(inner)) if hasattr(inner, "eqns") else size
    return size


VARIANTS = {
    "diagonal": {},
    "softmax": {"discretization": "softmax"},
    "low_rank": BILINEAR,
    "truncated": BILINEAR | {"truncated": True},
}


def parameters(states, low_rank):
    rng = np.random.default_rng(0)
    a, c, dt = FREQUENCIES["lin"][None, :states], complex_normal(rng, WIDTH, states), steps(rng)
    arrays = dict(zip(("a", "c", "dt"), device(a, c, dt), strict=True))
    return arrays | ({"p": device(complex_normal(rng, 1, states, 1))[0]} if low_rank else {})


@pytest.mark.parametrize("variant", VARIANTS)
def test_states_times_steps_are_never_held(variant):
    length, states, options = 1 << 16, 32, VARIANTS[variant]
    arrays = parameters(states, options.get("discretization") == "bilinear")

    def loss(arrays):
        return jnp.sum(ssm_kernel(b=None, length=length, **arrays, **options) ** 2)

    assert largest_array(jax.make_jaxpr(jax.grad(loss))(arrays).jaxpr) <= 4 * WIDTH * length


@pytest.mark.parametrize("variant", VARIANTS)
def test_backward_pass_keeps_only_the_parameters(variant):
    arrays = parameters(16, VARIANTS[variant].get("discretization") == "bilinear")

    def run(arrays):
        return ssm_kernel(b=None, length=4096, **arrays, **VARIANTS[variant])

    _, pull = jax.vjp(run, arrays)
    kept = sum(v.nbytes for v in jax.tree.leaves(pull) if hasattr(v, "nbytes"))
    assert kept <= 2 * sum(v.nbytes for v in arrays.values()) + 8 * 4096


def test_what_cannot_be_done_is_refused():
    arrays = parameters(4, True)
    a, c, dt, p = arrays["a"], arrays["c"], arrays["dt"], arrays["p"]
    with pytest.raises(ValueError, match="p is given with discretization='zoh'"):
        package.ssm_kernel(a, None, c, dt, length=8, p=p)
    with pytest.raises(ValueError, match="conjugate_pairs=False"):
        package.ssm_kernel(a, None, c, dt, length=8, p=p, conjugate_pairs=False, **BILINEAR)
    with pytest.raises(ValueError, match="discretization is 'euler'.*'zoh'"):
        package.ssm_kernel(a, None, c, dt, length=8, discretization="euler")
    with pytest.raises(ValueError, match="truncated is set without p"):
        package.ssm_kernel(a, None, c, dt, length=8, truncated=True)
    with pytest.raises(ValueError, match="length is -1"):
        package.ssm_kernel(a, None, c, dt, length=-1)
    with pytest.raises(ValueError, match="c has shape.*d=3, n=4"):
        package.ssm_kernel(a, None, c[:, :3], dt, length=8)
    with pytest.raises(ValueError, match="b has shape"):
        package.ssm_kernel(a, c[0], c, dt, length=8)
    with pytest.raises(TypeError, match="dt has dtype complex64"):
        package.ssm_kernel(a, None, c, dt + 0j, length=8)
    with pytest.raises(ValueError, match="p has shape"):
        truncate_output(a, c, dt, p[0], length=8)
