"""Documents of a corpus by split: the sources of the standard library, text files, JSON lines, parquet, FASTA, and published corpora.

Published corpora have splits of their own (see `official` and `tensorflow_datasets`). Of others, a document belongs to the split that the
SHA-256 of its name says: 90% to "train" and 5% each to "validation" and "test". It stays there when others come and go. The name of a file is
its path within the corpus; a record of JSON lines, parquet or FASTA is named by its text, so that equal records share a split. A corpus that
is one text file is cut once after 90% and once after 95% of its lines.
"""

import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from experiments.data.cache import expand
from experiments.data.text import nucleotides, official, tensorflow_datasets
from experiments.data.text.documents import SPLITS, Documents, by_hash, by_lines, decoded, read_text

RECORDS = (".jsonl", ".parquet", *nucleotides.FASTA)
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


def read_documents(
    source: str | os.PathLike, *, invalid: str = "error", official_dir: str | os.PathLike | None = None
) -> Documents:
    """Returns the documents of each split, ordered by path; empty ones are left out.

    Args:
      source: "stdlib", the *.py files of the running Python's standard library without tests, IDLE, lib2to3, tables of
        encodings and generated documentation; or the path of a text file, of a file of JSON lines with the field "text",
        of a parquet file with the column "text", of a FASTA file (.fa, .fasta or .fna; see `nucleotides`), or of a folder with
        such files at any depth. Published corpora are "enwik8", "text8", "wikitext103" and "rfc" (see `official`), and "tfds:NAME" or
        "tfds:NAME/CONFIG", such as tfds:pg19 (see `tensorflow_datasets`).
      invalid: "error" refuses bytes that are not UTF-8, and "replace" puts U+FFFD in their place.
      official_dir: where the files of a published corpus are; other sources take none.

    Raises:
      ValueError: if the source cannot be read, is not UTF-8, leaves a split empty, or needs the library `pyarrow` where it
        is not installed.
    """
    if invalid not in INVALID:
        raise ValueError(f"invalid={invalid!r}; expected one of {', '.join(INVALID)}")
    given = os.fspath(source)
    published = given in official.CORPORA or given.startswith(tensorflow_datasets.PREFIX)
    if official_dir is not None and not published:
        known = f"{', '.join(official.CORPORA)} and {tensorflow_datasets.PREFIX}NAME"
        raise ValueError(
            f"official_dir={str(official_dir)!r} with source={given!r}; it has a meaning for {known}"
        )
    if given in official.CORPORA:
        documents = official.read(given, official_dir, invalid)
    elif published:
        documents = tensorflow_datasets.read(given, official_dir, invalid)
    elif given == "stdlib":
        documents = by_hash(_stdlib(invalid))
    else:
        path = expand("source", given)
        if not path.exists():
            raise ValueError(
                f"source={given!r} is no file or folder; expected stdlib, a path, {', '.join(official.CORPORA)} or tfds:NAME"
            )
        if path.is_file() and path.suffix not in RECORDS:
            documents = by_lines(read_text(path, path.name, invalid))
        else:
            documents = by_hash(_files(path, invalid))
    if not any(documents.values()):
        raise ValueError(f"source={given!r} has no text; expected files that are not empty")
    if empty := [split for split in SPLITS if not documents[split]]:
        count = sum(map(len, documents.values()))
        raise ValueError(
            f"source={given!r} has {count} documents, none of them in the split {empty[0]!r}; give more documents, "
            "or one text file, which is cut into splits"
        )
    return documents


def _stdlib(invalid: str) -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in _ordered(root, NOT_STDLIB):
        if path.suffix == ".py":
            name = path.relative_to(root).as_posix()
            yield name, read_text(path, name, invalid)


def _files(path: Path, invalid: str) -> Iterator[tuple[str, str]]:
    root, paths = (path, _ordered(path)) if path.is_dir() else (path.parent, [path])
    for file in paths:
        name = file.relative_to(root).as_posix()
        if file.suffix in RECORDS:
            read = {".jsonl": _json_lines, ".parquet": _parquet}.get(file.suffix, _fasta)
            for text in read(file, name, invalid):
                yield text, text
        else:
            yield name, read_text(file, name, invalid)


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


def _fasta(path: Path, name: str, invalid: str) -> Iterator[str]:
    return nucleotides.read_fasta(read_text(path, name, invalid), name)


def _json_lines(path: Path, name: str, invalid: str) -> Iterator[str]:
    for number, line in enumerate(read_text(path, name, invalid).split("\n"), start=1):
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
            yield decoded(data, f"{name}, row {number}", invalid)
