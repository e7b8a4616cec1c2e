"""The command `seqmodels`: every command of the project by its name.

    seqmodels train --config=configs/lra/listops.py:mixer=s5 --workdir=runs/listops-s5
    seqmodels list configs
    seqmodels COMMAND --help

`seqmodels COMMAND ...` and `python -m experiments.COMMAND ...` are the same command, as is `python -m experiments COMMAND`.
"""

import ast
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

MODULES = {
    "train": "experiments.train",
    "evaluate": "experiments.evaluate",
    "generate": "experiments.generate",
    "long_context": "experiments.long_context",
    "cache_study": "experiments.cache_study",
    "convert": "experiments.convert",
    "harness": "experiments.harness",
    "compare": "experiments.compare",
    "distill": "experiments.distill",
    "sweep": "experiments.sweep.__main__",
    "report": "experiments.report.__main__",
    "list": "experiments.list",
    "describe": "experiments.describe",
    "profile": "experiments.profile",
    "benchmark": "experiments.benchmark.__main__",
    "prepare": "experiments.data.prepare",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that the first argument names, and returns its exit code; 2 if there is no such command."""
    name, *rest = (sys.argv[1:] if argv is None else list(argv)) or [""]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        print(importlib.import_module("seqmodels").__version__)
        return 0
    if name not in MODULES:
        near = difflib.get_close_matches(name, MODULES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        said = f"there is no command {name!r}{hint}" if name else "no command is given"
        print(f"seqmodels: {said}\ncommands: {', '.join(MODULES)}; --help says what they do", file=sys.stderr)
        return 2
    if argv is None:
        sys.argv[1:] = rest  # what a command writes down as its arguments
    return importlib.import_module(MODULES[name]).main(rest)


def usage() -> str:
    """Returns the text of --help: one line per command, the first of its module's docstring."""
    wide = max(map(len, MODULES))
    return "\n".join(
        [
            __doc__.strip(),
            "",
            *(f"  {name:{wide}}  {_first_line(module)}" for name, module in MODULES.items()),
        ]
    )


def _first_line(module: str) -> str:
    text = Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(text)).partition("\n")[0]


if __name__ == "__main__":
    sys.exit(main())
