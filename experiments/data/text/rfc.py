"""The Requests for Comments of the Internet, 500 MB of technical English that Debian's packages doc-rfc-* carry.

A document is the text of one RFC, a file rfcN.txt or rfcN.txt.gz at any depth of a folder, such as /usr/share/doc/RFC after
`apt-get install doc-rfc` (section non-free). A number that has several files, say an older text under `old` or a link, counts once: the
file whose path within the folder is first. Splits follow from the numbers (see `documents.split_of`).
"""

import gzip
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from experiments.data.text.documents import Documents, by_hash, decoded

NAME = re.compile(r"(rfc[1-9]\d*)\.txt(\.gz)?")


def read(root: Path, invalid: str) -> Documents:
    """Returns the documents of a folder by split, ordered by number; `invalid` is that of `sources.read_documents`.

    Raises:
      ValueError: no folder, a folder without such files, or a file that cannot be read or is not UTF-8.
    """
    if not root.is_dir():
        raise ValueError(
            f"official_dir={str(root)!r} is no folder; expected one with rfc1.txt.gz and the like at any depth"
        )
    found: dict[str, Path] = {}
    for path in sorted(root.rglob("rfc*.txt*"), key=lambda path: path.relative_to(root).as_posix()):
        if (match := NAME.fullmatch(path.name)) and path.is_file():
            found.setdefault(match[1], path)
    if not found:
        raise ValueError(f"official_dir={str(root)!r} has no file rfcN.txt or rfcN.txt.gz at any depth")
    return by_hash(_texts(found, invalid))


def _texts(found: dict[str, Path], invalid: str) -> Iterator[tuple[str, str]]:
    for name in sorted(found, key=lambda name: int(name.removeprefix("rfc"))):
        yield name, decoded(_bytes(found[name]), found[name].name, invalid)


def _bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"source: {path.name} cannot be read ({error})") from None
