"""Data sets on disk: built once, as array_record files beside a manifest that every load checks.

A data set is a folder `NAME-vVERSION-HASH` with one `SPLIT.array_record` per split and `manifest.json`; HASH depends on
its parameters. A record is the label (int32, little-endian) followed by the tokens (of the manifest's `token_dtype`,
little-endian). Records are compressed individually (group size 1), so that other readers have fast random access too. A
whole split is read into memory: Long Range Arena's ListOps takes 100 MB.

The manifest names generator, version, parameters and vocabulary, counts the records, and gives the size and SHA-256
of every file and the SHA-256 of the content (`fingerprint.content_sha256`), which does not depend on the file format.
It holds no times or machine names: equal data sets have equal manifests.
"""

import contextlib
import contextvars
import dataclasses
import hashlib
import json
import os
import secrets
import shlex
import shutil
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module

from experiments.data.fingerprint import content_sha256
from experiments.data.sequences import Sequences

FORMAT = 1  # increment when the encoding of records or the manifest changes
MANIFEST = "manifest.json"
WRITER_OPTIONS = "group_size:1,zstd:1"
LABEL = struct.Struct("<i")
STALE_SECONDS = 24 * 3600
_BUILDS: contextvars.ContextVar[contextlib.ExitStack | None] = contextvars.ContextVar("_BUILDS", default=None)


