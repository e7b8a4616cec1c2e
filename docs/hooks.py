"""Events of MkDocs: adds the pages that are made from code and results, and fills in what pages take from the repository."""

import pathlib
import re
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mkdocs.exceptions import PluginError  # noqa: E402
from mkdocs.structure.files import File, Files  # noqa: E402

from docs import api, gallery, mixers, notebooks, repository, slower, support  # noqa: E402
from docs.mathematics import Mathematics  # noqa: E402

STORED = ROOT / "build" / "docs"
# A line of a page that stands for what a module of this folder makes.
MADE = re.compile(
    r"^<!-- (slower\.(?:faster|floors)): (\S+) -->$|^<!-- (mixers\.overview|support\.page|gallery\.page) -->$",
    re.MULTILINE,
)
_state: dict[str, Any] = {}


def on_config(config: Any) -> Any:
    """Adds the extension that renders mathematics."""
    config.markdown_extensions.append(Mathematics())
    return config


def on_files(files: Files, *, config: Any) -> Files:
    """Adds the pages that nobody writes: mixers, tutorials, API reference and results."""
    facts = support.table(stored=STORED)
    made: dict[str, str | pathlib.Path] = {
        f"mixers/{family}.md": mixers.page(family, facts) for family in mixers.FAMILIES
    }
    for path in sorted(notebooks.NOTEBOOKS.glob("*.ipynb")):
        made[f"tutorials/{path.stem}.md"] = notebooks.page(path)
        for figure in sorted((notebooks.KEPT / path.stem).glob("*.png")):
            made[f"tutorials/{path.stem}/{figure.name}"] = figure
    made |= api.pages() | repository.results()
    for path, content in made.items():
        where = {"content": content} if isinstance(content, str) else {"abs_src_path": str(content)}
        files.append(File.generated(config, path, **where))
    pages = {file.src_uri: file.content_string for file in files.documentation_pages()}
    _state.update(facts=facts, anchors=repository.places(pages))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:  # noqa: ARG001
    """Fills in sections of README.md, files and tables."""
    try:
        markdown = repository.expand(markdown, page=page.file.src_uri, anchors=_state["anchors"])
    except ValueError as error:
        raise PluginError(f"{page.file.src_uri}: {error}") from None
    return MADE.sub(_made, markdown)


def _made(match: re.Match) -> str:
    if match[3] == "mixers.overview":
        return mixers.overview()
    if match[3] == "gallery.page":
        return gallery.page()
    if match[3] == "support.page":
        return support.page(_state["facts"])
    return {"slower.faster": slower.faster, "slower.floors": slower.floors}[match[1]](match[2])
