"""Requirements, sources and notebooks keep the project's rules."""

import ast
import importlib.metadata
import json
import pathlib
import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LONGEST_FILE = 450


def requirement_lines() -> list[str]:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in (line.partition("#")[0].strip() for line in lines) if line]


def pins() -> dict[str, Requirement]:
    return {canonicalize_name(r.name): r for r in map(Requirement, requirement_lines())}


def sources() -> list[pathlib.Path]:
    """The Python files of the project."""
    tops = ("configs", "docs", "experiments", "layers", "seqmodels", "tests", "tools")
    return sorted(file for top in tops for file in (ROOT / top).rglob("*.py"))


def relative(paths: list[pathlib.Path]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in paths]


def test_every_pin_is_one_exact_version():
    assert [line for line in requirement_lines() if not re.fullmatch(r"[\w.-]+==[\w.!+]+(; .+)?", line)] == []
    assert len(pins()) == len(requirement_lines())


@pytest.mark.parametrize("range_", PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"])
def test_pins_lie_in_the_ranges_of_pyproject(range_):
    wanted = Requirement(range_)
    pin = pins()[canonicalize_name(wanted.name)]
    (version,) = (specifier.version for specifier in pin.specifier)
    assert wanted.specifier.contains(version)


@pytest.mark.parametrize("extra", ["cuda13", "tpu"])
def test_devices_take_the_pinned_jax(extra):
    (version,) = (specifier.version for specifier in pins()["jax"].specifier)
    (wanted,) = map(Requirement, PROJECT["optional-dependencies"][extra])
    assert wanted.name == "jax"
    assert wanted.specifier.contains(version)


def test_what_the_pins_need_is_pinned_too():
    """Follows the metadata of the installed packages from what the project names itself."""
    known = pins()
    todo = [Requirement(r) for r in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]]
    seen, unpinned = set(), set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        for extra in ["", *requirement.extras]:
            if (name, extra) in seen or (
                requirement.marker and not requirement.marker.evaluate({"extra": ""})
            ):
                continue
            seen.add((name, extra))
            if name not in known:
                unpinned.add(name)
                continue
            for line in importlib.metadata.requires(name) or []:
                needed = Requirement(line)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    needed.marker = None
                    todo.append(needed)
    assert unpinned == set()
    assert {name for name, _ in seen} == set(known), "a pin that nothing needs"


def test_every_module_says_what_it_is_for():
    files = sources()
    assert len(files) > 10
    bare = [file for file in files if not ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))]
    assert relative(bare) == []


def test_files_stay_short():
    free = ("layers/kernels/", "tests/layers/kernels/")
    files = [file for file in sources() if not file.relative_to(ROOT).as_posix().startswith(free)]
    long = [file for file in files if len(file.read_text(encoding="utf-8").splitlines()) > LONGEST_FILE]
    assert relative(long) == []


def test_no_file_is_a_drawer_for_everything():
    assert (
        relative([file for file in sources() if file.stem in {"utils", "util", "misc", "helpers", "common"}])
        == []
    )


def test_notebooks_are_committed_without_outputs():
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    assert notebooks
    for notebook in notebooks:
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
            assert not cell.get("outputs"), f"{notebook.name} holds outputs; clear them before committing"
            assert cell.get("execution_count") is None, (
                f"{notebook.name} holds execution counts; clear its outputs"
            )


def test_the_licence_is_named_and_complete():
    assert PROJECT["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION" in text
    assert re.search(r"^ +Copyright \d{4} jax-seqmodels contributors$", text, re.MULTILINE)


def test_the_address_of_the_repository_and_the_version_are_the_same_everywhere():
    address, version = PROJECT["urls"]["Repository"], PROJECT["version"]
    assert all(url.startswith(address) for url in PROJECT["urls"].values())
    citation, readme = (ROOT / name for name in ("CITATION.cff", "README.md"))
    assert f'repository-code: "{address}"' in citation.read_text(encoding="utf-8")
    assert f"\nversion: {version}\n" in citation.read_text(encoding="utf-8")
    assert f"url     = {{{address}}}" in readme.read_text(encoding="utf-8")
    assert f"git clone {address} " in readme.read_text(encoding="utf-8")
    assert f"version = {{{version}}}" in readme.read_text(encoding="utf-8")
    assert f"\n## {version} - " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_commits_are_formatted_by_the_pinned_ruff():
    (version,) = (specifier.version for specifier in pins()["ruff"].specifier)
    assert f"rev: v{version} " in (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")


def test_long_tests_exist():
    """A test that has another name by now would run by default again."""
    named = (ROOT / "tests" / "long.txt").read_text(encoding="utf-8").splitlines()
    assert named == sorted(set(named))
    for name in named:
        file, _, function = name.partition("[")[0].partition("::")
        assert f"def {function}(" in (ROOT / file).read_text(encoding="utf-8"), name
