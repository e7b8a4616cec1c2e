"""The record of a study whose rows come one after the other."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.runs.files import to_json_text, write_atomically
from experiments.runs.sessions import git_revision, versions


class Record:
    """The rows of a study, with its command and versions: each row is printed, and written with all before it.

    An interrupted study keeps its rows.

    Attributes:
      rows: the rows so far.
    """

    def __init__(
        self,
        path: Path,
        compared: Callable[[dict[str, Any], Sequence[dict[str, Any]]], dict[str, Any]],
        line: Callable[[dict[str, Any]], str],
        **known: Any,
    ):
        """Creates a record without rows, and the folder of its file.

        Args:
          path: the JSON file.
          compared: function that returns a row with what follows from it and the rows before it.
          line: function that returns the text of a row.
          known: what else the file holds, such as the device.
        """
        self.rows: list[dict[str, Any]] = []
        self._path, self._compared, self._line = path, compared, line
        self._content: dict[str, Any] = dict(
            command=["experiments.benchmark", *sys.argv[1:]], **known, versions=versions(), git=git_revision()
        )
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, row: dict[str, Any]) -> None:
        """Adds a row."""
        self.rows.append(self._compared(row, tuple(self.rows)))
        print(self._line(self.rows[-1]), flush=True)
        write_atomically(self._path, to_json_text(self._content | {"rows": self.rows}))
