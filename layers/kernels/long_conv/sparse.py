"""Kernels of long convolutions that are sparse in time or in frequency, as in FlashFFTConv (Fu et al. 2023, arXiv:2311.05908)."""

import jax.numpy as jnp

from layers.kernels.checks import accumulation_dtype
from layers.typing import Array, Num


def check_sparse(taps: int, partial: int | None, frequencies: int | None) -> None:
    """Raises a ValueError if `sparse_kernel` cannot take these options for kernels of `taps` taps."""
    for name, value, most in (("partial", partial, taps), ("frequencies", frequencies, taps + 1)):
        if value is not None and not 1 <= value <= most:
            raise ValueError(f"{name}={value}; expected 1 to {most} for a kernel of {taps} taps, or None")


def sparse_kernel(
    kernel: Num[Array, "d l"], *, partial: int | None = None, frequencies: int | None = None
) -> Num[Array, "d k"]:
    """Returns the first `partial` taps of kernels of which only the lowest frequencies are kept.

        K_f = sum_{j=0}^{l-1} k_j exp(-2 pi i f j / 2l),    k'_j = 1/2l sum_{|f| < frequencies} K_f exp(2 pi i f j / 2l)

    for j < `partial`. The same spectrum also has taps at j < 0, that is after the current token. They are left out, so that
    convolutions stay causal: in this the taps differ from those that FlashFFTConv's masks of spectra have.

    Args:
      kernel: taps.
      partial: number of taps that are kept, 1 to l; all if None.
      frequencies: number of frequencies of each sign that are kept, 1 to l + 1 with 0 among them; all if None.

    Raises:
      ValueError: a number is not in its range.
    """
    taps = kernel.shape[1]
    check_sparse(taps, partial, frequencies)
    if frequencies is not None and frequencies <= taps:
        wide, size = kernel.astype(accumulation_dtype(kernel)), 2 * taps
        if jnp.iscomplexobj(kernel):
            kept = jnp.abs(jnp.fft.fftfreq(size, 1 / size)) < frequencies
            wide = jnp.fft.ifft(jnp.where(kept[None], jnp.fft.fft(wide, size), 0))
        else:
            wide = jnp.fft.irfft(jnp.fft.rfft(wide, size)[:, :frequencies], size)
        kernel = wide[:, :taps].astype(kernel.dtype)
    return kernel[:, :partial]
