"""Argument checks shared by the primitives. Every error names the argument, what was given and what is expected."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from layers.kernels.promotion import joint_dtype
from layers.kernels.segments import SegmentIds, Segments

# What `not_positive` suggests for a log-decay.
LOGARITHM = "pass the logarithm of the decay, such as jnp.log(0.9) for a decay of 0.9"


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


def check_features(**arrays: jax.Array) -> None:
    """Raises ValueError for an array whose last axis, the features of a head, is empty."""
    for name, array in arrays.items():
        if array.shape[-1] == 0:
            raise ValueError(f"{name} has shape {array.shape}; expected at least one feature per head")


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
    return joint_dtype(jnp.float32, *(a.dtype for a in arrays if a is not None))


def not_positive(name: str, array: jax.Array | None, instead: str) -> jax.Array | None:
    """Returns `array` with NaN in place of positive numbers, which are refused if they are known.

    Args:
      name: name of the argument.
      array: numbers that must be at most 0, such as a log-decay; None passes.
      instead: what would work, for the message.

    Raises:
      ValueError: a number is positive, and `array` is not being traced.
    """
    return _bounded(name, array, instead, above=True)


def not_negative(name: str, array: jax.Array | None, instead: str) -> jax.Array | None:
    """Returns what `not_positive` does for numbers that must be at least 0, such as a step size."""
    return _bounded(name, array, instead, above=False)


def _bounded(name, array, instead, *, above):
    if array is None:
        return None
    wrong = array > 0 if above else array < 0
    if isinstance(wrong, jax.core.Tracer):
        # Added, not selected: the sum fuses with what makes or reads the array, and its gradient keeps nothing.
        return array + jax.lax.stop_gradient(jnp.where(wrong, jnp.nan, 0).astype(array.dtype))
    if wrong.any():
        # Under jax.grad alone the comparison is known, the array is not.
        numbers = jnp.where(wrong, jax.lax.stop_gradient(array), 0)
        number = numbers.max() if above else numbers.min()
        bound = "at most" if above else "at least"
        raise ValueError(f"{name} holds {float(number):.3g}; expected numbers of {bound} 0: {instead}")
    return array
