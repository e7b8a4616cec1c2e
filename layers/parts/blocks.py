"""Cutting sequences into blocks of equal length."""

import jax.numpy as jnp

from layers.typing import Array, Num


def in_blocks(x: Num[Array, "b t *f"], size: int) -> Num[Array, "b m size *f"]:
    """Returns blocks of `size` tokens, the last one padded with zeros."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), *((0, 0),) * (x.ndim - 2)))
    return x.reshape(x.shape[0], x.shape[1] // size, size, *x.shape[2:])


def with_neighbours(x: Num[Array, "b m s *f"], *, ahead: bool) -> Num[Array, "b m c *f"]:
    """Returns each block concatenated with the previous one and, with `ahead`, the next one."""
    rest = ((0, 0),) * (x.ndim - 2)
    blocks = [jnp.pad(x, ((0, 0), (1, 0), *rest))[:, :-1], x]
    if ahead:
        blocks.append(jnp.pad(x, ((0, 0), (0, 1), *rest))[:, 1:])
    return jnp.concatenate(blocks, axis=2)
