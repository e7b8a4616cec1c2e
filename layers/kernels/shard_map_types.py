"""Parameters inside `jax.shard_map`."""

from typing import Any

import jax
import jax.numpy as jnp


def vary_like(parameter: jax.Array, x: jax.Array) -> jax.Array:
    """Returns `parameter`, marked as differing between devices wherever x does; its gradient is summed over them.

    A custom gradient must have the type of its argument. Inside `jax.shard_map`, the gradient of a parameter that is equal
    on all devices, computed from inputs that are not, has another type. Outside, this does nothing.
    """
    return parameter + jnp.zeros_like(x, shape=(), dtype=parameter.dtype)


def vary_as(array: jax.Array, *others: jax.Array) -> jax.Array:
    """Returns `array`, marked as differing wherever one of `others` does; unlike `vary_like`, without arithmetic."""
    missing = set().union(*map(_axes, others)) - _axes(array)
    return jax.lax.pcast(array, tuple(sorted(missing)), to="varying") if missing else array


def vary_alike(tree: Any) -> Any:
    """Returns a tree of arrays, each marked as differing wherever one of them does."""
    leaves = jax.tree.leaves(tree)
    return jax.tree.map(lambda leaf: vary_as(leaf, *leaves), tree)


def _axes(array: jax.Array) -> frozenset[str]:
    return frozenset(jax.typeof(array).manual_axis_type.varying)
