"""A linear map whose outputs serve several purposes."""

from collections.abc import Sequence

from layers.parameters import Linear
from layers.typing import Array, Float


def project(
    linear: Linear, x: Float[Array, "... d"], sizes: Sequence[int]
) -> tuple[Float[Array, "... n"], ...]:
    """Returns the outputs x W + b of a linear map in consecutive parts of these sizes, which sum to all outputs.

    Each part is a product of its own with a slice of W. A kernel that takes one part then reads the array as it is written, while
    a slice of all outputs would be copied for it.
    """
    kernel, dtype = linear.matrix, linear.dtype
    parts, start = [], 0
    for size in sizes:
        columns = slice(start, start + size)
        part = x.astype(dtype) @ kernel[:, columns].astype(dtype)
        if linear.bias is not None:
            part += linear.bias[columns].astype(dtype)[(None,) * (x.ndim - 1)]
        parts.append(part)
        start += size
    if start != kernel.shape[1]:
        raise ValueError(f"sizes={tuple(sizes)} sum to {start}; expected {kernel.shape[1]}, all outputs")
    return tuple(parts)
