"""Small files of runs: atomic writes, strict JSON, and errors that name the file and the line.

A reader, or a run after a crash, finds either the old or the new content of a file that is written atomically. Numbers
that are not finite are null in JSON, whose standard has no others.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any


class DamagedFileError(ValueError):
    """A file whose content is not what was written."""


def write_atomically(path: Path, text: str) -> None:
    """Replaces the file by one that holds `text`, which is flushed to disk before it is renamed."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)  # as on a full disk
        raise


def finite(value: Any) -> Any:
    """Returns a JSON value with None in place of each number that is not finite."""
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json_text(value: Any) -> str:
    """Returns indented JSON with a final newline."""
    return json.dumps(finite(value), indent=2, allow_nan=False) + "\n"


def to_json_line(value: Any) -> str:
    """Returns JSON on one line with a final newline."""
    return json.dumps(finite(value), allow_nan=False) + "\n"


def _null(_: str) -> None:
    """Stands for NaN and Infinity, which are no JSON but which Python reads and writes."""


def parse_json(path: Path, content: bytes) -> dict[str, Any]:
    """Returns the object in the content of a JSON file.

    Raises:
      DamagedFileError: if it is not JSON, or no object; names the file and the line.
    """
    try:
        value = json.loads(content.decode("utf-8"), parse_constant=_null)
    except json.JSONDecodeError as error:
        raise DamagedFileError(f"{path}, line {error.lineno}: {error.msg}; the file is damaged") from None
    except UnicodeDecodeError as error:
        raise DamagedFileError(f"{path}: byte {error.start} is not UTF-8; the file is damaged") from None
    if not isinstance(value, dict):
        raise DamagedFileError(f"{path}, line 1: expected an object, {{...}}; the file is damaged")
    return value


def read_json_lines(
    path: Path, fields: Iterable[str] = (), check: Callable[[Any], Any] | None = None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Returns the objects in a file of JSON lines, and a description of each line that is none of them.

    Args:
      path: the file; one that does not exist has no lines.
      fields: names that each object must have.
      check: function that raises ValueError or TypeError for an object that cannot be used.
    """
    records, problems = [], []
    content = path.read_bytes() if path.exists() else b""
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"), parse_constant=_null)
            if not isinstance(record, dict):
                raise ValueError("it is no object")
            if missing := [name for name in fields if name not in record]:
                raise ValueError(f"it has no {missing[0]!r}")
            if check is not None:
                check(record)
            records.append(record)
        except (ValueError, TypeError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            problems.append(f"{path}, line {number}: the line is cut or damaged ({reason})")
    return records, problems


def append_json_lines(path: Path, records: Iterable[Any]) -> None:
    """Adds lines to a file of JSON lines; a cut last line stays a line of its own."""
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write("".join(map(to_json_line, records)).encode())
