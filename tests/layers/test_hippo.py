"""HiPPO matrices: known eigenvalues, the decompositions, and what the state of each system stands for."""

import numpy as np
import pytest
from numpy.polynomial import legendre

from layers import hippo

FORMS = {
    "legs": (hippo.nplr_legs, hippo.dplr_legs),
    "legt": (hippo.nplr_legt, hippo.dplr_legt),
    "fout": (hippo.nplr_fout, hippo.dplr_fout),
}
forms = pytest.mark.parametrize("form", FORMS)


@pytest.mark.parametrize(
    "n, smallest, largest",
    [
        (4, [0.556501, 4.603293], 4.603293),
        (8, [0.427489, 1.957794, 5.354209, 19.857410], 19.857410),
        (16, [0.352018, 1.371989, 2.899668], 80.966081),
        (64, [0.263857, 0.905859, 1.702968], 1303.273843),
        (256, [], 20860.233),
    ],
)
def test_known_eigenvalues_of_the_normal_part_of_legs(n, smallest, largest):
    eigenvalues, vectors = hippo.normal_eigen(hippo.nplr_legs(n))
    np.testing.assert_allclose(eigenvalues.real, -0.5, atol=1e-12)
    np.testing.assert_allclose(eigenvalues.imag[n // 2 :][: len(smallest)], smallest, atol=5e-7)
    np.testing.assert_allclose(eigenvalues.imag[-1], largest, rtol=2e-8, atol=5e-7)
    np.testing.assert_allclose(eigenvalues.imag, -eigenvalues.imag[::-1], atol=1e-9)
    np.testing.assert_allclose(vectors.conj().T @ vectors, np.eye(n), atol=1e-12)


def test_legs_by_hand():
    a, b = hippo.hippo_legs(3)
    np.testing.assert_allclose(b, [1, 3**0.5, 5**0.5])
    np.testing.assert_allclose(a, [[-1, 0, 0], [-(3**0.5), -2, 0], [-(5**0.5), -(15**0.5), -3]])


@forms
@pytest.mark.parametrize("n", [2, 8, 64])
def test_decompositions_restore_the_system(form, n):
    nplr, dplr = FORMS[form]
    system, full, half = nplr(n), dplr(n), dplr(n, half=True)
    tolerance = 1e-13 * n**2
    normal = system.a + system.p @ system.p.T
    np.testing.assert_allclose(normal @ normal.T, normal.T @ normal, atol=tolerance * n)
    a = full.v @ (np.diag(full.eigenvalues) - full.p @ full.p.conj().T) @ full.v.conj().T
    np.testing.assert_allclose(a, system.a, atol=tolerance)
    np.testing.assert_allclose(full.v @ full.b, system.b, atol=tolerance)
    assert (np.diff(full.eigenvalues.imag) >= 0).all()
    assert (half.eigenvalues.imag >= 0).all()
    assert len(half.eigenvalues) == n // 2
    restored = 2 * ((half.v * half.eigenvalues) @ half.v.conj().T).real
    np.testing.assert_allclose(restored, normal, atol=tolerance)
    np.testing.assert_allclose(2 * (half.v @ half.b).real, system.b, atol=tolerance)
    np.testing.assert_allclose(2 * (half.v @ half.p).real, system.p, atol=tolerance)


def test_legs_state_holds_legendre_coefficients_of_the_whole_history():
    """With u = t^m, t x' = A x + B u keeps x = t^m c, and c must expand s^m on [0, 1] in sqrt(2i+1) P_i(2s - 1)."""
    n, s = 8, np.linspace(0, 1, 11)
    a, b = hippo.hippo_legs(n)
    for m in range(n):
        c = np.linalg.solve(m * np.eye(n) - a, b)
        np.testing.assert_allclose(
            legendre.legval(2 * s - 1, c * np.sqrt(2 * np.arange(n) + 1)), s**m, atol=1e-9
        )


def test_legt_state_holds_legendre_coefficients_of_a_window_of_two():
    """The response to exp(i w t) is the mean over s in [-2, 0] of exp(i w s) sqrt(2i+1) P_i(1 + s)."""
    n, w = 24, 4.0
    a, b = hippo.hippo_legt(n)
    response = np.linalg.solve(1j * w * np.eye(n) - a, b)
    nodes, weights = legendre.leggauss(64)
    basis = legendre.legvander(nodes, n - 1) * np.sqrt(2 * np.arange(n) + 1)
    want = (weights * np.exp(1j * w * (nodes - 1))) @ basis / 2
    np.testing.assert_allclose(response[: n // 2], want[: n // 2], atol=1e-9)


def test_fout_state_holds_fourier_coefficients_of_a_window_of_two():
    """An input of period 2, cos(pi f t), is held by the cosine and sine of its own frequency alone."""
    n = 8
    a, b = hippo.hippo_fout(n)
    for f in range(1, n // 2):
        response = np.linalg.solve(1j * np.pi * f * np.eye(n) - a, b)
        want = np.zeros(n, complex)
        want[2 * f], want[2 * f + 1] = np.sqrt(0.5), -1j * np.sqrt(0.5)
        np.testing.assert_allclose(response, want, atol=1e-12)


def test_odd_sizes_are_refused_where_modes_come_in_pairs():
    with pytest.raises(ValueError, match="n is 5"):
        hippo.hippo_fout(5)
    with pytest.raises(ValueError, match="n is 5.*half"):
        hippo.dplr_legs(5, half=True)
    assert hippo.dplr_legs(5).eigenvalues.shape == (5,)


@pytest.mark.parametrize("make", [hippo.dplr_legs, hippo.dplr_legt, hippo.dplr_fout])
def test_systems_are_made_once_and_cannot_be_written(make):
    system = make(6, half=True)
    assert make(6, half=True) is system
    assert len(make(6).eigenvalues) == 6
    with pytest.raises(ValueError, match="read-only"):
        system.v[0] = 1.0
