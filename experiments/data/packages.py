"""Excerpts of the Python sources of installed packages, labelled by package: stand-ins for data that have to be downloaded.

The packages are those that the project itself needs. The files of a package are divided between the splits, so that no file
is in two of them; a file is cut into pieces of equal numbers of bytes. Another version of a package gives other data, which the
manifest tells.
"""

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from experiments.data import cache
from experiments.data.sequences import Sequences
from experiments.data.text.characters import BYTES

PACKAGES = ("flax", "fontTools", "jax", "matplotlib", "numpy", "orbax", "scipy", "tensorflow_datasets")
DISTRIBUTIONS = {"fontTools": "fonttools", "orbax": "orbax-checkpoint"}
TESTS = {"tests", "test", "testing"}
LEAST = 256  # bytes of a piece, of which the last of a file is one only if it is that long
SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}
PER_PACKAGE = {"train": 600, "validation": 75, "test": 75}
VERSION = 1


@dataclasses.dataclass(frozen=True)
class Piece:
    """A piece of a file; `file` counts the files of all packages."""

    text: bytes
    package: int
    file: int


def load_text(*, length: int, data_dir: str | os.PathLike | None = None) -> cache.Dataset:
    """Returns pieces of `length` bytes and the number of their package in `PACKAGES`, equally many of each."""
    pieces = read(length)

    def build() -> dict[str, Sequences]:
        return {split: _sequences(found, [p.package for p in found]) for split, found in pieces.items()}

    return _load("package_text", build, pieces, dict(length=length), data_dir)


def load_pairs(*, length: int, seed: int, data_dir: str | os.PathLike | None = None) -> cache.Dataset:
    """Returns pairs of pieces of different files: each piece with one of its package (1) and one of another (0).

    The two of a pair follow each other, both with the label of the pair.
    """
    pieces = read(length)

    def build() -> dict[str, Sequences]:
        splits = {}
        for number, (split, found) in enumerate(pieces.items()):
            draws = np.random.Philox(np.random.SeedSequence([seed, number]))
            pairs = [
                (piece, found[index], label)
                for piece, partners in zip(found, _partners(found, draws), strict=True)
                for label, index in enumerate(partners)
            ]
            rows = [piece for one, other, _ in pairs for piece in (one, other)]
            splits[split] = _sequences(rows, [label for _, _, label in pairs for _ in range(2)])
        return splits

    return _load("package_pairs", build, pieces, dict(length=length, seed=seed), data_dir)


def _partners(pieces: list[Piece], draws: np.random.Philox) -> Iterator[tuple[int, int]]:
    """Yields, for each piece, the index of one of another package and of one of its own package from another file."""
    package, file = (np.array([getattr(piece, name) for piece in pieces]) for name in ("package", "file"))
    for piece in pieces:
        others = np.flatnonzero(package != piece.package)
        own = np.flatnonzero((package == piece.package) & (file != piece.file))
        drawn = draws.random_raw(2)
        yield int(others[drawn[0] % len(others)]), int(own[drawn[1] % len(own)])


def read(length: int) -> Mapping[str, list[Piece]]:
    """Returns the pieces of each split, equally many of every package.

    Raises:
      ValueError: if a package is not installed, or has too few files.
    """
    pieces: dict[str, list[Piece]] = {split: [] for split in SHARES}
    count = 0
    for number, name in enumerate(PACKAGES):
        files = _files(name)
        for split, contents in _divided(files).items():
            found = [
                Piece(content[start : start + length], number, count + place)
                for place, content in contents
                for start in range(0, len(content), length)
                if len(content) - start >= min(LEAST, length)
            ]
            wanted = PER_PACKAGE[split]
            chosen = [found[index * len(found) // wanted] for index in range(wanted)] if found else []
            if len(found) < wanted or len({piece.file for piece in chosen}) < 2:
                raise ValueError(
                    f"the package {name} has {len(found)} pieces of {length} bytes in the split {split!r}; expected at "
                    f"least {wanted} from two files or more: a smaller task.length gives more"
                )
            pieces[split] += chosen
        count += len(files)
    return pieces


def _files(name: str) -> list[bytes]:
    """Returns the contents of the sources of a package without its tests, in the order of the hashes of their paths."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ValueError(
            f"the package {name} is not installed; its sources are a part of this data set: pip install {_distribution(name)}"
        )
    found = {}
    for root in map(Path, spec.submodule_search_locations or []):
        for path in root.rglob("*.py"):
            place = path.relative_to(root)
            if not TESTS.intersection(place.parts) and not path.stem.endswith(("_test", "_pb2")):
                key = hashlib.sha256(f"{name}/{place.as_posix()}".encode()).digest()
                found[key] = path.read_bytes().decode(errors="replace").encode()
    return [found[key] for key in sorted(found)]


def _divided(files: list[bytes]) -> dict[str, list[tuple[int, bytes]]]:
    """Returns the files of each split with their places; splits take files until they have their share of the bytes."""
    bounds = np.cumsum(list(SHARES.values()))
    ends = np.cumsum([len(content) for content in files])
    # By the middle of each file, so that a large one does not leave a split empty.
    middles = (ends - np.array([len(content) for content in files]) / 2) / ends[-1]
    split_of = np.searchsorted(bounds[:-1], middles)
    return {
        split: [(place, content) for place, content in enumerate(files) if split_of[place] == number]
        for number, split in enumerate(SHARES)
    }


def _sequences(pieces: list[Piece], labels: list[int]) -> Sequences:
    texts = (np.frombuffer(piece.text, np.uint8) + np.uint8(1) for piece in pieces)
    return Sequences.from_records((ids.tobytes(), label) for ids, label in zip(texts, labels, strict=True))


def _load(name, build, pieces, options, data_dir) -> cache.Dataset:
    digest = hashlib.sha256()
    for split, found in pieces.items():
        for piece in found:
            digest.update(f"{split} {piece.package} {piece.file} {len(piece.text)}\n".encode())
            digest.update(piece.text)
    versions = {package: importlib.metadata.version(_distribution(package)) for package in PACKAGES}
    recipe = cache.Recipe(
        name=name,
        version=VERSION,
        parameters=options | dict(pieces=digest.hexdigest(), packages=versions),
        vocabulary=BYTES,
        rebuild=" ".join(
            [
                "python -m experiments.data.prepare",
                name,
                *(f"--{key}={value}" for key, value in options.items()),
            ]
        ),
    )
    return cache.load_or_build(recipe, build, data_dir=data_dir)


def _distribution(package: str) -> str:
    return DISTRIBUTIONS.get(package, package)
