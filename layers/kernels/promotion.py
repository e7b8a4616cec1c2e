"""Types that meet in the library's own arithmetic, whatever `jax_numpy_dtype_promotion` allows a program.

Real and complex numbers, and bfloat16 inputs and float32 sums, meet on purpose in a primitive. "strict" is about the
arithmetic of the program that calls it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def joint_dtype(*types: jax.Array | DTypeLike) -> jnp.dtype:
    """Returns the type that JAX promotes arrays or types to by default."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*types)


def promoting(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `function`, with JAX's default promotion of types inside.

    JAX traces the passes of a custom gradient when it differentiates a program, so they need it themselves.
    """

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return wrapped
