"""y = k * u, per channel a convolution with a kernel as long as the sequence: S4, S4D, DSS, SGConv, Hyena, H3, MEGA."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from layers.kernels import checks, devices
from layers.kernels.dispatch import Implementation, by_name_only, dispatch
from layers.kernels.long_conv import gpu, reference, toeplitz, xla
from layers.kernels.long_conv.over_time import OVER_TIME
from layers.kernels.long_conv.sparse import sparse_kernel
from layers.kernels.promotion import joint_dtype, promoting
from layers.kernels.sizes import known
from layers.typing import Array, Num

__all__ = ["Piece", "compose", "long_conv", "sparse_kernel", "summarize"]

# Numbers of taps, or of outputs after a state, up to which matrix products are faster than transforms. The number for a TPU
# is an estimate from the bytes that the two forms move.
TOEPLITZ_TAPS = {"cpu": 0, "gpu": 256, "tpu": 256}
TOEPLITZ_OUTPUTS = 4


def _transforms_win(*, x, kernel, initial_state, circular, **_):
    """Why products with a Toeplitz matrix are passed over, or None."""
    time, taps = x.shape[1], kernel.shape[1]
    if initial_state is None and not circular:
        taps = min(taps, time)
    few = TOEPLITZ_TAPS.get(devices.backend(), 0)
    if jnp.iscomplexobj(x) or jnp.iscomplexobj(kernel):
        return "x or kernel is complex"
    if taps <= few or (initial_state is not None and time <= TOEPLITZ_OUTPUTS):
        return None
    return f"the kernel has {taps} taps; up to {few} products are faster than transforms"


IMPLEMENTATIONS = {
    "gpu": Implementation(
        gpu.long_conv,
        unsupported_reason=gpu.unsupported_reason,
        passed_over_reason=gpu.passed_over_reason,
        backend="gpu",
    ),
    "toeplitz": Implementation(toeplitz.long_conv, passed_over_reason=_transforms_win),
    "xla": Implementation(xla.long_conv),
    "reference": Implementation(reference.long_conv, passed_over_reason=by_name_only, forward_mode=True),
}


def long_conv(
    x: Num[Array, "b t d"],
    kernel: Num[Array, "d l"],
    *,
    skip: Num[Array, " d"] | None = None,
    input_gate: Num[Array, "b t d"] | None = None,
    output_gate: Num[Array, "b t d"] | None = None,
    initial_state: Num[Array, "b s d"] | None = None,
    circular: bool = False,
    partial: int | None = None,
    frequencies: int | None = None,
    impl: str | None = None,
) -> tuple[Num[Array, "b t d"], Num[Array, "b s d"] | None]:
    """Returns every channel convolved with its own kernel, causally or around a circle, between two optional gates.

        u_t = input_gate_t x_t
        y_t = output_gate_t (sum_{j=0}^{l-1} kernel_j u_{t-j} + skip u_t)

    The operator of S4 (Gu et al. 2022, arXiv:2111.00396), H3 (Fu et al. 2023, arXiv:2212.14052), Hyena (Poli et al. 2023,
    arXiv:2302.10866) and FlashFFTConv (Fu et al. 2023, arXiv:2311.05908). The kernel may be shorter than the sequence, as
    long, or longer. All arrays may be real or complex; complex numbers are passed as such, `jax.lax.complex(re, im)`.

    There are no segments: a kernel that does not change with time cannot forget. A convolution with taps on both sides is
    a circular one over x with zeros appended, with the taps that look ahead at the end of the kernel.

    Forward-mode differentiation (jax.jvp) needs impl="reference". Reverse mode, and forward over reverse as in
    jax.hessian, have no such limit.

    Args:
      x: input.
      kernel: taps; tap j acts at lag j. Sums are in float32 or wider, and "xla" never rounds the kernel to less.
      skip: weight of the input itself.
      input_gate: multiplies the input.
      output_gate: multiplies the output, the skip term included.
      initial_state: the last l - 1 inputs before x, gated, the latest last; zeros if None.
      circular: whether u_{t-j} wraps around, t - j modulo t; there is no state then.
      partial: number of taps that count, 1 to l, as if the kernel had no more; all if None. States hold partial - 1 inputs.
      frequencies: number of frequencies of each sign that the kernel keeps, from 0 upwards, 1 to l + 1; all if None. Taps
        are those of `sparse_kernel`, before `partial` cuts them. It saves no time.
      impl: "xla" (Fourier transforms), "toeplitz" (matrix products, with operands in the type of x), "gpu" (Fourier
        transforms in float16 for bfloat16 inputs on Hopper GPUs, with errors of 5e-4 of the largest numbers of a row),
        "reference", or None for the best.

    Returns:
      y: (b, t, d), in the type of x, or complex if any argument is.
      final_state: the last l - 1 gated inputs, (b, l-1, d), float32 or wider; None if circular.

    Raises:
      ValueError, TypeError: a shape, type or `impl` does not fit; the message names the argument.
    """
    sizes: dict[str, int] = {}
    arrays = {"x": x, "kernel": kernel, "skip": skip, "input_gate": input_gate, "output_gate": output_gate}
    checks.check_floating(**arrays, initial_state=initial_state)
    for name, array in arrays.items():
        pattern = {"kernel": "d l", "skip": "d"}.get(name, "b t d")
        if array is not None:
            checks.check_shape(name, array, pattern, sizes)
    time, taps = x.shape[1], kernel.shape[1]
    if not (known(time) and known(taps)):
        raise ValueError(
            f"x has {time} tokens and kernel {taps} taps, symbols; the sizes of transforms are numbers: export each "
            "length by itself (the batch may be a symbol)"
        )
    if taps == 0:
        raise ValueError(f"kernel has shape {kernel.shape}; expected at least one tap")
    if circular and frequencies is not None:
        raise ValueError(
            f"frequencies={frequencies} is given with circular=True; mask the spectrum of the kernel, which is circular itself"
        )
    kernel = arrays["kernel"] = sparse_kernel(kernel, partial=partial, frequencies=frequencies)
    taps = kernel.shape[1]
    if initial_state is not None:
        if circular:
            raise ValueError("initial_state is given with circular=True; a circular convolution has no state")
        checks.check_shape("initial_state", initial_state, "b s d", sizes | {"s": taps - 1})
    given = [array for array in (*arrays.values(), initial_state) if array is not None]
    output = joint_dtype(x.dtype, jnp.complex64) if any(map(jnp.iscomplexobj, given)) else x.dtype
    final = None if circular else _final_state(x, taps, input_gate, initial_state)
    if time == 0:
        return x.astype(output), final
    y = dispatch(
        "long_conv",
        IMPLEMENTATIONS,
        impl,
        over_time=OVER_TIME,
        x=x,
        kernel=kernel,
        skip=skip,
        input_gate=input_gate,
        output_gate=output_gate,
        initial_state=initial_state,
        circular=circular,
    )
    return y.astype(output), final


@promoting
def _final_state(x, taps, input_gate, initial_state):
    """The last taps - 1 gated inputs."""
    size, time = taps - 1, x.shape[1]
    last = slice(max(0, time - size), None)
    dtype = checks.accumulation_dtype(x, input_gate, initial_state)
    inputs = x[:, last].astype(dtype)
    if input_gate is not None:
        inputs = inputs * input_gate[:, last]
    missing = size - inputs.shape[1]
    if initial_state is None:
        return jnp.pad(inputs, ((0, 0), (missing, 0), (0, 0)))
    return jnp.concatenate([initial_state[:, size - missing :].astype(dtype), inputs], axis=1)


class Piece(NamedTuple):
    """The effect of consecutive tokens on the state: it moves `steps` places back and `inputs` fills the end.

    Attributes:
      inputs: (b, l-1, d), the inputs of these tokens at the end, zeros before them.
      steps: int32 scalar, the number of tokens or l - 1 if that is less.
    """

    inputs: jax.Array
    steps: jax.Array


def summarize(
    x: Num[Array, "b t d"], kernel: Num[Array, "d l"], *, input_gate: Num[Array, "b t d"] | None = None
) -> Piece:
    """Returns the effect of consecutive tokens on the state; with `partial`, pass that many taps."""
    state = _final_state(x, kernel.shape[1], input_gate, None)
    return Piece(state, jnp.int32(min(x.shape[1], kernel.shape[1] - 1)))


def compose(first: Piece, second: Piece) -> Piece:
    """Returns the effect of `first` followed by `second`. Associative; the identity is zeros and no steps."""
    size = first.inputs.shape[1]
    moved = jnp.roll(first.inputs, -second.steps, axis=1)
    older = jnp.arange(size)[None, :, None] < size - second.steps
    return Piece(jnp.where(older, moved, second.inputs), jnp.minimum(first.steps + second.steps, size))
