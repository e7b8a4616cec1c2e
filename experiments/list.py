"""Lists the mixers, tasks, policies of caches and configs to choose from, one per line, each with a description and its paper.

    python -m experiments.list
    python -m experiments.list mixers --json
    python -m experiments.list caches

The text comes from docstrings. Exit codes: 0 done; 2 there is no such list.
"""

import ast
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from experiments.config.command_line import Parser, reporting
from experiments.config.files import shipped
from experiments.runs.files import to_json_text
from experiments.tasks import TASKS
from layers.caches import CACHES
from layers.mixers import MIXERS

# The form of a paper in a docstring: authors, a year, and usually an identifier.
PAPER = re.compile(r"\s*\(([^()]*\b(?:19|20)\d\d\b[^()]*|(?:arXiv:)?\d{4}\.\d{4,5})\)")


class Entry(NamedTuple):
    """A line of a list; `paper` is None if the docstrings name none."""

    name: str
    description: str
    paper: str | None


def read(name: str, docstrings: Iterable[str | None]) -> Entry:
    """Returns the entry of the first docstring whose first line names a paper, or else of the first docstring.

    Name and paper are removed from a first line "Name: what it is (authors year, where).".
    """
    given = [inspect.cleandoc(text) for text in docstrings if text]
    lines = [text.partition("\n")[0] for text in given]
    chosen = next((line for line in lines if PAPER.search(line)), lines[0] if lines else "")
    papers = (PAPER.search(text) for text in (chosen, *given))
    paper = next((" ".join(found.group(1).split()) for found in papers if found), None)
    sentence = re.sub(r"^[\w .+-]{1,40}: ", "", PAPER.sub("", chosen))
    return Entry(name, sentence.strip().rstrip("."), paper)


def mixers() -> list[Entry]:
    """Returns all names that a pattern may use."""
    entries = []
    for name, (config, module) in sorted(MIXERS.items()):
        sources = dict.fromkeys((module.__doc__, config.__doc__, sys.modules[module.__module__].__doc__))
        entries.append(read(name, (text for text in sources if text and not text.startswith("Options of"))))
    return entries


def tasks() -> list[Entry]:
    """Returns all tasks."""
    return [
        read(name, (task.__doc__, sys.modules[task.__module__].__doc__))
        for name, task in sorted(TASKS.items())
    ]


def caches() -> list[Entry]:
    """Returns all policies of the caches of attention."""
    return [read(name, (policy.__doc__,)) for name, policy in sorted(CACHES.items())]


def configs() -> list[Entry]:
    """Returns all configs, by the path that --config takes."""
    return [
        read(name, [ast.get_docstring(ast.parse(file.read_text("utf-8")))])
        for name, file in shipped().items()
    ]


LISTS: dict[str, Callable[[], list[Entry]]] = {
    "mixers": mixers,
    "tasks": tasks,
    "caches": caches,
    "configs": configs,
}


@reporting
def main(argv: Sequence[str] | None = None) -> int:
    """Prints the lists and returns the exit code."""
    parser = Parser("experiments.list", __doc__)
    parser.add_argument("what", nargs="?", choices=tuple(LISTS), help="all of them if not given")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    chosen = {what: LISTS[what]() for what in ([args.what] if args.what else LISTS)}
    if args.json:
        record = {what: [entry._asdict() for entry in entries] for what, entries in chosen.items()}
        print(to_json_text(record[args.what] if args.what else record), end="")
        return 0
    print(
        "\n\n".join(
            text(entries) if args.what else f"{what}:\n{text(entries)}" for what, entries in chosen.items()
        )
    )
    return 0


def text(entries: Sequence[Entry]) -> str:
    """Returns one line per entry."""
    wide = max((len(entry.name) for entry in entries), default=0)
    return "\n".join(
        f"{entry.name:{wide}}  {entry.description}{f' ({entry.paper})' if entry.paper else ''}".rstrip()
        for entry in entries
    )


if __name__ == "__main__":
    sys.exit(main())
