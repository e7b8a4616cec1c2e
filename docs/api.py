"""The pages of the API reference: one per package, with a section for each of its modules, filled from docstrings."""

import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ("layers", "seqmodels", "experiments")
# What no user of the library calls: descriptions for tests, and the insides of primitives.
INTERNAL = re.compile(
    r"/kernels/(suites?|mosaic_\w+)\.py$|/kernels/\w+/(?!__init__\.|options\.|discretize\.|dplr\.)|/results/"
)


def pages() -> dict[str, str]:
    """Returns the Markdown of the pages by path."""
    found = {}
    for package in PACKAGES:
        for folder in [ROOT / package, *sorted(p for p in (ROOT / package).rglob("*") if p.is_dir())]:
            modules = [
                file
                for file in sorted(folder.glob("*.py"))
                if not INTERNAL.search("/" + file.relative_to(ROOT).as_posix())
            ]
            if not (folder / "__init__.py").exists() or not modules:
                continue
            dotted = ".".join(folder.relative_to(ROOT).parts)
            lines = [f"# `{dotted}`"]
            for file in modules:
                name = dotted if file.stem == "__init__" else f"{dotted}.{file.stem}"
                lines.append(f"::: {name}")
            found[f"api/{dotted}.md"] = "\n\n".join(lines) + "\n"
    return found