class CorruptCacheError(RuntimeError):
    """A data set on disk does not match its manifest or the request."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The definition of a data set, and hence of the content of its cache.

    Attributes:
      name: name of the generator, the start of the folder's name.
      version: version of the generator; equal version and parameters must give equal data.
      parameters: all parameters that determine the content, as JSON values.
      vocabulary: token of each id.
      rebuild: command that builds the data set, for error messages; `--data_dir` is appended.
      token_dtype: dtype of the stored tokens, "uint8", "uint16" or "int32".
    """

    name: str
    version: int
    parameters: Mapping[str, Any]
    vocabulary: tuple[str, ...]
    rebuild: str
    token_dtype: str = "uint8"

    @property
    def folder_name(self) -> str:
        digest = hashlib.sha256(json.dumps(self.parameters, sort_keys=True).encode()).hexdigest()
        return f"{self.name}-v{self.version}-{digest[:12]}"

    def manifest(self) -> dict[str, Any]:
        """Returns the part of the manifest that is known without the data."""
        fields = dict(
            format=FORMAT,
            name=self.name,
            version=self.version,
            parameters=dict(self.parameters),
            vocabulary=list(self.vocabulary),
            token_dtype=self.token_dtype,
        )
        return json.loads(json.dumps(fields))  # as a reader of the file sees it, with tuples as lists


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set: splits in memory, the manifest, and the folder of both."""

    splits: dict[str, Sequences]
    manifest: dict[str, Any]
    folder: Path


def data_root(data_dir: str | os.PathLike | None = None) -> Path:
    """Returns the folder of data sets: `data_dir`, else $SEQMODELS_DATA, else ~/.cache/seqmodels."""
    return expand("data_dir", data_dir or os.environ.get("SEQMODELS_DATA") or "~/.cache/seqmodels").absolute()


def expand(name: str, folder: str | os.PathLike) -> Path:
    """Returns the path of the file or folder that the option `name` gives, with ~ replaced.

    Raises:
      ValueError: it is empty, or the home directory does not exist.
    """
    if not str(folder).strip():
        raise ValueError(f"{name}={str(folder)!r} names no file or folder")
    try:
        return Path(folder).expanduser()
    except RuntimeError:
        raise ValueError(f"{name}={str(folder)!r}; there is no such home directory") from None


def load_or_build(
    recipe: Recipe,
    build: Callable[[], Mapping[str, Sequences]],
    *,
    data_dir: str | os.PathLike | None = None,
) -> Dataset:
    """Returns the data set of `recipe`, which is built first if its folder does not exist.

    A build is written to a temporary folder, flushed to disk and renamed, so that a folder with the final name is
    always complete. If two processes build at once, both succeed and the first result is kept.

    Raises:
      CorruptCacheError: if the folder exists and its content does not match the recipe.
      OSError: if the folder cannot be made or written.
    """
    root = data_root(data_dir)
    folder = root / recipe.folder_name
    if not folder.exists():
        if (builds := _BUILDS.get()) is not None:
            root = Path(builds.enter_context(tempfile.TemporaryDirectory()))
            folder = root / recipe.folder_name
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"data_dir={str(root)!r} is no folder and cannot be made one ({error.strerror}); give another, or set "
                "$SEQMODELS_DATA"
            ) from None
        _remove_stale(root, recipe.folder_name)
        _write(recipe, build(), folder)
    return load(recipe, folder)


@contextlib.contextmanager
def temporary_builds() -> Iterator[None]:
    """Returns a context in which data sets that are not on disk are built in a temporary folder, which it removes."""
    with contextlib.ExitStack() as builds:
        token = _BUILDS.set(builds)
        try:
            yield
        finally:
            _BUILDS.reset(token)


def load(recipe: Recipe, folder: Path, *, remedy: str | None = None) -> Dataset:
    """Returns the data set of `recipe` in `folder`, after checking it.

    Args:
      remedy: what to do about a damaged folder, for messages; by default to build it again.

    Raises:
      CorruptCacheError: the content does not match; names the file and the fault.
    """
    remedy = remedy or (
        f"Delete the folder {folder}; it is built again when it is next needed, or now by "
        f"`{recipe.rebuild} --data_dir={shlex.quote(str(folder.parent))}`"
    )

    def corrupt(path: Path, problem: str) -> CorruptCacheError:
        return CorruptCacheError(f"{path}: {problem}. {remedy}")

    manifest_file = folder / MANIFEST
    try:
        manifest = json.loads(manifest_file.read_bytes())
        entries = {split: dict(entry) for split, entry in manifest["splits"].items()}
    except OSError as error:
        raise corrupt(manifest_file, f"the manifest cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise corrupt(manifest_file, f"the manifest is damaged ({type(error).__name__}: {error})") from None

    def compare(field: str, expected: Any) -> None:
        if manifest.get(field) != expected:
            found = _short(manifest.get(field))
            raise corrupt(manifest_file, f"{field} is {found}, but it should be {_short(expected)}")

    for field, expected in recipe.manifest().items():
        compare(field, expected)
    splits = {}
    for split, entry in entries.items():
        path = folder / f"{split}.array_record"
        try:
            found = _describe_file(path)
        except OSError as error:
            raise corrupt(path, f"the file cannot be read ({error.strerror})") from None
        if found.items() <= entry.items():  # else the file is damaged, and its records must not be decoded
            splits[split] = _read_records(path, recipe.token_dtype)
            found |= _count(splits[split])
        if entry != found:
            raise corrupt(path, f"the file has {_short(found)}, but the manifest says {_short(entry)}")
    compare("content_sha256", _content(splits))
    if unknown := manifest.keys() - recipe.manifest().keys() - {"splits", "content_sha256"}:
        raise corrupt(manifest_file, f"unknown fields {sorted(unknown)}")
    return Dataset(splits, manifest, folder)


def _short(value: Any, longest: int = 200) -> str:
    text = json.dumps(value)
    return text if len(text) <= longest else text[:longest] + "..."


def _write(recipe: Recipe, splits: Mapping[str, Sequences], folder: Path) -> None:
    temporary = folder.parent / f".{folder.name}.{os.getpid()}-{secrets.token_hex(4)}"
    temporary.mkdir()
    try:
        entries = {}
        for split, sequences in splits.items():
            path = temporary / f"{split}.array_record"
            _write_records(path, sequences)
            entries[split] = _count(sequences) | _describe_file(path)
        manifest = recipe.manifest() | dict(splits=entries, content_sha256=_content(splits))
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        for path in (*temporary.iterdir(), temporary):
            _flush(path)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.exists():
                raise
        _flush(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_records(path: Path, sequences: Sequences) -> None:
    try:
        writer = array_record_module.ArrayRecordWriter(str(path), WRITER_OPTIONS)
        for tokens, label in sequences.records():
            writer.write(LABEL.pack(label) + tokens)
        writer.close()
    except RuntimeError as error:  # array_record's form of an OSError
        raise OSError(f"{path} cannot be written: {str(error).partition(';')[0]}") from None


def _read_records(path: Path, dtype: str) -> Sequences:
    reader = array_record_module.ArrayRecordReader(str(path))
    records = reader.read_all()
    reader.close()
    pairs = [(record[LABEL.size :], LABEL.unpack_from(record)[0]) for record in records]
    return Sequences.from_records(pairs, dtype=dtype)


def _content(splits: Mapping[str, Sequences]) -> str:
    return content_sha256({split: sequences.records() for split, sequences in splits.items()})


def _count(sequences: Sequences) -> dict[str, Any]:
    return dict(records=len(sequences), tokens=len(sequences.tokens))


def _describe_file(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return dict(bytes=path.stat().st_size, sha256=digest)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_stale(root: Path, folder_name: str) -> None:
    """Removes leftovers of killed builds that are too old to belong to a running process."""
    for path in root.glob(f".{folder_name}.*"):
        if time.time() - path.stat().st_mtime > STALE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


def summary(dataset: Dataset) -> str:
    """Returns a readable summary of the manifest."""
    lines = [f"{dataset.manifest['name']} version {dataset.manifest['version']} in {dataset.folder}"]
    lines.append("parameters " + json.dumps(dataset.manifest["parameters"]))
    for split, entry in dataset.manifest["splits"].items():
        lengths = dataset.splits[split].lengths
        lines.append(
            f"{split:<11}{entry['records']:>8} sequences  {entry['tokens']:>12} tokens  length mean "
            f"{lengths.mean():.1f} median {np.median(lengths):.0f} longest {lengths.max()}  {entry['bytes']} bytes"
        )
    lines.append(f"content SHA-256 {dataset.manifest['content_sha256']}")
    return "\n".join(lines)
