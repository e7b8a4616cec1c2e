"""S4, S4D and DSS against the S4 that ESPnet carries, which is its authors', and S4D against discretax.

Outputs for whole sequences and one step after the other: S4 with C and with C~ as the parameter, S4D with its three
spectra and both discretisations, DSS with either kernel and with growing modes. Gradients of the kernels of S4 and S4D by all
parameters. Initial systems, but for the phases of eigenvectors. To 2e-5; S4, and gradients, to 1e-4.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from discretax.sequence_mixers.s4d import S4DSequenceMixer
from espnet2.asr.state_spaces import s4 as espnet
from flax import nnx

from layers import hippo
from layers.mixers.state_space.dss import DSS, DSSConfig
from layers.mixers.state_space.s4 import S4, S4Config
from layers.mixers.state_space.s4d import S4D, S4DConfig, initial_modes

WIDTH, STATE, TIME = 6, 8, 40
STEPS = {"dt_min": 0.01, "dt_max": 0.2}


def as_torch(v):
    return torch.tensor(np.asarray(v))


def pair(v):
    """Real and imaginary part of a stored complex parameter, as one complex tensor."""
    return as_torch(v[0] + 1j * v[1])


def output(v):
    """An output vector as their constructors take it: they store its conjugate."""
    return pair(v).conj().resolve_conj()


def close(got, want, tolerance=2e-5):
    got, want = np.asarray(got), np.asarray(want.detach() if isinstance(want, torch.Tensor) else want)
    assert got.shape == want.shape
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error <= tolerance, f"relative error {error:.1e}"


def inputs():
    return np.random.default_rng(0).standard_normal((2, TIME, WIDTH)).astype(np.float32)


def convolution(kernel, skip, x):
    """Causal, by Fourier transforms of twice the length, as the authors' layer runs it; x is b t d."""
    x = as_torch(x).transpose(1, 2)
    y = torch.fft.irfft(torch.fft.rfft(kernel, n=2 * TIME) * torch.fft.rfft(x, n=2 * TIME), n=2 * TIME)
    return (y[..., :TIME] + as_torch(skip)[:, None] * x).transpose(1, 2)


def check_layer(mixer, kernel, tolerance=2e-5):
    """Whole sequences, and one step after the other, against the convolution with their kernel."""
    want = convolution(kernel, mixer.d[...], inputs())
    x = jnp.asarray(inputs())
    close(mixer(x)[0], want, tolerance)
    step, state, outputs = nnx.jit(lambda mixer, x, state: mixer(x, state)), mixer.init_state(2), []
    for t in range(TIME):
        y, state = step(mixer, x[:, t : t + 1], state)
        outputs.append(y)
    close(jnp.concatenate(outputs, 1), want, tolerance)


def check_gradients(mixer, pick, kernel, parameters, tolerance=2e-5):
    """Gradients of a random linear function of the kernel.

    Args:
      pick: our kernel of a mixer, (d, l).
      kernel: theirs.
      parameters: paths of our parameters, and theirs (with complex numbers as two real ones on the last axis).
    """
    weights = np.random.default_rng(1).standard_normal(kernel.shape).astype(np.float32)
    graph, params, rest = nnx.split(mixer, nnx.Param, ...)
    ours = jax.grad(lambda p: jnp.sum(pick(nnx.merge(graph, p, rest, copy=True)) * weights))(params)
    ours = {".".join(map(str, path)): value[...] for path, value in nnx.to_flat_state(ours)}
    (kernel * as_torch(weights)).sum().backward()
    for name, parameter in parameters.items():
        got, want = ours[name], parameter.grad
        if want.shape[-1] == got.shape[0] == 2:
            want = want.movedim(-1, 0)
        close(got, want.reshape(got.shape), tolerance)


@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
@pytest.mark.parametrize("init", ["legs", "inv", "lin"])
def test_s4d(init, discretization):
    config = S4DConfig(WIDTH, STATE, init, systems=2, discretization=discretization, **STEPS)
    ours = S4D(config, rngs=nnx.Rngs(0))
    ours.modes.log_rate[...] += 0.3 * jax.random.normal(jax.random.key(1), ours.modes.log_rate.shape)
    a = as_torch(-np.exp(ours.modes.log_rate) + 1j * np.asarray(ours.modes.frequency))
    theirs = espnet.SSKernelDiag(
        a, pair(ours.modes.b), output(ours.c), as_torch(ours.log_dt), disc=discretization
    )
    kernel = theirs(TIME)[0][0]
    check_layer(ours, kernel)

    def pick(mixer):
        unit = jnp.zeros((1, TIME, WIDTH)).at[:, 0].set(1.0)
        return (mixer(unit)[0] - mixer.d[...][None, None] * unit)[0].T

    parameters = {
        "c": theirs.C,
        "log_dt": theirs.log_dt,
        "modes.b": theirs.B,
        "modes.log_rate": theirs.inv_A_real,
        "modes.frequency": theirs.A_imag,
    }
    check_gradients(ours, pick, kernel, parameters, 1e-4)


@pytest.mark.parametrize("init", ["inv", "lin"])
def test_initial_spectra_of_s4d(init):
    theirs, _, inputs, _ = espnet.dplr(init, STATE)
    ours = initial_modes(init, STATE)
    close(ours[0], theirs[0], 1e-6)
    close(ours[1], inputs[0], 1e-6)


