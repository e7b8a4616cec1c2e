"""K_l = C A_bar^l B_bar, the convolution kernel of a linear state space model: S4, S4D, DSS."""

import jax.numpy as jnp

from layers.kernels.dispatch import Implementation, by_name_only, dispatch
from layers.kernels.ssm_kernel import reference, xla
from layers.kernels.ssm_kernel.arguments import checked
from layers.kernels.ssm_kernel.discretize import bilinear, zoh
from layers.kernels.ssm_kernel.dplr import RealSystem, real_system, restore_output, truncate_output
from layers.typing import Array, Float, Num

__all__ = [
    "RealSystem",
    "bilinear",
    "real_system",
    "restore_output",
    "ssm_kernel",
    "truncate_output",
    "zoh",
]

IMPLEMENTATIONS = {
    "xla": Implementation(xla.ssm_kernel, forward_mode=True),
    "reference": Implementation(reference.ssm_kernel, passed_over_reason=by_name_only, forward_mode=True),
}

DISCRETIZATIONS = ("zoh", "bilinear", "softmax")


def ssm_kernel(
    a: Num[Array, "#d n"],
    b: Num[Array, "#d n"] | None,
    c: Num[Array, "*channels d n"],
    dt: Float[Array, " d"],
    *,
    length: int,
    p: Num[Array, "#d n r"] | None = None,
    discretization: str = "zoh",
    conjugate_pairs: bool = True,
    truncated: bool = False,
    impl: str | None = None,
) -> Float[Array, "*channels d l"]:
    """Returns the kernel K_l = C A_bar^l B_bar of x' = A x + B u, y = C x, sampled every dt, for l < length.

    A is diagonal, diag(a), or diagonal plus low rank, diag(a) - p p^*. The kernel is for `layers.kernels.long_conv`.

        zoh        A_bar = exp(dt A),  B_bar = A^{-1} (A_bar - I) B: S4D, DSS-exp
        bilinear   A_bar = (I - dt/2 A)^{-1} (I + dt/2 A),  B_bar = dt (I - dt/2 A)^{-1} B: S4, S4D
        softmax    K_l = sum_n c_n b_n / a_n softmax_l(dt a_n l), softmax over the length: DSS-softmax

    S4 (Gu et al. 2022, arXiv:2111.00396), S4D (Gu et al. 2022, arXiv:2206.11893), DSS (Gupta et al. 2022,
    arXiv:2203.14343). Parameters are stored as real arrays; pass `jax.lax.complex(re, im)`.

    Args:
      a: eigenvalues of the diagonal part, per unit of time, per channel or for all channels; complex or real, with real
        part <= 0 for a kernel that does not grow.
      b: input, ones if None.
      c: output. Its leading axes, any number of them, are several outputs of one system.
      dt: step size per channel, positive. Negative ones are refused if known, and NaN in kernels of compiled code.
      length: number of steps; any.
      p: low-rank part. It needs "bilinear" and conjugate pairs.
      discretization: "zoh", "bilinear" or "softmax".
      conjugate_pairs: whether a, b, c and p hold one of each conjugate pair. K is then twice the real part of the sum, and
        otherwise the real part.
      truncated: whether c is C (I - A_bar^length), which S4 trains in the place of C (see `truncate_output`). K is then
        computed by Cauchy sums instead of powers of A_bar, which is cheaper in n. Re(a) must stay below 0, about -1e-3 or
        less in float32.
      impl: "xla", "reference", or None for the best.

    Returns:
      (..., d, length) float32 or wider.

    Raises:
      ValueError, TypeError: a shape, type, sign or option does not fit; the message names the argument.
    """
    arrays = checked(a, b, c, dt, p)
    if length < 0:
        raise ValueError(f"length is {length}; expected 0 or more")
    if discretization not in DISCRETIZATIONS:
        raise ValueError(f"discretization is {discretization!r}; expected one of {DISCRETIZATIONS}")
    if p is not None and not (discretization == "bilinear" and conjugate_pairs):
        raise ValueError(
            f"p is given with discretization={discretization!r} and conjugate_pairs={conjugate_pairs}; "
            "it needs 'bilinear' and True"
        )
    if truncated and p is None:
        raise ValueError("truncated is set without p; the kernel of a diagonal system takes c itself")
    shape = (*c.shape[:-1], length)
    if 0 in shape or c.shape[-1] == 0:
        return jnp.zeros(shape, arrays["dt"].dtype)
    arrays["c"] = arrays["c"].reshape(-1, *c.shape[-2:])
    options = {"discretization": discretization, "conjugate_pairs": conjugate_pairs, "truncated": truncated}
    return dispatch("ssm_kernel", IMPLEMENTATIONS, impl, **arrays, length=length, **options).reshape(shape)
