"""The identity of parameters that training does not change and checkpoints do not hold."""

import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from experiments.training.model import Declaration
from layers.typing import Array


def fingerprint(arrays: Mapping[str, tuple[Declaration, Array]]) -> Array:
    """Returns a uint32 that differs, but for chance, if any bit of the arrays does.

        sum over layers n and elements i of c_n (2 i + 1) bits_i     modulo 2^32,    c_n odd, from the name of the layer

    It depends on names by layer, and neither on stacking nor on how arrays are divided over devices. A pure function.

    Args:
      arrays: declarations and arrays, float32 or bfloat16, by path.
    """
    total = jnp.zeros((), jnp.uint32)
    for declaration, array in arrays.values():
        for name, part in declaration.split(array).items():
            total += jnp.uint32(zlib.crc32(name.encode()) | 1) * _weighted_bits(part)
    return total


def _weighted_bits(array: Array) -> Array:
    wide = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}")).astype(
        jnp.uint32
    )
    place, stride = jnp.zeros(array.shape, jnp.uint32), 1
    for axis in reversed(range(array.ndim)):
        place += jnp.uint32(stride % 2**32) * jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
        stride *= array.shape[axis]
    return jnp.sum(wide * (2 * place + 1), dtype=jnp.uint32)
