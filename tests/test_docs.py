"""The documentation site: its code runs, its equations cover the mixers, and what it takes from elsewhere is there."""

import dataclasses
import json
import pathlib
import re
import tomllib

import jax
import pytest

from docs import api, gallery, mixers, notebooks, repository, slower, support
from docs.mathematics import DISPLAYED, INLINE, to_mathml
from layers.mixers import MIXERS

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "pages"


def python_blocks(page: pathlib.Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", sorted(p.stem for p in (PAGES / "concepts").glob("*.md") if python_blocks(p))
)
def test_the_code_of_concepts_runs(name):
    page = PAGES / "concepts" / f"{name}.md"
    scope: dict = {}
    with jax.numpy_rank_promotion("allow"):
        for block in python_blocks(page):
            exec(compile(block, str(page), "exec"), scope)  # noqa: S102


def test_every_concept_has_code():
    assert [p.stem for p in (PAGES / "concepts").glob("*.md") if not python_blocks(p)] == []


def test_every_mixer_has_an_equation_and_nothing_else_has_one():
    assert {path.stem for path in mixers.EQUATIONS.glob("*.md")} == set(MIXERS)


@pytest.mark.parametrize("name", MIXERS)
def test_equations_render(name):
    text = (mixers.EQUATIONS / f"{name}.md").read_text(encoding="utf-8")
    (equation,) = DISPLAYED.findall(text)
    assert to_mathml(equation, displayed=True).startswith("<math")
    rest = DISPLAYED.sub("", text)
    assert all(to_mathml(tex, displayed=False) for tex in re.findall(INLINE, rest))
    assert "$" not in re.sub(INLINE, "", rest)


@pytest.mark.parametrize("name", MIXERS)
def test_options_named_beside_an_equation_exist(name):
    """What a code span sets, such as `kernel="exp"`, is an option of this mixer."""
    text = (mixers.EQUATIONS / f"{name}.md").read_text(encoding="utf-8")
    set_here = re.findall(r"`(\w+)=[^`]+`", text)
    fields = {field.name for field in dataclasses.fields(MIXERS[name][0])}
    # `s4d` inside H3 and the cache of attention are other mixers' business.
    known = fields | {field.name for one, _ in MIXERS.values() for field in dataclasses.fields(one)}
    assert set(set_here) <= (known if name == "h3" else fields)


def test_mathematics_that_cannot_be_rendered_is_refused():
    for tex in (r"\nonsense x", "x_{", r"\begin{aligned} x &= y \end{aligned}"):
        with pytest.raises(ValueError, match="cannot render"):
            to_mathml(tex, displayed=True)


@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_has_a_paper_a_family_and_described_options(name):
    assert mixers.paper(name).startswith("https://")
    assert support.family(name) in mixers.FAMILIES
    assert all(mixers.described(MIXERS[name][0]).values())


def test_every_family_has_a_page_in_the_navigation():
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert set(re.findall(r"- mixers/(\w+)\.md", config)) - {"index"} == set(mixers.FAMILIES)
    assert all(mixers.of_family(family) for family in mixers.FAMILIES)


def test_support_asks_the_code():
    found = support.facts("lru", ["cpu", "tpu"])
    assert found["state"] == {"": "complex64[128]"}
    assert [call[:2] for call in found["calls"]["cpu"]] == [["linear_recurrence", "xla"]]
    assert [call[:2] for call in found["calls"]["tpu"]] == [["linear_recurrence", "tpu"]]
    scan = support.facts("mamba", ["cpu", "tpu"])
    for one in (found, scan):
        one["calls"]["gpu"] = []
    page = support.page({"lru": found, "mamba": scan})
    assert "`linear_recurrence`: **tpu**" in page
    assert "| TPU | `selective_scan` | xla | the primitive has no kernel for this device |" in page
    assert "TPU: kernel of `linear_recurrence`" in mixers.section("lru", found)
    assert "TPU: kernel of `short_conv` ([why]" in mixers.section("mamba", scan)


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXERS)
def test_support_knows_every_mixer(name):
    found = support.facts(name, ["cpu"])
    assert bool(found["state"]) == found["causal"]


def test_primitives_are_explained_where_mixers_link():
    page = (PAGES / "concepts" / "primitives.md").read_text(encoding="utf-8")
    assert set(support.SUITES) <= set(re.findall(r"^## (\w+)$", page, re.MULTILINE))


def test_outputs_of_tutorials_are_those_of_the_notebooks():
    for path in notebooks.NOTEBOOKS.glob("*.ipynb"):
        assert "figure-1.png" in notebooks.page(path), "docs/notebooks.py says how to renew outputs"
        assert f"tutorials/{path.stem}.md" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def test_notebooks_open_in_colab_from_the_address_of_the_project(monkeypatch):
    for path in notebooks.NOTEBOOKS.glob("*.ipynb"):
        text = path.read_text(encoding="utf-8")
        assert notebooks.addressed(path) == text, "run python -m docs.notebooks"
        project = repository.base_address().removeprefix("https://github.com/")
        link = f"https://colab.research.google.com/github/{project}/blob/main/notebooks/{path.name}"
        assert f"]({link})" in notebooks.page(path)
        before = notebooks.digest(notebooks.read(path))
        with monkeypatch.context() as patch:
            patch.setattr(repository, "base_address", lambda: "https://example.org/project")
            patch.setattr(notebooks, "base_address", repository.base_address)
            moved = notebooks.addressed(path)
        assert "colab.research" not in moved
        assert 'REPOSITORY = \\"https://example.org/project\\"' in moved
        # The outputs are those of any address.
        assert notebooks.digest(json.loads(moved)) == before


