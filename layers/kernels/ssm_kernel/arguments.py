"""Checks of the parameters of a state space model."""

import jax
import jax.numpy as jnp

from layers.kernels import checks
from layers.kernels.promotion import joint_dtype


def checked(a, b, c, dt, p) -> dict[str, jax.Array | None]:
    """Returns the arrays by name, in one precision, float32 or wider, after checks of shape and type."""
    sizes: dict[str, int] = {}
    checks.check_floating(a=a, b=b, c=c, p=p)
    checks.check_real(dt=dt)
    checks.check_shape("dt", dt, "d", sizes)
    checks.check_shape("a", a, "d|1 n", sizes)
    if b is not None:
        checks.check_shape("b", b, "d|1 n", sizes)
    if c.ndim < 2 or c.shape[-2:] != (sizes["d"], sizes["n"]):
        raise ValueError(f"c has shape {c.shape}; expected (..., d, n) with d={sizes['d']}, n={sizes['n']}")
    if p is not None:
        checks.check_shape("p", p, "d|1 n r", sizes)
    dt = checks.not_negative("dt", dt, "a step size is positive, such as jnp.exp(log_dt)")
    real = jnp.finfo(checks.accumulation_dtype(a, b, c, dt, p)).dtype
    wide = joint_dtype(real, jnp.complex64)

    def cast(v, dtype):
        return None if v is None else v.astype(wide if jnp.iscomplexobj(v) else dtype)

    return {
        "a": cast(a, real if p is None else wide),
        "b": cast(b, real),
        "c": cast(c, real),
        "dt": cast(dt, real),
        "p": cast(p, real),
    }
