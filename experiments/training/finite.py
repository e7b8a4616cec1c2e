"""A check, on the devices, that all numbers in a tree are finite."""

from typing import Any

import jax
import jax.numpy as jnp

from experiments.training.records import NonFiniteError


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in _numbers(tree)]).all()


@jax.jit
def _each_finite(tree: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in _numbers(tree)])


def _numbers(tree: Any) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]


def check_finite(step: int, tree: Any) -> None:
    """Raises NonFiniteError, naming an array, unless all numbers in a tree of arrays are finite.

    The devices return one number; the arrays are not transferred.
    """
    if _all_finite(tree):
        return
    names = [
        jax.tree_util.keystr(path, simple=True, separator=" ")
        for path, leaf in jax.tree.leaves_with_path(tree)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    finite = jax.device_get(_each_finite(tree))
    raise NonFiniteError(step, next(name for name, good in zip(names, finite, strict=True) if not good))
