"""Documents of a corpus by split: the sources of the standard library, text files, JSON lines and parquet.

A document belongs to the split that the SHA-256 of its name says: 90% to "train" and 5% each to "validation" and "test".
It stays there when others come and go. The name of a file is its path within the corpus; a record of JSON lines or
parquet is named by its text, so that equal records share a split. A corpus that is one text file is cut once after 90%
and once after 95% of its lines.
"""

import hashlib
import itertools
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from experiments.data.cache import expand

SPLITS = ("train", "validation", "test")
SHARES = (0.90, 0.95)  # where validation and test begin
RECORDS = (".jsonl", ".parquet")
INVALID = ("error", "replace")
# What is no code of the library (installed packages), tests of it, or tables and texts that programs wrote.
NOT_STDLIB = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "idlelib",
    "lib2to3",
    "encodings",
    "pydoc_data",
}

Documents = dict[str, list[str]]


def read_documents(source: str | os.PathLike, *, invalid: str = "error") -> Documents:
    """Returns the documents of each split, ordered by path; empty ones are left out.

    Args:
      source: "stdlib", the *.py files of the running Python's standard library without tests, IDLE, lib2to3, tables of
        encodings and generated documentation; or the path of a text file, of a file of JSON lines with the field "text",
        of a parquet file with the column "text", or of a folder with such files at any depth.
      invalid: "error" refuses bytes that are not UTF-8, and "replace" puts U+FFFD in their place.

    Raises:
      ValueError: if the source cannot be read, is not UTF-8, leaves a split empty, or needs the library `pyarrow` where it
        is not installed.
    """
    if invalid not in INVALID:
        raise ValueError(f"invalid={invalid!r}; expected one of {', '.join(INVALID)}")
    given = os.fspath(source)
    if given == "stdlib":
        documents = _split(_stdlib(invalid))
    else:
        path = expand("source", given)
        if not path.exists():
            raise ValueError(f"source={given!r} is no file or folder; expected stdlib or a path")
        if path.is_file() and path.suffix not in RECORDS:
            documents = _cut(_text(path, path.name, invalid))
        else:
            documents = _split(_files(path, invalid))
    if not any(documents.values()):
        raise ValueError(f"source={given!r} has no text; expected files that are not empty")
    if empty := [split for split in SPLITS if not documents[split]]:
        count = sum(map(len, documents.values()))
        raise ValueError(
            f"source={given!r} has {count} documents, none of them in the split {empty[0]!r}; give more documents, "
            "or one text file, which is cut into splits"
        )
    return documents


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


def _split(named: Iterable[tuple[str, str]]) -> Documents:
    documents: Documents = {split: [] for split in SPLITS}
    for name, text in named:
        if text:
            documents[split_of(name)].append(text)
    return documents


def _cut(text: str) -> Documents:
    lines = text.splitlines(keepends=True)
    bounds = [0, *(int(share * len(lines)) for share in SHARES), len(lines)]
    parts = ("".join(lines[start:stop]) for start, stop in itertools.pairwise(bounds))
    return {split: [part] if part else [] for split, part in zip(SPLITS, parts, strict=True)}


def _stdlib(invalid: str) -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in _ordered(root, NOT_STDLIB):
        if path.suffix == ".py":
            name = path.relative_to(root).as_posix()
            yield name, _text(path, name, invalid)


def _files(path: Path, invalid: str) -> Iterator[tuple[str, str]]:
    root, paths = (path, _ordered(path)) if path.is_dir() else (path.parent, [path])
    for file in paths:
        name = file.relative_to(root).as_posix()
        if file.suffix in RECORDS:
            read = _json_lines if file.suffix == ".jsonl" else _parquet
            for text in read(file, name, invalid):
                yield text, text
        else:
            yield name, _text(file, name, invalid)


def _ordered(root: Path, left_out: Iterable[str] = ()) -> list[Path]:
    """Returns the files under a folder by path, without hidden files and folders."""
    left_out, found = set(left_out), []
    for folder, folders, names in os.walk(root):
        folders[:] = [
            name
            for name in folders
            if not name.startswith((".", "__pycache__", "config-")) and name not in left_out
        ]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _text(path: Path, name: str, invalid: str) -> str:
    try:
        return _decoded(path.read_bytes(), name, invalid)
    except OSError as error:
        raise ValueError(f"source: {name} cannot be read ({error.strerror})") from None


def _decoded(data: bytes, name: str, invalid: str) -> str:
    try:
        return data.decode(errors="strict" if invalid == "error" else "replace")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"source: {name} is not UTF-8 at byte {error.start} ({data[error.start]:#04x}); invalid='replace' puts "
            "U+FFFD in place of such bytes"
        ) from None


def _json_lines(path: Path, name: str, invalid: str) -> Iterator[str]:
    for number, line in enumerate(_text(path, name, invalid).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
            text.encode()  # JSON can escape half a surrogate pair, which no UTF-8 stands for
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(
                f'source: {name}, line {number}: expected an object with the string "text"'
            ) from None
        yield text


def _parquet(path: Path, name: str, invalid: str) -> Iterator[str]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError(
            f"source: {name} needs the library pyarrow: pip install 'jax-seqmodels[text]'; text files and JSON lines need "
            "nothing"
        ) from None
    try:
        column = parquet.read_table(path, columns=["text"]).column("text")
    except (ArrowException, OSError, KeyError) as error:
        raise ValueError(f'source: {name} is no parquet file with the column "text": {error}') from None
    for number, data in enumerate(column.cast("binary").to_pylist()):
        if data is not None:
            yield _decoded(data, f"{name}, row {number}", invalid)
