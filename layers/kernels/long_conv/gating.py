"""What surrounds a convolution, however it is computed: gates, the skip term, and one backward pass.

The backward pass needs only the arguments: with u = i x, z = k * u, y = o (z + s u) and g = o dy,

    du = k correlated with g, plus s g,    dk = u correlated with g,    ds = sum of g u,
    dx = i du,    di = x du,    do = (z + s u) dy,

and z is recomputed, if there is an output gate, instead of kept. A causal convolution takes what is not finite as zero, in
both passes, and sets the outputs that it reaches; they have no gradient. Around a circle it reaches all of them.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from layers.kernels.checks import accumulation_dtype
from layers.kernels.isolation import cleaned
from layers.kernels.promotion import joint_dtype, promoting
from layers.kernels.shard_map_types import vary_like


class Convolution(NamedTuple):
    """A way to convolve.

    Attributes:
      forward: `forward(u, past, kernel, circular, operand)` gives k * u, (b, t, d). `past` (b, l-1, d) or None comes
        before u. `circular` puts the end of u there, and requires l <= t. `operand` is the type that u may be rounded to.
      transpose: `transpose(u, past, kernel, circular, operand, g)` gives the cotangents of u, past and kernel.
    """

    forward: Callable[..., jax.Array]
    transpose: Callable[..., tuple[jax.Array, jax.Array | None, jax.Array]]


def gated(convolution, circular, x, kernel, skip, input_gate, output_gate, past):
    """Returns output_gate (kernel * (input_gate x) + skip input_gate x), in the type of x, complex if anything is."""
    time, taps = x.shape[1], kernel.shape[1]
    if circular and taps > time:
        turns = -(-taps // time)
        kernel = jnp.pad(kernel, ((0, 0), (0, turns * time - taps)))
        kernel = kernel.astype(accumulation_dtype(kernel)).reshape(-1, turns, time).sum(1)
    kernel, skip, past = jax.tree.map(lambda v: vary_like(v, x), (kernel, skip, past))
    return _gated(convolution, circular, x, kernel, skip, input_gate, output_gate, past)


_NAMES = "x", "kernel", "skip", "input_gate", "output_gate", "initial_state"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gated(convolution, circular, x, kernel, skip, input_gate, output_gate, past):
    return _forward(convolution, circular, x, kernel, skip, input_gate, output_gate, past)[0]


def _forward(convolution, circular, *arguments):
    (x, kernel, skip, input_gate, output_gate, past), _, reached = _finite(circular, arguments)
    u = _inputs(x, kernel, input_gate, past)
    y = _before_output_gate(convolution, circular, x.dtype, u, kernel, skip, past)
    y = y if output_gate is None else y * output_gate
    y = y.astype(joint_dtype(x.dtype, jnp.complex64) if jnp.iscomplexobj(y) else x.dtype)
    return y if reached is None else jnp.where(reached, jnp.nan, y), arguments


def _backward(convolution, circular, arguments, dy):
    (x, kernel, skip, input_gate, output_gate, past), unfit, reached = _finite(circular, arguments)
    u = _inputs(x, kernel, input_gate, past)
    dy = dy.astype(accumulation_dtype(dy))
    dy = dy if reached is None else jnp.where(reached, 0, dy)
    dskip = dinput = doutput = None
    if output_gate is not None:
        y = _before_output_gate(convolution, circular, x.dtype, u, kernel, skip, past)
        doutput = cast(dy * y, output_gate.dtype)
        dy = dy * output_gate
    du, dpast, dkernel = convolution.transpose(u, past, kernel, circular, x.dtype, cast(dy, u.dtype))
    if skip is not None:
        dskip = cast((dy * u).sum((0, 1)), skip.dtype)
        du = du + cast(dy * skip[None, None], u.dtype)
    if input_gate is not None:
        dinput = cast(du * x, input_gate.dtype)
        du = du * input_gate
    dpast = None if past is None else cast(dpast, past.dtype)
    gradients = cast(du, x.dtype), cast(dkernel, kernel.dtype), dskip, dinput, doutput, dpast
    return tuple(
        jnp.where(unfit[name], 0, gradient) if name in unfit else gradient
        for name, gradient in zip(_NAMES, gradients, strict=True)
    )


_gated.defvjp(promoting(_forward), promoting(_backward))


def _finite(circular, arguments):
    """The arguments without what is not finite, where that stands, by name, and which outputs it reaches; see `cleaned`."""
    if circular:
        return arguments, {}, None
    given = dict(zip(_NAMES, arguments, strict=True))
    series = {name: v for name, v in given.items() if v is not None and name not in ("kernel", "skip")}
    finite, unfit, reached = cleaned(series, given["kernel"].shape[1])
    return tuple((given | finite).values()), unfit, reached


def _inputs(x, kernel, input_gate, past):
    """The input of the convolution, in the type in which it is computed."""
    u = x.astype(accumulation_dtype(x, kernel, input_gate, past))
    return u if input_gate is None else u * input_gate


def _before_output_gate(convolution, circular, operand, u, kernel, skip, past):
    y = convolution.forward(u, past, kernel, circular, operand)
    return y if skip is None else y + skip[None, None] * u


def cast(v, dtype):
    """`v` in `dtype`; the cotangent of a real number is the real part."""
    return (v if jnp.issubdtype(dtype, jnp.complexfloating) else v.real).astype(dtype)
