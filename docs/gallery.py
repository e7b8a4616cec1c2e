"""The gallery: every committed study with what it found first, its commands, its device and its figures."""

import json
import pathlib
import re
import shlex
from collections.abc import Iterator
from typing import Any, NamedTuple

from docs.repository import RESULTS, ROOT

COMMAND = re.compile(r"(?:\w+=\S+ )*(?:python -m|make) \S.*")


class Study(NamedTuple):
    """A folder of results.

    Attributes:
      name: its path below experiments/results.
      title: the heading of its notes, or its name.
      summary: the first paragraph of its notes.
      commands: what writes it, in the order of its files.
      devices: what it ran on.
      figures: names of its pictures.
    """

    name: str
    title: str
    summary: str
    commands: tuple[str, ...]
    devices: tuple[str, ...]
    figures: tuple[str, ...]


def studies() -> list[Study]:
    """Returns the studies in experiments/results, by name."""
    folders = {file.parent for file in (ROOT / RESULTS).rglob("*") if file.is_file()}
    return [_study(folder) for folder in sorted(folders)]


def page() -> str:
    """Returns the gallery as Markdown, with links to the pages of the studies."""
    return "\n\n".join(section(study) for study in studies())


def section(study: Study) -> str:
    """Returns the part of the gallery that shows a study."""
    parts = [f"## [{study.title}](results/{study.name}/index.md)"]
    if study.devices:
        parts.append(", ".join(study.devices))
    if study.summary:
        parts.append(study.summary)
    if study.commands:
        parts.append("\n".join(f"    {command}" for command in study.commands))
    parts += [f"![{pathlib.Path(name).stem}](results/{study.name}/{name})" for name in study.figures]
    return "\n\n".join(parts)


def _study(folder: pathlib.Path) -> Study:
    name = folder.relative_to(ROOT / RESULTS).as_posix()
    notes = folder / "NOTES.md"
    text = notes.read_text(encoding="utf-8") if notes.exists() else ""
    title, *parts = text.rstrip().split("\n\n")
    records = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    records = [record for record in records if isinstance(record, dict)]
    written = [command for record in records for command in _commands(record)]
    lines = re.sub(r" \\\n\s*", " ", text).splitlines()  # commands on more than one line
    told = [line.strip() for line in lines if line.startswith("    ")]
    devices = [device for record in records for device in _devices(record)]
    return Study(
        name,
        title.removeprefix("# ") or name,
        next((_unlinked(part) for part in parts if part[:1] not in "#| -"), ""),
        tuple(dict.fromkeys([*filter(COMMAND.match, told), *written])),
        tuple(dict.fromkeys(devices)),
        tuple(file.name for file in sorted(folder.glob("*.png"))),
    )


def _commands(record: dict[str, Any]) -> Iterator[str]:
    """The commands that a file of results states: a text, a list of words, or those of its parts."""
    value = record.get("command") or ()
    if isinstance(value, str):
        yield value
    elif value and value[0].startswith("experiments."):
        yield f"python -m {shlex.join(value)}"
    else:
        yield from value
    for parts in (record.get("commands", ()), record.get("runs", ())):
        yield from (part["command"] for part in parts if isinstance(part, dict) and "command" in part)


def _devices(record: dict[str, Any]) -> Iterator[str]:
    for key in ("device", "devices"):
        if isinstance(record.get(key), str):
            yield record[key]


def _unlinked(markdown: str) -> str:
    """Markdown without the targets of its links, which hold on another page."""
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", markdown)