def test_outputs_of_other_code_are_refused(tmp_path):
    (path,) = notebooks.NOTEBOOKS.glob("quickstart.ipynb")
    changed = tmp_path / path.name
    changed.write_text(path.read_text(encoding="utf-8").replace("import sys", "import sys  # more"))
    with pytest.raises(ValueError, match="those of other code"):
        notebooks.page(changed)


def test_sections_of_the_readme_are_included_and_their_links_hold():
    pages = {
        path.relative_to(PAGES).as_posix(): path.read_text(encoding="utf-8") for path in PAGES.rglob("*.md")
    }
    anchors = repository.places(pages)
    for path, markdown in pages.items():
        expanded = repository.expand(markdown, page=path, anchors=anchors)
        assert not repository.INCLUDED.search(expanded)
    assert "(results/first_look/curves.png)" in repository.expand(
        pages["index.md"], page="index.md", anchors=anchors
    )


def test_a_missing_section_or_file_is_named():
    with pytest.raises(ValueError, match="no section 'Nothing'; it has .*Limits"):
        repository.expand("<!-- README.md: Nothing -->", page="index.md", anchors={})
    with pytest.raises(ValueError, match="README.md links to nowhere.md, which does not exist"):
        repository.relink("[a](nowhere.md)", source="README.md", page="index.md", anchors={})


def test_links_to_the_repository_become_links_of_the_site():
    def linked(text):
        return repository.relink(
            text, source="README.md", page="api/layers.md", anchors={"limits": "limits.md"}
        )

    assert linked("[a](CONTRIBUTING.md#tests)") == "[a](../contributing.md#tests)"
    assert linked("[a](experiments/results/steps_h200/NOTES.md)") == "[a](../results/steps_h200/index.md)"
    assert (
        linked("![a](experiments/results/first_look/curves.png)") == "![a](../results/first_look/curves.png)"
    )
    assert linked("[a](#limits)") == "[a](../limits.md#limits)"
    assert linked("```\n[a](nowhere)\n```") == "```\n[a](nowhere)\n```"
    assert linked("[a](https://example.org)") == "[a](https://example.org)"


def test_slower_shows_what_is_slower():
    row = {"primitive": "p", "case": "c", "dtype": "float32"}
    mine = row | {"implementation": "gpu", "ours": True, "default": True, "forward_ms": 2.0, "both_ms": 3.0}
    other = row | {
        "implementation": "theirs",
        "ours": False,
        "default": False,
        "forward_ms": 1.0,
        "both_ms": 4.0,
    }
    (found,) = slower.comparisons({"rows": [mine, other]})
    assert (found["theirs"], found["forward"], found["both"]) == ("theirs", 2.0, 0.75)
    assert slower.comparisons({"rows": [mine, other | {"forward_ms": 1.99}]}) == []
    for name in ("kernels.json", "plain.json"):
        assert "python -m experiments.benchmark" in slower.faster(name)
        assert "| times the floor |" in slower.floors(name)


def test_calls_with_kernels_are_not_shown_as_plain_jax():
    with_kernels, plain = (
        {(row["primitive"], row["case"]) for row in slower.load(name)["rows"]}
        for name in ("kernels.json", "plain.json")
    )
    assert with_kernels
    assert plain
    assert not with_kernels & plain


def test_figures_written_by_hand_are_those_of_the_notes():
    page = (PAGES / "slower.md").read_text(encoding="utf-8")
    notes = (ROOT / "experiments/results/steps_h200/NOTES.md").read_text(encoding="utf-8")
    (ratio,) = re.findall(r"took ([\d.]+) times as long with four documents", page)
    assert f"({ratio})" in notes


@pytest.mark.parametrize("study", gallery.studies(), ids=lambda study: study.name)
def test_the_gallery_says_what_a_study_is_and_how_it_is_made(study):
    """Notes with a heading and a paragraph, and a command of this project; titles tell studies apart."""
    assert study.title != study.name
    assert study.summary
    assert study.commands
    assert all(re.search(r"python -m (experiments|pytest)|^make ", command) for command in study.commands)
    assert [other.title for other in gallery.studies()].count(study.title) == 1


def test_the_reference_lists_every_package():
    listed = (PAGES / "reference.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\((api/[\w.]+\.md)\)", listed)) == set(api.pages())


def test_the_extra_docs_is_part_of_dev():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    assert set(extras["docs"]) <= set(extras["dev"])


def test_warnings_of_the_build_are_errors():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^check:.* check-docs\b", makefile, re.MULTILINE)
    # With --quiet, MkDocs counts no warnings, and --strict has no effect.
    assert "-m mkdocs build --strict" in makefile
