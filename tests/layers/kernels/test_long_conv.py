"""`long_conv` beyond the shared suite: NumPy's convolution, both ways of going around a circle, what is kept, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.kernels import long_conv as package
from layers.kernels.long_conv import compose, long_conv, summarize, toeplitz
from layers.kernels.long_conv.xla import good_size

implementations = pytest.mark.parametrize("impl", ["xla", "toeplitz", "reference"])


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def by_channel(x, kernel, convolve):
    """Convolves every row and channel with a function of two vectors, in float64."""
    rows = [[convolve(row[:, c], kernel[c]) for c in range(x.shape[2])] for row in x.astype(np.float64)]
    return np.moveaxis(np.array(rows), 1, 2)


def assert_close(got, want, tolerance=2e-5):
    assert np.linalg.norm(np.asarray(got) - want) <= tolerance * np.linalg.norm(want)


@pytest.mark.sample(3)
@implementations
@pytest.mark.parametrize("time, taps", [(7, 7), (64, 3), (20, 200)])
def test_causal_is_numpys_convolution(impl, time, taps):
    x, kernel = normal(2, time, 3), normal(3, taps)
    y, state = long_conv(jnp.asarray(x), jnp.asarray(kernel), impl=impl)
    assert_close(y, by_channel(x, kernel, lambda u, k: np.convolve(u, k)[:time]))
    want = np.pad(x, ((0, 0), (taps, 0), (0, 0)))[:, time + 1 :]
    np.testing.assert_array_equal(state, want)


@pytest.mark.slow
@implementations
@pytest.mark.parametrize("time", [1, 24, 29, 37])
@pytest.mark.parametrize("taps", [1, 5, 80])
def test_circular_at_good_and_other_sizes(impl, time, taps):
    x, kernel = normal(2, time, 3), normal(3, taps)
    y, state = long_conv(jnp.asarray(x), jnp.asarray(kernel), circular=True, impl=impl)
    assert state is None

    def around(u, k):
        return [sum(k[j] * u[(t - j) % time] for j in range(taps)) for t in range(time)]

    assert_close(y, by_channel(x, kernel, around))


def test_two_sided_kernel_as_a_circular_convolution():
    """Taps ahead[j] at lag -(j+1): x with zeros appended, and those taps backwards at the end of the kernel."""
    time = 11
    x, behind, ahead = normal(1, time, 2), normal(2, time), normal(2, time, seed=1)
    kernel = np.concatenate([behind, ahead[:, ::-1]], axis=1)
    padded = np.pad(x, ((0, 0), (0, time), (0, 0)))
    y, _ = long_conv(jnp.asarray(padded), jnp.asarray(kernel), circular=True)
    past = by_channel(x, behind, lambda u, k: np.convolve(u, k)[:time])
    future = by_channel(x[:, ::-1], ahead, lambda u, k: np.append(0, np.convolve(u, k)[: time - 1]))[:, ::-1]
    assert_close(y[:, :time], past + future)


@pytest.mark.sample(3)
@pytest.mark.parametrize("time, taps, circular", [(50, 41, False), (50, 41, True), (3, 90, False)])
def test_matrix_products_over_several_groups_of_columns(monkeypatch, time, taps, circular):
    arguments = [jnp.asarray(v) for v in (normal(2, time, 3), normal(3, taps))]
    state = None if circular else jnp.asarray(normal(2, taps - 1, 3))

    def loss(x, kernel, state, impl):
        y, _ = long_conv(x, kernel, initial_state=state, circular=circular, impl=impl)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size).reshape(y.shape)))

    differentiated = (0, 1) if circular else (0, 1, 2)
    want = jax.value_and_grad(loss, differentiated)(*arguments, state, "xla")
    monkeypatch.setattr(toeplitz, "BLOCK", 4)
    monkeypatch.setattr(toeplitz, "MATRIX_ELEMENTS", 48)
    assert toeplitz._Plan.of(time, taps).groups > 2
    got = jax.value_and_grad(loss, differentiated)(*arguments, state, "toeplitz")
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(g, np.asarray(w))


def test_partial_and_frequency_sparse_kernels():
    """Their equations in NumPy, with gradients that are the transpose, and the state of the taps that are left."""
    x, kernel, state = normal(2, 9, 3), normal(3, 7), normal(2, 4, 3)
    kept = np.exp(2j * np.pi * np.outer(np.arange(7), np.arange(-2, 3)) / 14)
    mask = (kept @ kept.conj().T).real / 14
    taps = (kernel.astype(np.float64) @ mask.T)[:, :5]
    inputs = np.concatenate([state, x], axis=1)
    want = by_channel(inputs, taps, lambda u, k: np.convolve(u, k)[4:13])

    def run(kernel):
        return long_conv(jnp.asarray(x), kernel, initial_state=jnp.asarray(state), partial=5, frequencies=3)

    (y, final), pull = jax.vjp(run, jnp.asarray(kernel))
    assert_close(y, want)
    np.testing.assert_array_equal(final, x[:, -4:])
    dy = normal(2, 9, 3, seed=1)
    (dkernel,) = pull((jnp.asarray(dy), jnp.zeros_like(final)))
    lags = [[np.vdot(dy[..., c], inputs[:, 4 - j : 13 - j, c]) for j in range(5)] for c in range(3)]
    assert_close(dkernel, np.array(lags) @ mask[:5])
    whole = jax.lax.complex(jnp.asarray(kernel), jnp.asarray(kernel))
    assert_close(package.sparse_kernel(whole, frequencies=3), (1 + 1j) * kernel.astype(np.float64) @ mask.T)
    np.testing.assert_array_equal(package.sparse_kernel(jnp.asarray(kernel), frequencies=8), kernel)


def test_transforms_keep_the_kernel_in_float32():
    """1 + 2^-10 is 1 in bfloat16, so a kernel rounded to it would give 0 here."""
    x = jnp.zeros((1, 4, 1), jnp.bfloat16).at[0, :2, 0].set(jnp.array([1, -1], jnp.bfloat16))
    y, _ = long_conv(x, jnp.array([[1, 1 + 2.0**-10, 1]]), impl="xla")
    np.testing.assert_allclose(np.asarray(y, np.float32)[0, :3, 0], [1, 2.0**-10, -(2.0**-10)], rtol=1e-2)


@pytest.mark.parametrize("impl", ["xla", "toeplitz"])
def test_backward_pass_keeps_only_the_arguments(impl):
    x, gate = (jnp.asarray(normal(2, 64, 3, seed=seed), jnp.bfloat16) for seed in (0, 1))
    kernel = jnp.asarray(normal(3, 64))

    def run(x, kernel, gate):
        return long_conv(x, kernel, input_gate=gate, output_gate=x, impl=impl)[0]

    _, pull = jax.vjp(run, x, kernel, gate)
    kept = {id(v): v.nbytes for v in jax.tree.leaves(pull) if hasattr(v, "nbytes")}
    assert sum(kept.values()) <= 3 * x.nbytes + kernel.nbytes + 64


@pytest.mark.sample(4)
@pytest.mark.parametrize("impl", ["xla", "toeplitz"])
@pytest.mark.parametrize("circular", [False, True])
def test_second_derivatives(impl, circular):
    arguments = [jnp.asarray(v) for v in (normal(1, 6, 2), normal(2, 4), normal(1, 6, 2, seed=1))]

    def slope(arguments, impl):
        def loss(x, kernel, gate):
            gates = {"input_gate": gate, "output_gate": gate, "skip": kernel[:, 0]}
            return jnp.sum(long_conv(x, kernel, **gates, circular=circular, impl=impl)[0] ** 3)

        gradients = jax.grad(loss, (0, 1, 2))(*arguments)
        return sum(jnp.sum(jnp.cos(v) * g) for v, g in zip(arguments, gradients, strict=True))

    got, want = (jax.jit(jax.grad(slope), static_argnums=1)(arguments, name) for name in (impl, "reference"))
    for g, w in zip(got, want, strict=True):
        assert_close(g, np.asarray(w))


@pytest.mark.parametrize("lengths", [(3, 4), (9, 2), (2, 9), (20, 30)])
def test_composed_pieces_leave_the_state_of_the_whole(lengths):
    taps = 8
    x, gate = (jnp.asarray(normal(2, sum(lengths), 3, seed=seed)) for seed in (0, 1))
    kernel, state = jnp.asarray(normal(3, taps)), jnp.asarray(normal(2, taps - 1, 3))
    _, want = long_conv(x, kernel, input_gate=gate, initial_state=state)
    start = package.Piece(state, jnp.int32(taps - 1))
    first, second = slice(None, lengths[0]), slice(lengths[0], None)
    one, two = (summarize(x[:, s], kernel, input_gate=gate[:, s]) for s in (first, second))
    for order in (compose(compose(start, one), two), compose(start, compose(one, two))):
        np.testing.assert_array_equal(order.inputs, want)
    whole = summarize(x, kernel, input_gate=gate)
    np.testing.assert_array_equal(compose(one, two).inputs, whole.inputs)
    assert int(compose(one, two).steps) == int(whole.steps)


def test_choice_of_implementation(monkeypatch):
    monkeypatch.setitem(package.TOEPLITZ_TAPS, jax.default_backend(), 16)

    def transforms(time, taps, state=False, **options):
        arrays = {"x": jnp.ones((1, time, 2)), "kernel": jnp.ones((2, taps))}
        if state:
            arrays["initial_state"] = jnp.ones((1, taps - 1, 2))
        return " fft" in str(jax.make_jaxpr(lambda arrays: long_conv(**arrays, **options))(arrays))

    assert transforms(50, 17)
    assert not transforms(50, 16)
    assert not transforms(16, 50)
    assert transforms(16, 50, circular=True)
    assert transforms(16, 50, state=True)
    assert not transforms(1, 50, state=True)
    assert transforms(50, 16, impl="xla")


@pytest.mark.parametrize(
    "n, want", [(1, 1), (2, 2), (13, 14), (37, 40), (4095, 4096), (4097, 4608), (8191, 8192)]
)
def test_good_sizes(n, want):
    assert good_size(n) == want


def test_what_cannot_be_done_is_refused():
    x, kernel = jnp.ones((2, 5, 3)), jnp.ones((3, 4))
    with pytest.raises(ValueError, match="initial_state.*circular"):
        long_conv(x, kernel, initial_state=jnp.ones((2, 3, 3)), circular=True)
    with pytest.raises(ValueError, match="initial_state has shape.*s=3"):
        long_conv(x, kernel, initial_state=jnp.ones((2, 4, 3)))
    with pytest.raises(ValueError, match="kernel has shape.*at least one tap"):
        long_conv(x, kernel[:, :0])
    with pytest.raises(TypeError, match="kernel has dtype int32"):
        long_conv(x, kernel.astype(int))
    with pytest.raises(TypeError, match="segment_ids"):
        long_conv(x, kernel, segment_ids=jnp.ones((2, 5), int))
