"""Manifests: the size and hash of files in a folder, of every file of a checkpoint with facts about it.

The manifest of a folder is hashes.json in it. It also holds the hash of its own content, so that a damaged manifest is
seen too.
"""

import concurrent.futures
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.runs.files import write_atomically

NAME = "hashes.json"
HASH = "blake2b"
DAMAGED = ".damaged"  # suffix of a folder that is not what was written, and is kept for its owner to look at
READERS = 4


def write(folder: Path, facts: Mapping[str, Any]) -> None:
    """Writes the manifest of all files in the folder, with `facts` as JSON, and flushes it to disk."""
    save(folder, dict(facts) | {"files": _describe(folder, _files(folder))})


def save(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes a manifest, with its own hash, and flushes it to disk."""
    content = {"record": record, HASH: _digest_of(record)}
    write_atomically(folder / NAME, json.dumps(content, indent=1, allow_nan=False) + "\n")


def describe(content: bytes) -> dict[str, Any]:
    """Returns what a manifest says of a file with this content."""
    return {"bytes": len(content), HASH: hashlib.new(HASH, content).hexdigest()}


def read(folder: Path) -> dict[str, Any] | None:
    """Returns the facts and, as "files", the descriptions of the files; None if the folder has no manifest.

    Raises:
      ValueError: if the manifest is damaged.
      OSError: if it cannot be read.
    """
    try:
        content = json.loads((folder / NAME).read_bytes())
        record, digest = content["record"], content[HASH]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{NAME} is damaged ({type(error).__name__}: {error})") from None
    if digest != _digest_of(record):
        raise ValueError(f"{NAME} is damaged: its content has another hash")
    return record


def problem(folder: Path, record: Mapping[str, Any]) -> str | None:
    """Returns how the files of the folder differ from what a manifest says of them, or None."""
    expected = record["files"]
    try:
        if missing := sorted(expected.keys() - set(_files(folder))):
            return f"{missing[0]} is missing"
        for name, found in _describe(folder, list(expected)).items():
            if found != expected[name]:
                kind = "size" if found["bytes"] != expected[name]["bytes"] else "content"
                return f"the {kind} of {name} is not what was written"
    except OSError as error:
        return str(error)
    return None


def _files(folder: Path) -> list[str]:
    paths = (Path(root, name) for root, _, names in os.walk(folder) for name in names)
    return sorted(path.relative_to(folder).as_posix() for path in paths if path != folder / NAME)


def _describe(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    def describe(name: str) -> dict[str, Any]:
        with (folder / name).open("rb") as file:
            digest = hashlib.file_digest(file, HASH).hexdigest()
            return {"bytes": os.fstat(file.fileno()).st_size, HASH: digest}

    # Hashing releases Python's global lock.
    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        return dict(zip(names, pool.map(describe, names), strict=True))


def _digest_of(record: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(record, sort_keys=True).encode()).hexdigest()
