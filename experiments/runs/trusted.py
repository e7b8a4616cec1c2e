"""The files of a run directory that a resume, an evaluation or a report relies on; their hashes stand in hashes.json.

A file and its hash cannot be replaced at the same moment. hashes.json therefore first allows what is there and what
follows, then the file is replaced, and then only the new content is allowed, so that the process may be killed anywhere
between. A file that hashes.json does not name, as in runs of versions up to 0.2.0, is taken as it is.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.runs import manifests
from experiments.runs.files import DamagedFileError, parse_json, write_atomically

Hashes = dict[str, list[dict[str, Any]]]
RESTORE = f"restore it from a copy, or set it right by hand and delete {manifests.NAME}"


def write(folder: Path, texts: Mapping[str, str], *, finished: Iterable[str] = ()) -> None:
    """Replaces files and their hashes, which are flushed to disk.

    Args:
      folder: the run directory.
      texts: content by name.
      finished: names of files that are complete and stay as they are, whose hashes are added.
    """
    known = _read(folder)
    known |= {name: [manifests.describe((folder / name).read_bytes())] for name in finished}
    new = {name: [manifests.describe(text.encode())] for name, text in texts.items()}
    _save(folder, known | {name: [*new[name], *_present(folder / name)] for name in texts})
    for name, text in texts.items():
        write_atomically(folder / name, text)
    _save(folder, known | new)


def begin(folder: Path, texts: Mapping[str, str]) -> None:
    """Writes the files of a new run, whatever hashes.json says of an earlier one that gives way to it."""
    (folder / manifests.NAME).unlink(missing_ok=True)
    write(folder, texts)


def forget(folder: Path, name: str) -> None:
    """Removes the hash of a file that is about to grow."""
    known = _read(folder)
    if known.pop(name, None) is not None:
        _save(folder, known)


def read_json(path: Path, remedy: str = RESTORE) -> dict[str, Any] | None:
    """Returns the object that a JSON file of a run directory holds, or None if there is no such file.

    Raises:
      DamagedFileError: if it is not what was written, or hashes.json is damaged; ends with the remedy.
    """
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        parsed = parse_json(path, content)
    except DamagedFileError as error:
        raise DamagedFileError(f"{error}; {remedy}") from None
    if problem := _problem(path, content):
        raise DamagedFileError(f"{problem}; {remedy}")
    return parsed


def problem(path: Path) -> str | None:
    """Returns how a file differs from what was written, or None; None also if it has no hash.

    Raises:
      DamagedFileError: if hashes.json is damaged.
    """
    return _problem(path, path.read_bytes()) if path.exists() else None


def _problem(path: Path, content: bytes) -> str | None:
    allowed = _read(path.parent).get(path.name)
    if allowed is None or manifests.describe(content) in allowed:
        return None
    return f"{path} is not what was written: it is damaged, or was changed by hand"


def _present(path: Path) -> list[dict[str, Any]]:
    return [manifests.describe(path.read_bytes())] if path.exists() else []


def _read(folder: Path) -> Hashes:
    try:
        record = manifests.read(folder)
    except ValueError as error:
        raise DamagedFileError(
            f"{folder / manifests.NAME}: {error}; delete it, and the files beside it are taken unchecked"
        ) from None
    return {} if record is None else dict(record["files"])


def _save(folder: Path, hashes: Hashes) -> None:
    manifests.save(folder, {"files": hashes})
