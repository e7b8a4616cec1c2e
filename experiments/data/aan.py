"""Pairs of papers of the ACL Anthology Network and whether one cites the other, from Long Range Arena's own files."""

import hashlib
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from experiments.data import cache
from experiments.data.progress import progress
from experiments.data.sequences import Sequences
from experiments.data.text.characters import Encoding, bytes_encoding, characters_encoding

FILES = {
    "train": "new_aan_pairs.train.tsv",
    "validation": "new_aan_pairs.eval.tsv",
    "test": "new_aan_pairs.test.tsv",
}
FIELDS = ("label", "id 1", "id 2", "text 1", "text 2")
LABELS = {b"0.0": 0, b"1.0": 1, b"0": 0, b"1": 1}
# The printable characters of ASCII. With <pad>, <unk> and <eos> they are the 98 that S4 and S5 find in the files.
CHARACTERS = tuple(chr(code) for code in range(0x20, 0x7F))
VERSION = 1


def load(
    official_dir: str | os.PathLike,
    *,
    vocabulary: str,
    length: int,
    data_dir: str | os.PathLike | None = None,
) -> cache.Dataset:
    """Returns the splits "train", "validation" and "test", read on first use and cached.

    Each pair is two sequences, one after the other, with the label of the pair.

    Args:
      official_dir: folder with new_aan_pairs.train.tsv, .eval.tsv and .test.tsv (`tsv_data` of the release).
      vocabulary: "bytes" or "characters" (see `data.text.characters`).
      length: most ids of a document.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if a line is not a label, two names and two texts between tabs; names file and line.
    """
    folder = cache.expand("official_dir", official_dir)
    paths = {split: folder / name for split, name in FILES.items()}
    if missing := [path.name for path in paths.values() if not path.is_file()]:
        raise FileNotFoundError(
            f"official_dir={str(folder)!r} lacks {', '.join(missing)}; unpack the Retrieval files of the Long Range Arena "
            "release and give the folder tsv_data"
        )
    encoding = bytes_encoding(length) if vocabulary == "bytes" else characters_encoding(CHARACTERS, length)

    def build() -> dict[str, Sequences]:
        return {split: Sequences.from_records(_records(path, encoding)) for split, path in paths.items()}

    recipe = cache.Recipe(
        name="aan",
        version=VERSION,
        parameters=dict(
            vocabulary=vocabulary,
            length=length,
            files={path.name: _sha256(path) for path in paths.values()},
        ),
        vocabulary=encoding.vocabulary,
        rebuild=f"python -m experiments.data.prepare aan --vocabulary={vocabulary} --length={length} "
        f"--official_dir={shlex.quote(str(folder))}",
    )
    return cache.load_or_build(recipe, build, data_dir=data_dir)


def _records(path: Path, encoding: Encoding) -> Iterator[tuple[bytes, int]]:
    count = 0
    with path.open("rb") as file, progress(f"Reading {path.name}", None, "pairs") as bar:
        for number, line in enumerate(file, start=1):
            try:
                label, *texts = _parse(line.removesuffix(b"\n").removesuffix(b"\r"))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
            for text in texts:
                yield encoding.encode(text).tobytes(), label
            count += 1
            bar.update(1)
    if not count:
        raise ValueError(f"{path} has no pairs; expected lines of {', '.join(FIELDS)}")


def _parse(line: bytes) -> tuple[int, str, str]:
    """Returns label and texts of a line; quotes have no meaning. A text without characters is one space."""
    fields = line.split(b"\t")
    if len(fields) != len(FIELDS):
        raise ValueError(f"expected {', '.join(FIELDS)} between tabs, got {len(fields)} fields")
    if fields[0] not in LABELS:
        raise ValueError(f"the label must be 0.0 or 1.0, got {fields[0][:20]!r}")
    texts = []
    for name, content in zip(FIELDS[3:], fields[3:], strict=True):
        try:
            texts.append(content.decode() or " ")
        except UnicodeDecodeError as error:
            byte = content[error.start]
            raise ValueError(f"byte {error.start + 1} of {name}, {byte:#04x}, is no UTF-8 text") from None
    return LABELS[fields[0]], *texts


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
