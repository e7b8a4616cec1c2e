"""Diagonal plus low rank, A = diag(a) - p p^*, in conjugate pairs, discretised by the bilinear rule.

A state of n conjugate pairs is 2n real numbers (Re h, Im h). In them A is a real matrix whose symmetric part is negative
semidefinite wherever Re a <= 0, so that A_bar = (I - dt A / 2)^{-1} (I + dt A / 2) never expands. Powers of A_bar are held
as their difference from the identity, E_m = A_bar^m - I. Slow modes keep their relative accuracy through
E_2m = 2 E_m + E_m^2, where A_bar^m itself would round them to 1.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from layers.kernels.promotion import promoting
from layers.kernels.ssm_kernel.arguments import checked
from layers.typing import Array, Complex, Float, Num

HIGHEST = jax.lax.Precision.HIGHEST


class RealSystem(NamedTuple):
    """h_t = a_bar h_{t-1} + b_bar u_t, y_t = c h_t in real numbers, one system per channel.

    Attributes:
      a_bar: (d, 2n, 2n).
      b_bar: (d, 2n).
      c: (..., d, 2n).
    """

    a_bar: jax.Array
    b_bar: jax.Array
    c: jax.Array


@promoting
def real_system(
    a: Complex[Array, "#d n"],
    b: Num[Array, "#d n"] | None,
    c: Num[Array, "*channels d n"],
    dt: Float[Array, " d"],
    p: Num[Array, "#d n r"],
) -> RealSystem:
    """Returns the discretised system in real numbers, for running it step by step; arguments as for `ssm_kernel`."""
    arrays = checked(a, b, c, dt, p)
    change = _change(arrays["a"], arrays["dt"], arrays["p"])
    b_bar = _input(arrays["b"], change, arrays["dt"], arrays["a"])
    return RealSystem(change + _identity(change), b_bar, _output(arrays["c"]))


@promoting
def truncate_output(
    a: Complex[Array, "#d n"],
    c: Num[Array, "*channels d n"],
    dt: Float[Array, " d"],
    p: Num[Array, "#d n r"],
    *,
    length: int,
) -> Complex[Array, "*channels d n"]:
    """Returns C (I - A_bar^length), the output for which sum_l C A_bar^l B_bar w^l, w^length = 1, ends before `length`."""
    arrays = checked(a, None, c, dt, p)
    rows = _output(arrays["c"])
    moved = jnp.zeros_like(rows)
    change = _change(arrays["a"], arrays["dt"], arrays["p"])
    while length:
        if length & 1:
            moved = moved + jnp.einsum("...di,dij->...dj", rows + moved, change, precision=HIGHEST)
        length >>= 1
        change = _twice(change) if length else change
    return _from_output(-moved)


@promoting
def restore_output(
    a: Complex[Array, "#d n"],
    c: Num[Array, "*channels d n"],
    dt: Float[Array, " d"],
    p: Num[Array, "#d n r"],
    *,
    length: int,
) -> Complex[Array, "*channels d n"]:
    """Returns C from C (I - A_bar^length), the inverse of `truncate_output`; inaccurate for modes that hardly decay."""
    system = real_system(a, None, c, dt, p)
    power = jnp.linalg.matrix_power(system.a_bar, length)
    transposed = jnp.swapaxes(_identity(power) - power, 1, 2)
    rows = jnp.moveaxis(system.c.reshape(-1, *system.c.shape[-2:]), 0, -1)
    return _from_output(jnp.moveaxis(jnp.linalg.solve(transposed, rows), -1, 0).reshape(system.c.shape))


def dplr_kernel(a, b, c, dt, p, length):
    """Returns the kernel (k, d, length): C A_bar^{jm} in rows times A_bar^i B_bar in columns, both built by doubling.

    Costs log2(length) products of 2n x 2n matrices per channel, and holds nothing larger than 2n sqrt(length).
    """
    change = _change(a, dt, p)
    columns, rows = _input(b, change, dt, a)[..., None], _output(c)[..., None, :]
    block = 1 << math.ceil(math.log2(length) / 2)
    while columns.shape[-1] < block:
        columns = jnp.concatenate(
            [columns, columns + jnp.einsum("dij,djm->dim", change, columns, precision=HIGHEST)], axis=-1
        )
        change = _twice(change)
    count = -(-length // block)
    while rows.shape[-2] < count:
        rows = jnp.concatenate(
            [rows, rows + jnp.einsum("kdji,dim->kdjm", rows, change, precision=HIGHEST)], axis=-2
        )
        change = _twice(change) if rows.shape[-2] < count else change
    kernel = jnp.einsum("kdji,dim->kdjm", rows[:, :, :count], columns, precision=HIGHEST)
    return kernel.reshape(*c.shape[:2], -1)[..., :length]


def _change(a, dt, p):
    """A_bar - I, (d, 2n, 2n), by the Woodbury identity on (I - dt A / 2)^{-1}."""
    half = a * (dt / 2)[:, None]
    inverse = 1 / (1 - half)
    left = inverse[..., None] * p
    right = inverse[..., None] * p.conj()
    gram = 2 * jnp.einsum("dir,dis->drs", *jnp.broadcast_arrays(p.conj(), left), precision=HIGHEST).real
    inner = (2 / dt)[:, None, None] * _identity(gram) + gram
    inner = 1 / inner if p.shape[-1] == 1 else jnp.linalg.inv(inner)
    left = jnp.concatenate([left.real, left.imag], axis=1)
    right = 2 * jnp.concatenate([right.real, -right.imag], axis=1)
    correction = jnp.einsum("dir,drs,djs->dij", left, inner, right, precision=HIGHEST)
    return 2 * (_as_real_matrix(half * inverse) - correction)


def _as_real_matrix(diagonal):
    """The matrix of z -> diagonal z on (Re z, Im z)."""
    identity = jnp.eye(diagonal.shape[-1], dtype=diagonal.real.dtype)[None]
    real, imag = (part[..., None] * identity for part in (diagonal.real, diagonal.imag))
    return jnp.concatenate(
        [jnp.concatenate([real, -imag], axis=2), jnp.concatenate([imag, real], axis=2)], axis=1
    )


def _identity(matrix):
    return jnp.eye(matrix.shape[-1], dtype=matrix.dtype)[None]


def _twice(change):
    return 2 * change + jnp.einsum("dij,djk->dik", change, change, precision=HIGHEST)


def _input(b, change, dt, a):
    """B_bar = dt (I - dt A / 2)^{-1} B = dt (I + E / 2) B."""
    b = jnp.ones_like(a) if b is None else b
    b = jnp.concatenate([b.real, b.imag], axis=-1)
    b = jnp.broadcast_to(b, change.shape[:2])
    return dt[:, None] * (b + jnp.einsum("dij,dj->di", change, b, precision=HIGHEST) / 2)


def _output(c):
    """y = 2 Re(c h) as a row vector on (Re h, Im h)."""
    return 2 * jnp.concatenate([c.real, -c.imag], axis=-1)


def _from_output(row):
    real, imag = jnp.split(row, 2, axis=-1)
    return jax.lax.complex(real, -imag) / 2
