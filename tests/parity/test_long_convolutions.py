"""Long convolutions and the kernels of SGConv and Hyena against PyTorch and flash-linear-attention.

The convolution of every segment with its FFT convolution, outputs and gradients; the positions of Hyena's filters with
its positional embedding; SGConv's stretched pieces with torch's linear interpolation; the windows of lightweight and
dynamic convolution with torch's unfold, as the paper's code runs them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from fla.modules.long_conv import PositionalEmbedding, fft_conv
from flax import nnx

from layers.mixers.convolution.hyena import ImplicitFilter
from layers.mixers.convolution.lightweight_conv import window_sum
from layers.mixers.convolution.sgconv import SGConv, SGConvConfig
from layers.parts.segmented_convolution import convolve

B, T, D = 2, 33, 5


def draw(*shapes):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def close(got, want, tolerance=1e-5):
    got, want = np.asarray(got), want.detach().numpy()
    assert got.shape == want.shape
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error <= tolerance, f"relative error {error:.1e}"


def test_segments_equal_separate_convolutions():
    """fft_conv adds its input, and so does a tap of one here."""
    x, kernel, weights = draw((B, T, D), (D, T), (B, T, D))
    ids = np.array([[1] * 10 + [0] * 3 + [2] * 20, [0] * 5 + [7] * 28])
    theirs = torch.tensor(x, requires_grad=True), torch.tensor(kernel, requires_grad=True)
    want = torch.zeros(B, T, D)
    for row, start, stop in ((0, 0, 10), (0, 13, 33), (1, 5, 33)):
        piece = theirs[0][row : row + 1, start:stop].transpose(1, 2)
        y = fft_conv(piece, theirs[1][:, : stop - start], None, gelu=False)
        want[row, start:stop] = y.transpose(1, 2)[0]
    (want * torch.tensor(weights)).sum().backward()

    def ours(x, kernel):
        return convolve(x, kernel.at[:, 0].add(1.0), segment_ids=jnp.asarray(ids))

    close(ours(jnp.asarray(x), jnp.asarray(kernel)), want)
    gradients = jax.grad(lambda *args: (ours(*args) * weights).sum(), argnums=(0, 1))(
        jnp.asarray(x), jnp.asarray(kernel)
    )
    for got, tensor in zip(gradients, theirs, strict=True):
        close(got, tensor.grad)


def test_looking_ahead_equals_the_two_sided_convolution():
    """fft_conv's reversed kernel weighs lag 0 as well; the one here starts one step ahead."""
    x, kernel, ahead = draw((B, T, D), (D, T), (D, T - 1))
    reverse = np.concatenate([np.zeros((D, 1), np.float32), ahead], axis=1)
    arguments = (torch.tensor(v) for v in (x.transpose(0, 2, 1), kernel))
    want = fft_conv(*arguments, None, gelu=False, k_rev=torch.tensor(reverse)).transpose(1, 2) - torch.tensor(
        x
    )
    close(convolve(jnp.asarray(x), jnp.asarray(kernel), ahead=jnp.asarray(ahead)), want)


def test_positions_of_implicit_filters():
    network = ImplicitFilter(D, 200, features=33, hidden=4, sine_frequency=1.0, shift=0.0, rngs=nnx.Rngs(0))
    close(network.positions(150), PositionalEmbedding(33, 200)(150)[0], 2e-6)


def test_pieces_of_sgconv_are_interpolated_as_in_torch():
    model = SGConv(SGConvConfig(width=D, max_length=64, kernel_size=8), rngs=nnx.Rngs(0))
    pieces = []
    for scale in range(4):
        w = torch.tensor(np.asarray(model.w[scale]) * 2.0 ** (3 - scale))
        stretch = 2 ** max(0, scale - 1)
        pieces.append(torch.nn.functional.interpolate(w, scale_factor=stretch, mode="linear"))
    want = torch.cat(pieces, dim=-1)
    close(model.kernel(), want / want.norm(dim=-1, keepdim=True), 1e-6)


def test_windows_equal_unfold():
    heads, taps, x_width = 2, 4, 6
    x, fixed, predicted = draw((B, T, x_width), (1, 1, heads, taps), (B, T, heads, taps))
    padded = torch.nn.functional.pad(torch.tensor(x), (0, 0, taps - 1, 0))
    windows = padded.unfold(1, taps, 1).reshape(B, T, heads, x_width // heads, taps)
    past = jnp.zeros((B, taps - 1, x_width))
    for weights in (fixed, predicted):
        want = (windows * torch.tensor(weights)[:, :, :, None]).sum(-1).reshape(B, T, x_width)
        close(window_sum(jnp.asarray(x), jnp.asarray(weights), past), want, 1e-6)
