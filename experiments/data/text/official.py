"""enwik8, text8 and WikiText-103 from their official archives, with the splits of the published results, and the RFCs.

enwik8 and text8 (Mahoney 2006, mattmahoney.net/dc/text.html) are 10^8 bytes of Wikipedia: as it is, and with 27 characters. The
first 90 million bytes are "train", the next 5 million "validation", the last 5 million "test", one document each. A cut
that would fall into a character of UTF-8 moves to its beginning, by at most 3 bytes.

WikiText-103 (Merity et al. 2016, arXiv:1609.07843) is files wiki.train, wiki.valid and wiki.test, of tokens (words, rare ones as
<unk>) or raw. A document is an article: it begins at a heading of the first level, " = Title = ", between empty lines.

The RFCs, a folder of texts, have no published splits; see `rfc`.
"""

import itertools
import os
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from experiments.data.cache import expand
from experiments.data.text import rfc
from experiments.data.text.documents import SPLITS, Documents, decoded

CORPORA = ("enwik8", "text8", "wikitext103", "rfc")
SIZE, CUTS = 100_000_000, (90_000_000, 95_000_000)  # bytes of enwik8 and text8
WIKITEXT = tuple(zip(SPLITS, ("wiki.train", "wiki.valid", "wiki.test"), strict=True))
FORMS = (".tokens", ".raw")
HEADING = re.compile(r" = (?!= ).* = ?")


def read(corpus: str, official_dir: str | os.PathLike | None, invalid: str) -> Documents:
    """Returns the documents of a corpus by split.

    Args:
      corpus: one of `CORPORA`.
      official_dir: the archive (enwik8.zip, text8.zip, wikitext-103-v1.zip, wikitext-103-raw-v1.zip), the file that it
        holds, or the folder of either; the folder of the RFCs.
      invalid: see `sources.read_documents`.

    Raises:
      ValueError: it is not given, is not the corpus, or has another size; names the file and the fault.
    """
    if official_dir is None:
        raise ValueError(
            f"source={corpus!r} needs official_dir (task.official_dir in configs), the official archive or the folder of "
            "its files; it is not downloaded"
        )
    path = expand("official_dir", official_dir)
    if not path.exists():
        raise ValueError(
            f"official_dir={str(path)!r} does not exist; expected the archive or folder of {corpus}"
        )
    if corpus == "rfc":
        return rfc.read(path, invalid)
    if corpus == "wikitext103":
        return _wikitext(path, invalid)
    names = (corpus, f"{corpus}.zip")
    if path.is_dir():
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise ValueError(f"official_dir={str(path)!r} has neither {' nor '.join(names)}")
        path = found[0]
    data = _member(path, corpus) if path.suffix == ".zip" else _bytes(path)
    return _hundred_million(corpus, path.name, data, invalid)


def _hundred_million(corpus: str, name: str, data: bytes, invalid: str) -> Documents:
    if len(data) != SIZE:
        raise ValueError(f"source={corpus!r}: {name} has {len(data)} bytes; expected {SIZE}")
    if corpus == "text8":
        codes = np.frombuffer(data, np.uint8)
        wrong = (codes != ord(" ")) & ((codes < ord("a")) | (codes > ord("z")))
        if wrong.any():
            place = int(np.argmax(wrong))
            raise ValueError(
                f"source={corpus!r}: {name} has {data[place : place + 1]!r} at byte {place}; expected a to z and spaces"
            )
    bounds = [0, *(_beginning(data, cut) for cut in CUTS), SIZE]
    return {
        split: [decoded(data[start:stop], f"{name}, {split}", invalid)]
        for split, (start, stop) in zip(SPLITS, itertools.pairwise(bounds), strict=True)
    }


def _beginning(data: bytes, place: int) -> int:
    """Returns the place of the first byte of the character of UTF-8 at a place."""
    return next((at for at in range(place, max(place - 4, 0), -1) if data[at] & 0xC0 != 0x80), place)


def _wikitext(path: Path, invalid: str) -> Documents:
    names = {split: [stem + form for form in FORMS] for split, stem in WIKITEXT}
    if path.is_dir():
        there = {name for choices in names.values() for name in choices if (path / name).is_file()}
    elif path.suffix == ".zip":
        members = _members(path)
        there = {name for choices in names.values() for name in choices if name in members}
    else:
        raise ValueError(
            f"official_dir={str(path)!r} is no folder and no .zip; expected wikitext-103-v1.zip, wikitext-103-raw-v1.zip "
            "or the folder of its files"
        )
    forms = {Path(name).suffix for name in there}
    if len(forms) > 1:
        raise ValueError(
            f"official_dir={str(path)!r} has files of tokens and raw ones; expected those of one archive"
        )
    form = forms.pop() if forms else FORMS[0]
    if missing := [stem + form for _, stem in WIKITEXT if stem + form not in there]:
        raise ValueError(f"official_dir={str(path)!r} lacks {', '.join(missing)}")
    documents = {}
    for split, stem in WIKITEXT:
        name = stem + form
        data = _bytes(path / name) if path.is_dir() else _member(path, name)
        documents[split] = list(_articles(decoded(data, name, invalid).splitlines(keepends=True), name))
    return documents


def _articles(lines: list[str], name: str) -> Iterator[str]:
    """Yields the articles, whose lines are together those given."""
    starts = [
        number
        for number, line in enumerate(lines)
        if HEADING.fullmatch(line.rstrip("\n"))
        and all(not lines[near].strip() for near in (number - 1, number + 1) if 0 <= near < len(lines))
    ]
    if not starts:
        raise ValueError(f"source='wikitext103': {name} has no heading of an article, such as ' = Title = '")
    for start, stop in itertools.pairwise([0, *starts[1:], len(lines)]):
        yield "".join(lines[start:stop])


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"source: {path.name} cannot be read ({error.strerror})") from None


def _members(path: Path) -> dict[str, str]:
    """Returns the paths of the files of an archive by their names."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {Path(name).name: name for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"source: {path.name} is no readable .zip ({error})") from None


def _member(path: Path, name: str) -> bytes:
    """Returns the content of a file of an archive."""
    members = _members(path)
    if name not in members:
        raise ValueError(f"source: {path.name} lacks {name}; it has {_few(members)}")
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(members[name])
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"source: {path.name}: {name} is damaged ({error})") from None
    except RuntimeError as error:  # a password, or a compression that zipfile does not know
        raise ValueError(
            f"source: {path.name}: {name} cannot be unpacked here ({error}); unpack it and give the folder"
        ) from None


def _few(names: Iterable[str]) -> str:
    names = [name for name in names if name]
    return ", ".join(names[:5]) + ", ..." * (len(names) > 5) if names else "no files"
