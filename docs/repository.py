"""What pages take from files of the repository: sections of README.md, whole files, results, and links between them."""

import os
import pathlib
import re
import tomllib
from collections.abc import Mapping

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = "experiments/results"
GITHUB, COLAB = "https://github.com/", "https://colab.research.google.com"
# Files of the repository that are pages, by their paths on the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "notebooks/quickstart.ipynb": "tutorials/quickstart.md",
    "notebooks/language_model.ipynb": "tutorials/language_model.md",
}
# A line of a page that stands for sections of README.md: one by its heading, or all from the top to one ("... Train").
INCLUDED = re.compile(r"^<!-- README\.md: (\.\.\. )?(.+?) -->$", re.MULTILINE)
WHOLE = re.compile(r"^<!-- file: (\S+) -->$", re.MULTILINE)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^()\s]+)\)")
FENCE = re.compile(r"^(```.*?^```|    .*?)$", re.MULTILINE | re.DOTALL)


def sections(text: str) -> dict[str, str]:
    """Returns the sections of a Markdown file by their headings of the second level; what stands before them by ""."""
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    titles, bodies = ["", *parts[1::2]], parts[::2]
    return {
        title: body.strip() if not title else f"## {title}\n\n{body.strip()}"
        for title, body in zip(titles, bodies, strict=True)
    }


def expand(markdown: str, *, page: str, anchors: Mapping[str, str]) -> str:
    """Returns a page with its sections of README.md and its files put in, and their links made to hold.

    Args:
      markdown: the page as written.
      page: its path.
      anchors: see `places`.

    Raises:
      ValueError: README.md has no such section, or a link leads to nothing.
    """

    def included(match: re.Match) -> str:
        return relink(chosen(match), source="README.md", page=page, anchors=anchors)

    def whole(match: re.Match) -> str:
        file = ROOT / match[1]
        if not file.exists():
            return f"# {file.stem.capitalize()}\n\nThere is none yet."
        return relink(file.read_text(encoding="utf-8"), source=match[1], page=page, anchors={})

    return WHOLE.sub(whole, INCLUDED.sub(included, markdown))


def chosen(match: re.Match) -> str:
    """Returns the sections of README.md that a line of a page stands for."""
    readme = sections((ROOT / "README.md").read_text(encoding="utf-8"))
    if match[2] not in readme:
        raise ValueError(f"README.md has no section {match[2]!r}; it has {', '.join(filter(None, readme))}")
    titles = list(readme)
    picked = titles[: titles.index(match[2]) + 1] if match[1] else [match[2]]
    return "\n\n".join(readme[title] for title in picked)


def places(pages: Mapping[str, str]) -> dict[str, str]:
    """Returns the page of every section of README.md that a page includes, by the anchor of its heading.

    Args:
      pages: Markdown of the pages, before it is expanded, by path.
    """
    found = {}
    for path, markdown in pages.items():
        for match in INCLUDED.finditer(markdown):
            found |= {
                anchor(title): path for title in re.findall(r"^## (.+)$", chosen(match), flags=re.MULTILINE)
            }
    return found


def anchor(title: str) -> str:
    """Returns the anchor of a heading."""
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower())


def relink(markdown: str, *, source: str, page: str, anchors: Mapping[str, str]) -> str:
    """Returns the Markdown of a file with links that hold on the site.

    Args:
      markdown: text of the file.
      source: its path in the repository, from which its links are relative.
      page: path of the page that shows it.
      anchors: see `places`.

    Raises:
      ValueError: a link leads to nothing.
    """

    def linked(match: re.Match) -> str:
        image, text, target = match.groups()
        if re.match(r"[a-z]+:", target):
            return match[0]
        path, _, place = target.partition("#")
        if not path:
            if source == "README.md" and place not in anchors:
                raise ValueError(f"README.md links to #{place}, which no page of the site includes")
            known = anchors.get(place, page) if source == "README.md" else page
            return f"{image}[{text}]({relative(known, page)}#{place})"
        full = os.path.normpath(os.path.join(os.path.dirname(source), path))
        if not (ROOT / full).exists() and full not in PAGES:
            raise ValueError(f"{source} links to {target}, which does not exist")
        there = on_site(full)
        if there is None:
            address = address_of(full)
            return f"[{text}]({address})" if address else text
        return f"{image}[{text}]({relative(there, page)}{'#' + place if place else ''})"

    pieces = FENCE.split(markdown)
    return "".join(piece if FENCE.fullmatch(piece) else LINK.sub(linked, piece) for piece in pieces)


def on_site(path: str) -> str | None:
    """Returns where the site has a file or folder of the repository, or None."""
    if path in PAGES:
        return PAGES[path]
    if not path.startswith(RESULTS + "/"):
        return None
    inside = "results/" + path.removeprefix(RESULTS + "/")
    if (ROOT / path).is_dir():
        return f"{inside}/index.md"
    return f"{os.path.dirname(inside)}/index.md" if path.endswith(".md") else inside


def address_of(path: str) -> str | None:
    """Returns the address of a file in the repository that pyproject.toml names, or None."""
    base = base_address()
    return f"{base}/blob/main/{path}" if base else None


def base_address() -> str | None:
    """Returns the address of the repository that pyproject.toml names, or None."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    urls = {name.lower(): url for name, url in project.get("urls", {}).items()}
    base = urls.get("repository") or urls.get("source")
    return base.rstrip("/") if base else None


def badge(path: str) -> str | None:
    """Returns a badge that opens a notebook of the repository in Colab, as Markdown; None if it is not on GitHub."""
    address = address_of(path)
    if address is None or not address.startswith(GITHUB):
        return None
    return (
        f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({COLAB}/github/{address.removeprefix(GITHUB)})"
    )


def relative(target: str, page: str) -> str:
    """Returns a link from one page to another, in the form that MkDocs checks."""
    return os.path.relpath(target, os.path.dirname(page) or ".")


def results() -> dict[str, pathlib.Path | str]:
    """Returns the files of the site below results/: copies, and one page per folder with its notes, tables and files."""
    found: dict[str, pathlib.Path | str] = {}
    for folder in sorted({file.parent for file in (ROOT / RESULTS).rglob("*") if file.is_file()}):
        inside = on_site(folder.relative_to(ROOT).as_posix())
        page = [f"# {folder.relative_to(ROOT / RESULTS).as_posix()}"]
        files = sorted(file for file in folder.iterdir() if file.is_file())
        for file in files:
            source = file.relative_to(ROOT).as_posix()
            if file.suffix == ".md":
                text = re.sub(r"^# ", "## ", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
                page.append(relink(text, source=source, page=inside, anchors={}))
            else:
                found[on_site(source)] = file
        page += [f"![{file.stem}]({file.name})" for file in files if file.suffix == ".png"]
        page.append(f"Files of `{folder.relative_to(ROOT).as_posix()}`:")
        page.append("\n".join(f"- [{file.name}]({file.name})" for file in files if file.suffix != ".md"))
        found[inside] = "\n\n".join(page) + "\n"
    return found