def test_s4d_of_discretax():
    theirs = S4DSequenceMixer(WIDTH, jax.random.key(0), state_dim=STATE, **STEPS)
    ours = S4D(S4DConfig(WIDTH, STATE, "lin", systems=WIDTH, **STEPS), rngs=nnx.Rngs(0))
    close(ours.modes.frequency, theirs.kernel.A_imag, 1e-6)
    close(ours.modes.log_rate, theirs.kernel.log_a_real, 1e-6)
    ours.c[...] = jnp.stack([theirs.kernel.C.real, theirs.kernel.C.imag])[:, None]
    ours.log_dt[...] = theirs.kernel.log_dt
    ours.d[...] = jnp.zeros(WIDTH)
    x = jnp.asarray(inputs())
    close(ours(x)[0], jax.vmap(lambda row: theirs(row, jax.random.key(0)))(x))


@pytest.fixture
def _conjugates(monkeypatch):
    """Their Cauchy sums without compiled extensions leave out the conjugates, which those with extensions add."""
    half = espnet.cauchy_naive
    monkeypatch.setattr(espnet, "cauchy_naive", lambda v, z, w: half(espnet._conj(v), z, espnet._conj(w)))


def their_s4(ours):
    a = as_torch(-np.exp(ours.modes.log_rate) + 1j * np.asarray(ours.modes.frequency))
    p, b, c = pair(ours.p)[None], pair(ours.modes.b), output(ours.c)
    return espnet.SSKernelNPLR(a, p, b, c, as_torch(ours.log_dt), L=TIME)


def test_s4_against_their_recurrence():
    ours = S4(S4Config(WIDTH, STATE, systems=2, **STEPS), rngs=nnx.Rngs(0))
    theirs = their_s4(ours)
    theirs._setup_step()
    state, kernel = theirs.dB, []
    for _ in range(TIME):
        kernel.append((theirs.dC * state).sum(-1)[0].real)
        state = torch.einsum("dij,dj->di", theirs.dA, state)
    check_layer(ours, torch.stack(kernel, -1), 1e-4)


@pytest.mark.usefixtures("_conjugates")
def test_s4_against_their_cauchy_sums():
    """With C~ in the place of C, which they compute from C in the first call."""
    free = S4(S4Config(WIDTH, STATE, systems=2, **STEPS), rngs=nnx.Rngs(0))
    theirs = their_s4(free)
    kernel = theirs(L=TIME)[0][0]
    ours = S4(S4Config(WIDTH, STATE, systems=2, max_length=TIME, **STEPS), rngs=nnx.Rngs(0))
    close(ours.c[0] + 1j * ours.c[1], torch.view_as_complex(theirs.C), 1e-4)
    check_layer(ours, kernel, 1e-4)
    parameters = {
        "c": theirs.C,
        "p": theirs.P,
        "log_dt": theirs.log_dt,
        "modes.b": theirs.B,
        "modes.log_rate": theirs.inv_w_real,
        "modes.frequency": theirs.w_imag,
    }
    check_gradients(ours, lambda mixer: mixer.kernel(TIME)[0], kernel, parameters, 1e-4)


def test_initial_system_of_s4():
    """They keep the eigenvalues with negative imaginary parts, and eigenvectors have any phase."""
    w, p, b, _ = (v.numpy() for v in espnet.nplr("legs", STATE, dtype=torch.double))
    ours = hippo.dplr_legs(STATE, half=True)
    order, theirs_order = np.argsort(ours.eigenvalues.imag), np.argsort(-w.imag)
    close(ours.eigenvalues[order], w[theirs_order].conj(), 1e-6)
    close(np.abs(ours.p[order, 0]), np.abs(p[0, theirs_order]), 1e-6)
    close((ours.b * ours.p[:, 0].conj())[order], (b * p[0].conj())[theirs_order].conj(), 1e-6)


@pytest.mark.parametrize("growing", [False, True])
def test_dss_with_softmax(growing):
    ours = DSS(DSSConfig(WIDTH, STATE, max_length=TIME, **STEPS), rngs=nnx.Rngs(0))
    if growing:
        ours.rate[...] = ours.rate[...].at[1::2].multiply(-1)
    a = as_torch(np.asarray(ours.rate) + 1j * np.asarray(ours.frequency))[None]
    theirs = espnet.SSKernelDiag(
        a, torch.ones_like(a), output(ours.w)[None], as_torch(ours.log_dt[:, 0]), disc="dss", real_type="none"
    )
    with torch.no_grad():
        theirs.inv_A_real.copy_(-a.real)  # they start without growing modes
    check_layer(ours, theirs(TIME)[0][0])


def test_dss_with_exponentials():
    """Their zero-order hold doubles real parts, for conjugates that DSS does not have."""
    ours = DSS(DSSConfig(WIDTH, STATE, kernel="exp", **STEPS), rngs=nnx.Rngs(0))
    a = as_torch(-np.exp(ours.rate) + 1j * np.asarray(ours.frequency))[None]
    theirs = espnet.SSKernelDiag(
        a, torch.ones_like(a), output(ours.w)[None], as_torch(ours.log_dt[:, 0]), disc="zoh"
    )
    check_layer(ours, theirs(TIME)[0][0] / 2)
