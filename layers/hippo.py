"""HiPPO: systems x' = A x + B u whose state holds the coefficients of the input's history in an orthogonal basis.

    LegS    Legendre polynomials over the whole history, rescaled as it grows
    LegT    Legendre polynomials over a sliding window
    FouT    Fourier modes over a sliding window

Each is a normal matrix minus a low-rank one, A = S - P P^T with S = -c I + skew (NPLR), so a unitary change of basis
makes it diagonal minus low-rank (DPLR): A = V (diag(eigenvalues) - P~ P~^*) V^*, with P~ = V^* P and B~ = V^* B. A itself
is far from normal (the condition number of its eigenvectors exceeds 1e10 near n = 16), so only S is diagonalised, as the
Hermitian matrix -i (S + c I). All arrays are NumPy, float64 or complex128, because they initialise parameters.

Papers: HiPPO (Gu et al. 2020, arXiv:2008.07669), S4 (Gu et al. 2022, arXiv:2111.00396), How to Train Your HiPPO (Gu et
al. 2022, arXiv:2206.12037).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class NPLR(NamedTuple):
    """A system in normal-plus-low-rank form: a = normal - p p^T.

    Attributes:
      a: (n, n).
      p: (n, r), with r the rank of the correction.
      b: (n,), the input vector.
    """

    a: np.ndarray
    p: np.ndarray
    b: np.ndarray


class DPLR(NamedTuple):
    """A system in diagonal-plus-low-rank form: v (diag(eigenvalues) - p p^*) v^*, input v b.

    Attributes:
      eigenvalues: (m,) complex, of the normal part, in order of ascending imaginary part.
      p: (m, r) complex.
      b: (m,) complex.
      v: (n, m) complex, orthonormal columns.
    """

    eigenvalues: np.ndarray
    p: np.ndarray
    b: np.ndarray
    v: np.ndarray


def _kept(make: Callable[..., DPLR]) -> Callable[..., DPLR]:
    """Returns `make` with its latest results kept, as arrays that cannot be written: all layers of a model have the same."""

    @functools.lru_cache(maxsize=8)
    @functools.wraps(make)
    def kept(n: int, *, half: bool = False) -> DPLR:
        system = make(n, half=half)
        for array in system:
            array.flags.writeable = False
        return system

    return kept


def hippo_legs(n: int) -> tuple[np.ndarray, np.ndarray]:
    """HiPPO-LegS without its factor 1/t: A_ij = -sqrt((2i+1)(2j+1)) below the diagonal, -(i+1) on it; B_i = sqrt(2i+1).

    Args:
      n: state size.

    Returns:
      a (n, n) and b (n,).
    """
    root = _root(n)
    return -np.tril(np.outer(root, root), -1) - np.diag(np.arange(1.0, n + 1)), root


def hippo_legt(n: int) -> tuple[np.ndarray, np.ndarray]:
    """HiPPO-LegT over a window of length 2, the scaling that S4 uses.

    A_ij = -(1/2) sqrt((2i+1)(2j+1)) s_ij with s_ij = 1 for j <= i and (-1)^(i-j) above; B_i = sqrt(2i+1) / 2.

    Args:
      n: state size.

    Returns:
      a (n, n) and b (n,).
    """
    root = _root(n)
    i, j = np.indices((n, n))
    sign = np.where(j <= i, 1.0, np.where((i - j) % 2, -1.0, 1.0))
    return -np.outer(root, root) * sign / 2, root / 2


def hippo_fout(n: int) -> tuple[np.ndarray, np.ndarray]:
    """HiPPO-FouT over a window of length 2: cosine and sine per frequency f = 0 .. n/2 - 1, rotating at pi f.

    Args:
      n: state size, even.

    Returns:
      a (n, n) and b (n,).

    Raises:
      ValueError: n is odd.
    """
    if n % 2:
        raise ValueError(f"n is {n}; FouT pairs a cosine with a sine and needs an even n")
    # Indices 2f and 2f + 1 are the cosine and sine of frequency f.
    rotation = np.zeros((n, n))
    even = np.arange(0, n, 2)
    rotation[even + 1, even], rotation[even, even + 1] = np.pi * even / 2, -np.pi * even / 2
    b = np.where(np.arange(n) % 2, 0.0, np.where(np.arange(n) == 0, 1.0, np.sqrt(2.0)))
    return rotation - np.outer(b, b), b


def nplr_legs(n: int) -> NPLR:
    """HiPPO-LegS as normal plus rank 1: p_i = sqrt(i + 1/2), normal part -I/2 + skew."""
    a, b = hippo_legs(n)
    return NPLR(a, np.sqrt(np.arange(n) + 0.5)[:, None], b)


def nplr_legt(n: int) -> NPLR:
    """HiPPO-LegT as normal plus rank 2: sqrt(i + 1/2) on odd i and on even i, skew normal part."""
    a, b = hippo_legt(n)
    p = np.sqrt(np.arange(n) + 0.5)
    odd = np.arange(n) % 2 == 1
    return NPLR(a, np.stack([np.where(odd, p, 0.0), np.where(odd, 0.0, p)], axis=1), b)


def nplr_fout(n: int) -> NPLR:
    """HiPPO-FouT as normal plus rank 1: p = b, skew normal part."""
    a, b = hippo_fout(n)
    return NPLR(a, b[:, None], b)


@_kept
def dplr_legs(n: int, *, half: bool = False) -> DPLR:
    """HiPPO-LegS with its normal part diagonalised.

    Args:
      n: state size.
      half: keeps only the n/2 modes with positive imaginary part. The others are their conjugates.

    Raises:
      ValueError: half is set and n is odd.
    """
    return _diagonalise(nplr_legs(n), half)


@_kept
def dplr_legt(n: int, *, half: bool = False) -> DPLR:
    """HiPPO-LegT with its normal part diagonalised; arguments as for `dplr_legs`."""
    return _diagonalise(nplr_legt(n), half)


@_kept
def dplr_fout(n: int, *, half: bool = False) -> DPLR:
    """HiPPO-FouT with its normal part diagonalised; arguments as for `dplr_legs`.

    The normal part has frequencies 0, 0, 1, 1, ..., n/2 - 1: eigenvalues pi i f, of which 0 occurs twice. The vectors of
    that pair are (e_0 + i e_1) / sqrt(2) and its conjugate, so that the two halves stay conjugate to each other.
    """
    system = nplr_fout(n)
    eigenvalues, v = normal_eigen(system)
    middle = n // 2
    if middle:
        eigenvalues[middle - 1 : middle + 1] = eigenvalues[middle - 1 : middle + 1].real
        v[:, middle - 1 : middle + 1] = 0
        v[0, middle - 1 : middle + 1] = np.sqrt(0.5)
        v[1, middle - 1 : middle + 1] = np.sqrt(0.5) * np.array([-1j, 1j])
    return _in_basis(system, eigenvalues, v, half)


def normal_eigen(system: NPLR) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues, in order of ascending imaginary part, and unitary eigenvectors of a + p p^T = -c I + skew."""
    normal = system.a + system.p @ system.p.T
    real = np.mean(np.diag(normal)) if len(normal) else 0.0
    # Exactly skew, so that rounding in `a` cannot leave a part that eigh silently drops.
    skew = (normal - normal.T) / 2
    imaginary, v = np.linalg.eigh(-1j * skew)
    return real + 1j * imaginary, v


def _diagonalise(system: NPLR, half: bool) -> DPLR:
    return _in_basis(system, *normal_eigen(system), half)


def _in_basis(system: NPLR, eigenvalues: np.ndarray, v: np.ndarray, half: bool) -> DPLR:
    n = len(eigenvalues)
    if half and n % 2:
        raise ValueError(f"n is {n}; half=True keeps one of each conjugate pair and needs an even n")
    kept = slice(n // 2, None) if half else slice(None)
    eigenvalues, v = eigenvalues[kept], v[:, kept]
    return DPLR(eigenvalues, v.conj().T @ system.p, v.conj().T @ system.b, v)


def _root(n: int) -> np.ndarray:
    return np.sqrt(2.0 * np.arange(n) + 1)
