"""SHA-256 of what a data set holds: independent of the file format, and needing only the standard library."""

import hashlib
import struct
from collections.abc import Iterable, Mapping


def content_sha256(splits: Mapping[str, Iterable[tuple[bytes | memoryview, int]]]) -> str:
    """Hex SHA-256 over all records in order.

    Hashed are, for every split in the mapping's order: its name in UTF-8, a zero byte, and for every record its number
    of bytes (uint64) and label (int64), both little-endian, then the bytes of its tokens; after the last record of a
    split eight bytes 0xff.
    """
    digest = hashlib.sha256()
    for name, records in splits.items():
        digest.update(name.encode() + b"\0")
        for tokens, label in records:
            digest.update(struct.pack("<Qq", len(tokens), label))
            digest.update(tokens)
        digest.update(b"\xff" * 8)
    return digest.hexdigest()
