"""`ssm_kernel` in plain JAX. The backward pass computes everything again from the parameters, which are all that it keeps."""

import functools

import jax

from layers.kernels.ssm_kernel import cauchy, dplr, vandermonde


def ssm_kernel(a, b, c, dt, p, length, discretization, conjugate_pairs, truncated):
    """Kernel (k, d, length); the arguments are checked by the public function and of one precision."""
    if p is None:
        options = {"discretization": discretization, "conjugate_pairs": conjugate_pairs}
        run = functools.partial(vandermonde.diagonal_kernel, length=length, **options)
        return jax.checkpoint(run)(a, b, c, dt)
    run = cauchy.dplr_kernel if truncated else dplr.dplr_kernel
    return jax.checkpoint(functools.partial(run, length=length))(a, b, c, dt, p)
