"""SHA-256 of the content of a data set, independent of the file format; needs only the standard library."""

import hashlib
import struct
from collections.abc import Iterable, Mapping


def content_sha256(splits: Mapping[str, Iterable[tuple[bytes | memoryview, int]]]) -> str:
    """Returns the hex SHA-256 over all records in order.

    Per split, in the mapping's order, it covers the name in UTF-8, a zero byte, and per record the number of bytes
    (uint64) and the label (int64), both little-endian, followed by the bytes of the tokens; eight bytes 0xff end each
    split.
    """
    digest = hashlib.sha256()
    for name, records in splits.items():
        digest.update(name.encode() + b"\0")
        for tokens, label in records:
            digest.update(struct.pack("<Qq", len(tokens), label))
            digest.update(tokens)
        digest.update(b"\xff" * 8)
    return digest.hexdigest()
