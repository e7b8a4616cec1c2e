"""`long_conv` by fast Fourier transforms, in float32 or wider whatever the type of the input.

With n at least t + l - 1 the circular convolution of size n holds the causal one. A state of l - 1 past inputs in front of
the input needs no more, since what wraps around falls on outputs that are discarded. A circular convolution runs at its own
size if FFTs of that size are fast, and otherwise with the end of the input as the state.

Bytes moved per element of x, forward, in bfloat16 with n = 2t: 2 read and 8 written to cast, transpose and pad; 16 by each
of the two transforms; 16 by the product; 4 read and 2 written at the end: 64 in all, against 4 at least.
The backward pass has one more transform forward and one more product (two of each with an output gate).
"""

import itertools

import jax.numpy as jnp

from layers.kernels.long_conv.gating import Convolution, gated


def long_conv(x, kernel, skip, input_gate, output_gate, initial_state, circular):
    """Returns outputs and the final state; the public function has checked the arguments."""
    return gated(FFT, circular, x, kernel, skip, input_gate, output_gate, initial_state)


def good_size(n: int) -> int:
    """Returns the least m * 2^k >= n with m in {1, 3, 5, 7, 9, 15}: FFTs are fast at products of small primes."""
    return min(m << max(0, (-(-n // m) - 1).bit_length()) for m in (1, 3, 5, 7, 9, 15))


def _forward(u, past, kernel, circular, operand):
    del operand
    inputs, offset, size, taps = _lay_out(u, past, kernel, circular)
    x, k = _spectra(size, inputs, _by_time(kernel, taps, u.dtype))
    (y,) = _signals(size, u.dtype, x * k)
    return y[:, offset : offset + u.shape[1]]


def _transpose(u, past, kernel, circular, operand, g):
    del operand
    inputs, offset, size, taps = _lay_out(u, past, kernel, circular)
    g = jnp.pad(g, ((0, 0), (offset, 0), (0, 0)))
    # The conjugate of the spectrum of the conjugate is that of the signal with time running backwards.
    g, x, k = _spectra(size, g, inputs.conj(), _by_time(kernel, taps, u.dtype).conj())
    du, dkernel = _signals(size, u.dtype, g * k.conj(), (g * x.conj()).sum(0, keepdims=True))
    dkernel = jnp.pad(dkernel[0, :taps], ((0, kernel.shape[1] - taps), (0, 0))).T
    before, du = du[:, :offset], du[:, offset : offset + u.shape[1]]
    if circular and offset:
        du = du.at[:, -offset:].add(before)
    return du, before, dkernel


FFT = Convolution(_forward, _transpose)


def _lay_out(u, past, kernel, circular):
    """What to transform, where the outputs start in it, the size of the transforms, and how many taps count."""
    time, taps = u.shape[1], kernel.shape[1]
    if circular and good_size(time) != time:
        past = u[:, time - (taps - 1) :]
    elif circular:
        return u, 0, time, taps
    if past is None:
        taps = min(taps, time)
        return u, 0, good_size(time + taps - 1), taps
    inputs = jnp.concatenate([past.astype(u.dtype), u], axis=1)
    return inputs, taps - 1, good_size(inputs.shape[1]), taps


def _by_time(kernel, taps, dtype):
    """The taps that count, as a batch of one: (1, taps, d)."""
    return kernel[:, :taps].T[None].astype(dtype)


def _spectra(size, *signals):
    """The Fourier transforms of signals (b, t, d) along time, each (b, d, frequencies).

    All are in one call: XLA on a CPU can hang if two transforms run concurrently, each waiting for the other's threads.
    """
    padded = [jnp.pad(v, ((0, 0), (0, size - v.shape[1]), (0, 0))).swapaxes(1, 2) for v in signals]
    transform = jnp.fft.fft if jnp.iscomplexobj(signals[0]) else jnp.fft.rfft
    return _parted(transform(jnp.concatenate(padded)), padded)


def _signals(size, dtype, *spectra):
    """The inverse of `_spectra`: each (b, size, d), of signals of type `dtype`."""
    complex_signal = jnp.issubdtype(dtype, jnp.complexfloating)
    spectrum = jnp.concatenate(spectra)
    joined = jnp.fft.ifft(spectrum, size) if complex_signal else jnp.fft.irfft(spectrum, size)
    return _parted(joined.swapaxes(1, 2), spectra)


def _parted(joined, parts):
    """Undoes the concatenation of `parts`."""
    ends = list(itertools.accumulate(part.shape[0] for part in parts))
    return [joined[end - part.shape[0] : end] for end, part in zip(ends, parts, strict=True)]
