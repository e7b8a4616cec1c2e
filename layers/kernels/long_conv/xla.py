"""`long_conv` by fast Fourier transforms, in float32 or wider whatever the type of the input.

With n at least t + l - 1 the circular convolution of size n holds the causal one; a state of l - 1 past inputs in front of
the input needs no more, since what wraps around lands on outputs that are thrown away. A circular convolution is done at its
own size where that is a good one, and else with the end of the input as the state.

Bytes moved per element of x, forward, in bf16 with n = 2t: 2 read and 8 written to cast, transpose and pad; 16 by each of
the two transforms; 16 by the product; 4 read and 2 written at the end: 64 in all, against 4 at least. The backward
pass has one more transform forward and one more product (two of each with an output gate).
"""

import jax.numpy as jnp

from layers.kernels.long_conv.gating import Convolution, gated


def long_conv(x, kernel, skip, input_gate, output_gate, initial_state, circular):
    """The arguments are checked by the public function."""
    return gated(FFT, circular, x, kernel, skip, input_gate, output_gate, initial_state)


def good_size(n: int) -> int:
    """The least m * 2^k >= n with m in {1, 3, 5, 7, 9, 15}: FFT libraries are fast at products of small primes."""
    return min(m << max(0, (-(-n // m) - 1).bit_length()) for m in (1, 3, 5, 7, 9, 15))


def _forward(u, past, kernel, circular, operand):
    del operand
    inputs, offset, size, taps = _lay_out(u, past, kernel, circular)
    product = _spectrum(inputs, size) * _spectrum(_by_time(kernel, taps, u.dtype), size)
    return _signal(product, size, u.dtype)[:, offset : offset + u.shape[1]]


def _transpose(u, past, kernel, circular, operand, g):
    del operand
    inputs, offset, size, taps = _lay_out(u, past, kernel, circular)
    g = _spectrum(jnp.pad(g, ((0, 0), (offset, 0), (0, 0))), size)
    du = _signal(g * _reversed_spectrum(_by_time(kernel, taps, u.dtype), size), size, u.dtype)
    dkernel = _signal((g * _reversed_spectrum(inputs, size)).sum(0, keepdims=True), size, u.dtype)
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


def _spectrum(v, size):
    """The Fourier transform of (b, t, d) along time, (b, d, frequencies)."""
    v = jnp.swapaxes(v, 1, 2)
    return jnp.fft.fft(v, size) if jnp.iscomplexobj(v) else jnp.fft.rfft(v, size)


def _reversed_spectrum(v, size):
    """The spectrum of v with time running backwards around the circle."""
    return _spectrum(v.conj(), size).conj()


def _signal(spectrum, size, dtype):
    """The inverse of `_spectrum`, (b, size, d), of a signal of type `dtype`."""
    complex_signal = jnp.issubdtype(dtype, jnp.complexfloating)
    v = jnp.fft.ifft(spectrum, size) if complex_signal else jnp.fft.irfft(spectrum, size)
    return jnp.swapaxes(v, 1, 2)
