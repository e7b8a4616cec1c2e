"""Shares of the slow tests, so that CI need not run all of them every time."""

import zlib


def read_share(text: str) -> tuple[int, int]:
    """Returns (k, n) from "k/n", the k-th of n shares.

    Raises:
      ValueError: the text has another form, or k is not between 1 and n.
    """
    k, slash, n = text.partition("/")
    if not (slash and k.isdecimal() and n.isdecimal() and 1 <= int(k) <= int(n)):
        raise ValueError(f"share={text!r}; expected K/N with K from 1 to N, such as 1/2")
    return int(k), int(n)


def in_share(name: str, share: tuple[int, int]) -> bool:
    """Returns whether a test is in a share; every name is in exactly one of n."""
    k, n = share
    return zlib.crc32(name.encode()) % n == k - 1
