"""`ssm_kernel` in plain JAX. The backward pass recomputes everything from the parameters and keeps nothing else."""

import functools

import jax

from layers.kernels.ssm_kernel import cauchy, dplr, vandermonde


def ssm_kernel(a, b, c, dt, p, length, discretization, conjugate_pairs, truncated):
    """Returns the kernel (k, d, length); the public function has checked the arguments, which have one precision."""
    if p is None:
        options = {"discretization": discretization, "conjugate_pairs": conjugate_pairs}
        run = functools.partial(vandermonde.diagonal_kernel, length=length, **options)
        return jax.checkpoint(run)(a, b, c, dt)
    run = cauchy.dplr_kernel if truncated else dplr.dplr_kernel
    return jax.checkpoint(functools.partial(run, length=length))(a, b, c, dt, p)
