"""The definition of `ssm_kernel`: the response to an impulse, one step at a time, of the discretised system."""

import jax
import jax.numpy as jnp

from layers.kernels.ssm_kernel import discretize, dplr


def ssm_kernel(a, b, c, dt, p, length, discretization, conjugate_pairs, truncated):
    """Returns the kernel (k, d, length); the public function has checked the arguments, which have one precision."""
    if p is None:
        kernel = _diagonal(a, b, c, dt, length, discretization)
        return 2 * kernel.real if conjugate_pairs else kernel.real
    if truncated:
        c = dplr.restore_output(a, c, dt, p, length=length)
    # x' = A x + B u on (Re x, Im x), where p p^* also acts on the conjugate half of the state.
    n = a.shape[-1]
    eye = jnp.eye(2 * n, dtype=dt.dtype)[None]
    rotation = jnp.kron(jnp.array([[0, -1], [1, 0]], dt.dtype), jnp.eye(n, dtype=dt.dtype))[None]
    real, imag = (jnp.concatenate([part, part], axis=-1) for part in (a.real, a.imag))
    p = jnp.concatenate([p.real, p.imag], axis=1)
    matrix = real[:, :, None] * eye + imag[:, :, None] * rotation - 2 * p @ jnp.swapaxes(p, 1, 2)
    b = jnp.ones_like(a) if b is None else b
    b = jnp.concatenate([b.real, b.imag], axis=-1)
    half = matrix * (dt / 2)[:, None, None]
    a_bar = jnp.linalg.solve(eye - half, eye + half)
    b_bar = jnp.linalg.solve(eye - half, dt[:, None, None] * b[:, :, None])[..., 0]
    c = 2 * jnp.concatenate([c.real, -c.imag], axis=-1)

    def step(h, _):
        return jnp.einsum("dij,dj->di", a_bar, h), jnp.einsum("kdi,di->kd", c, h)

    return jnp.moveaxis(jax.lax.scan(step, b_bar, None, length)[1], 0, -1)


def _diagonal(a, b, c, dt, length, discretization):
    z = a * dt[:, None]
    if discretization == "softmax":
        # exp(z l) / sum_l' exp(z l') with the largest exponent taken out, by DSS's reciprocal.
        from_end = jnp.where(z.real > 0, length - 1, 0)
        powers = jnp.exp(z[..., None] * (jnp.arange(length)[None, None] - from_end[..., None]))
        inner = jnp.where(z.real > 0, -z, z)
        x = jnp.expm1(inner * length) * a
        b_scale = jnp.expm1(inner) * x.conj() / (jnp.abs(x) ** 2 + 1e-7)
        weights = c * (b_scale if b is None else b * b_scale)[None]
        return jnp.einsum("kdn,dnl->kdl", weights, powers)
    a_bar, b_scale = {"zoh": discretize.zoh, "bilinear": discretize.bilinear}[discretization](a, dt[:, None])
    state = b_scale if b is None else b_scale * b

    def step(h, _):
        return a_bar * h, jnp.einsum("kdn,dn->kd", c.astype(h.dtype), h)

    return jnp.moveaxis(jax.lax.scan(step, state, None, length)[1], 0, -1)
