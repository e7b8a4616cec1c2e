"""Indices that users pass, such as token ids and labels: out of range they are seen.

Values at hand are checked on the host and named in an error. Inside a compiled function nothing can be raised: there an index
out of range becomes NaN, which reaches the loss and its gradients.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layers.typing import Array, Float


def is_concrete(*arrays: Any) -> bool:
    """Returns whether all arrays have values on this host, rather than being traced or held by other processes."""
    return all(
        not isinstance(array, jax.core.Tracer) and getattr(array, "is_fully_addressable", True)
        for array in arrays
    )


def check_indices(name: str, indices: Any, size: int, *, counted: Any = None, of: str) -> None:
    """Raises if a concrete index is not from 0 to size - 1; traced ones pass.

    Args:
      name: name of the indices in the message.
      indices: integers of any shape.
      size: number of rows or classes that they count.
      counted: True where an index is read, of the shape of `indices`; None for everywhere.
      of: name of `size` in the message.

    Raises:
      ValueError: names the first such index, its place, and `of`.
    """
    if not is_concrete(indices, counted):
        return
    indices = np.asarray(indices)
    if indices.size == 0 or (indices.min() >= 0 and indices.max() < size):
        return
    wrong = (indices < 0) | (indices >= size)
    if counted is not None:
        wrong &= np.asarray(counted)
    if not wrong.any():
        return
    place = tuple(int(axis) for axis in np.argwhere(wrong)[0])
    raise ValueError(
        f"{name}{list(place)} is {indices[place]}; expected 0 to {size - 1}, as {of}={size}"
        f" ({int(wrong.sum())} of {indices.size} are out of range)"
    )


def nan_outside(values: Float[Array, "*s"], indices: Any, size: int, *, counted: Any) -> Float[Array, "*s"]:
    """Returns the values computed from indices of their shape, NaN with gradients of NaN where one is out of range.

    `counted` is True where an index is read.
    """
    indices = jnp.asarray(indices)
    wrong = counted & ((indices < 0) | (indices >= size))
    return values * jnp.where(wrong, jnp.nan, 1.0).astype(values.dtype)
