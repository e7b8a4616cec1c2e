"""Argument checks shared by the primitives. Every error names the argument, what was given and what is expected."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from layers.kernels.segments import SegmentIds, Segments


def check_shape(name: str, array: jax.Array, pattern: str, sizes: dict[str, int]) -> None:
    """Checks `array` against a pattern such as "b t d", and records the sizes of letters that are new.

    `b|1` accepts the size of `b` or 1; a number stands for itself.

    Raises:
      ValueError: the rank or a size differs; the message names the argument and the expected shape.
    """
    letters = pattern.split()
    fits = array.ndim == len(letters)
    seen: dict[str, int] = {}
    for letter, size in zip(letters, array.shape) if fits else ():
        base = letter.removesuffix("|1")
        expected = int(base) if base.isdigit() else sizes.get(base, seen.get(base))
        if expected is None and not (letter != base and size == 1):
            seen[base] = size
        elif expected is not None and size != expected and not (letter != base and size == 1):
            fits = False
    if not fits:
        known = ", ".join(f"{letter}={size}" for letter, size in sizes.items())
        raise ValueError(
            f"{name} has shape {array.shape}; expected ({', '.join(letters)})"
            + (f" with {known}" if known else "")
        )
    sizes.update(seen)


def check_floating(**arrays: jax.Array | None) -> None:
    """Raises TypeError for an array that is neither floating point nor complex."""
    for name, array in arrays.items():
        if array is not None and not jnp.issubdtype(array.dtype, jnp.inexact):
            raise TypeError(f"{name} has dtype {array.dtype}; expected a floating-point or complex type")


def check_real(**arrays: jax.Array | None) -> None:
    """Raises TypeError for an array that is not real floating point."""
    for name, array in arrays.items():
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} has dtype {array.dtype}; expected a real floating-point type")


def check_segment_ids(segment_ids: SegmentIds, sizes: Mapping[str, int]) -> Segments | None:
    """Checks that segment ids are integers of shape (b, t), and returns them as `Segments`."""
    if segment_ids is None:
        return None
    ids = segment_ids.ids if isinstance(segment_ids, Segments) else segment_ids
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"segment_ids has dtype {ids.dtype}; expected an integer type")
    check_shape("segment_ids", ids, "b t", dict(sizes))
    return Segments.of(segment_ids)


def accumulation_dtype(*arrays: jax.Array | None) -> jnp.dtype:
    """Returns the type of states and sums: at least float32, or complex64 if any array is complex."""
    return jnp.result_type(jnp.float32, *(a.dtype for a in arrays if a is not None))
