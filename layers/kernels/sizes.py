"""Sizes of axes that may be symbols: `jax.export` traces a program once for every batch and length."""

from typing import Any


def known(size: Any) -> bool:
    """Whether a size is a number, not a symbol."""
    return isinstance(size, int)


def at_most(block: int, size: Any) -> int:
    """Returns the length of a block: `block`, or a known `size` if that is less."""
    return min(block, size) if known(size) else block


def in_chunks(size: Any, chunk: int) -> Any:
    """Returns `size` rounded up to a multiple of `chunk`, in a form that symbols are divided in."""
    return -(-size // chunk) * chunk


def power_of_two(size: Any, largest: int) -> int:
    """Returns the smallest power of two of at least `size`, `largest` (a power of two) at most; that for a symbol."""
    return min(largest, 1 << (size - 1).bit_length()) if known(size) else largest
