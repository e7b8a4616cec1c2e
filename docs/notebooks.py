"""Tutorials: notebooks as pages, with outputs that are committed beside them, so that building the site executes nothing.

.venv/bin/python tools/run_notebooks.py FOLDER      execute the notebooks, and keep the copies in FOLDER
.venv/bin/python -m docs.notebooks FOLDER           take their printed text and figures into docs/tutorials
.venv/bin/python -m docs.notebooks                  write the address of pyproject.toml into the notebooks
"""

import base64
import hashlib
import io
import json
import pathlib
import re
import sys
from typing import Any

from docs.repository import badge, base_address

ROOT = pathlib.Path(__file__).resolve().parents[1]
NOTEBOOKS, KEPT = ROOT / "notebooks", ROOT / "docs" / "tutorials"
ADDRESS = re.compile(r'^REPOSITORY = ".*?"', re.MULTILINE)
BADGE = re.compile(r"^\[!\[Open in Colab\].*\n\n", re.MULTILINE)
WIDEST = 1000
LONGEST = 40


def digest(notebook: dict[str, Any]) -> str:
    """Returns a digest of the code of a notebook, whatever the address of the repository is."""
    code = [
        ADDRESS.sub("", "".join(cell["source"])) for cell in notebook["cells"] if cell["cell_type"] == "code"
    ]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()[:16]


def read(path: pathlib.Path) -> dict[str, Any]:
    """Returns a notebook."""
    return json.loads(path.read_text(encoding="utf-8"))


def addressed(path: pathlib.Path) -> str:
    """Returns the text of a notebook with the address of the repository, in its code and in a badge under its title."""
    notebook, shown = read(path), badge(f"{NOTEBOOKS.name}/{path.name}")
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            source = ADDRESS.sub(f'REPOSITORY = "{base_address() or ""}"', source)
        elif source.startswith("# "):
            title, _, rest = BADGE.sub("", source).partition("\n\n")
            source = "\n\n".join([title, *([shown] if shown else []), rest])
        cell["source"] = source.splitlines(keepends=True)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def keep(executed: pathlib.Path, kept: pathlib.Path) -> None:
    """Writes the printed text and the figures of an executed notebook to a folder."""
    kept.mkdir(parents=True, exist_ok=True)
    for old in kept.glob("figure-*.png"):
        old.unlink()
    notebook, outputs, figures = read(executed), {}, 0
    for index, cell in enumerate(notebook["cells"]):
        text, names = "", []
        for output in cell.get("outputs", []):
            if output.get("name") == "stdout":
                text += "".join(output["text"])
            elif "image/png" in output.get("data", {}):
                figures += 1
                names.append(f"figure-{figures}.png")
                _write_small(base64.b64decode("".join(output["data"]["image/png"])), kept / names[-1])
        if text or names:
            outputs[str(index)] = {"text": text, "figures": names}
    record = {"code": digest(notebook), "outputs": outputs}
    (kept / "outputs.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _write_small(data: bytes, path: pathlib.Path) -> None:
    from PIL import Image

    image = Image.open(io.BytesIO(data)).convert("RGB")
    if image.width > WIDEST:
        image = image.resize((WIDEST, round(image.height * WIDEST / image.width)), Image.Resampling.LANCZOS)
    image.quantize(64).save(path, optimize=True)


def page(path: pathlib.Path) -> str:
    """Returns a notebook as Markdown, with the outputs kept of it.

    Raises:
      ValueError: the code of the notebook is not the code that gave the outputs.
    """
    notebook, kept = read(path), json.loads((KEPT / path.stem / "outputs.json").read_text(encoding="utf-8"))
    if digest(notebook) != kept["code"]:
        raise ValueError(
            f"the outputs of {path.name} are those of other code; docs/notebooks.py says how to renew them"
        )
    parts = []
    for index, cell in enumerate(notebook["cells"]):
        source = "".join(cell["source"]).strip()
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        output = kept["outputs"].get(str(index), {"text": "", "figures": []})
        if output["text"]:
            lines = output["text"].rstrip().splitlines()
            shown = (
                [*lines[:LONGEST], f"... and {len(lines) - LONGEST} lines more"]
                if len(lines) > LONGEST
                else lines
            )
            parts.append("```text\n" + "\n".join(shown) + "\n```")
        parts += [f"![Output of the cell above]({path.stem}/{name})" for name in output["figures"]]
    return "\n\n".join(parts) + "\n"


def main(folder: str | None = None) -> int:
    """Keeps the outputs of the executed copies in a folder, or writes the address; returns the exit code."""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        if folder is None:
            path.write_text(addressed(path), encoding="utf-8")
        else:
            keep(pathlib.Path(folder) / path.name, KEPT / path.stem)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
