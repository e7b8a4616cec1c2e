"""Documents by split, and their bytes as text."""

import hashlib
import itertools
from collections.abc import Iterable
from pathlib import Path

SPLITS = ("train", "validation", "test")
SHARES = (0.90, 0.95)  # where validation and test begin

Documents = dict[str, list[str]]


def split_of(name: str) -> str:
    """Returns the split of the document with a name: that of the first 8 bytes of the name's SHA-256."""
    share = int.from_bytes(hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:8], "big") / 2**64
    return SPLITS[sum(share >= bound for bound in SHARES)]


def corpus_sha256(documents: Documents) -> str:
    """Returns the hash of all documents, in order and by split."""
    digest = hashlib.sha256()
    for split, texts in documents.items():
        for text in texts:
            data = text.encode()
            digest.update(f"{split} {len(data)}\n".encode())
            digest.update(data)
    return digest.hexdigest()


def by_hash(named: Iterable[tuple[str, str]]) -> Documents:
    """Returns named texts by the split that their names say; empty ones are left out."""
    documents: Documents = {split: [] for split in SPLITS}
    for name, text in named:
        if text:
            documents[split_of(name)].append(text)
    return documents


def by_lines(text: str) -> Documents:
    """Returns a text cut after 90% and 95% of its lines."""
    lines = text.splitlines(keepends=True)
    bounds = [0, *(int(share * len(lines)) for share in SHARES), len(lines)]
    parts = ("".join(lines[start:stop]) for start, stop in itertools.pairwise(bounds))
    return {split: [part] if part else [] for split, part in zip(SPLITS, parts, strict=True)}


def read_text(path: Path, name: str, invalid: str) -> str:
    """Returns the text of a file that messages call `name`.

    Raises:
      ValueError: it cannot be read, or is not UTF-8 and `invalid` is "error".
    """
    try:
        return decoded(path.read_bytes(), name, invalid)
    except OSError as error:
        raise ValueError(f"source: {name} cannot be read ({error.strerror})") from None


def decoded(data: bytes, name: str, invalid: str) -> str:
    """Returns the text of bytes; see `read_text`."""
    try:
        return data.decode(errors="strict" if invalid == "error" else "replace")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"source: {name} is not UTF-8 at byte {error.start} ({data[error.start]:#04x}); invalid='replace' puts "
            "U+FFFD in place of such bytes"
        ) from None
