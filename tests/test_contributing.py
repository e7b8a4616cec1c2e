"""The example in CONTRIBUTING.md is complete: applied to a copy of the sources, it passes the suite of its mixer."""

import ast
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
NAME = "ema"
CONTRACT = [f"tests/layers/mixers/test_{part}.py" for part in ("contract", "isolation", "types")]
TRAINING = "tests/seqmodels/test_training.py"
TESTS = ("tests/layers", "tests/seqmodels", "tests/__init__.py", "tests/conftest.py", "tests/shares.py")
COPIED = ("layers", "seqmodels", "experiments", "configs", "pyproject.toml", *TESTS)
BRIEFLY = (
    "--config.train.steps=2 --config.train.batch_size=8 --config.optimizer.warmup_steps=1 --num_devices=1"
)


def blocks(language: str) -> dict[str, str]:
    """The fenced blocks of a language by what stands behind it on the fence, a file name."""
    return dict(re.findall(rf"^```{language} ?(\S*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL))


def insert(source: str, diff: str) -> str:
    """`source` with the lines marked + of a diff; the line before them, marked with a space, must stand there once."""
    lines, after = source.splitlines(), None
    for mark, line in ((line[:1], line[1:]) for line in diff.splitlines()):
        if mark == " ":
            assert lines.count(line) == 1, (
                f"CONTRIBUTING.md adds lines below {line!r}, of which the file has not one"
            )
            after = lines.index(line)
        elif mark == "+":
            after += 1
            lines.insert(after, line)
    return "\n".join([*lines, ""])


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the sources with the example in it."""
    tree = tmp_path_factory.mktemp("tree")
    for name in COPIED:
        (tree / name).parent.mkdir(exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        else:
            shutil.copy(ROOT / name, tree / name)
    for name, source in blocks("python").items():
        assert not (ROOT / name).exists()
        (tree / name).write_text(source, encoding="utf-8")
    for name, diff in blocks("diff").items():
        (tree / name).write_text(insert((ROOT / name).read_text(encoding="utf-8"), diff), encoding="utf-8")
    return tree


def arguments_of(start: str) -> list[str]:
    """The words behind `start` in the one command that begins so."""
    (line,) = (line for sh in blocks("sh").values() for line in sh.splitlines() if line.startswith(start))
    return shlex.split(line.removeprefix(start))


def run(tree, *command):
    environment = os.environ | {"HYPOTHESIS_PROFILE": "ci"}
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_example_is_one_file_and_a_line_here_and_there():
    assert list(blocks("python")) == [f"layers/mixers/recurrence/{NAME}.py"]
    added = {name: re.findall(r"^\+", diff, re.MULTILINE) for name, diff in blocks("diff").items()}
    assert {name: len(lines) for name, lines in added.items()} == {
        "layers/mixers/__init__.py": 2,
        "tests/layers/mixers/table.py": 1,
    }


@pytest.mark.slow
def test_the_example_passes_the_contract_and_learns(tree):
    (selection,) = arguments_of("make test ARGS=")
    output = run(tree, "pytest", "-v", *CONTRACT, TRAINING, *shlex.split(selection))
    passed = set(re.findall(rf"::(\w+)\[(?:\S+-)?{NAME}(?:-\S+)?\] PASSED", output))
    contract = [f for file in CONTRACT for f in ast.parse((ROOT / file).read_text(encoding="utf-8")).body]
    wanted = {
        f.name for f in contract if isinstance(f, ast.FunctionDef) and "entry" in {a.arg for a in f.args.args}
    }
    assert passed == {name for name in wanted if name.startswith("test_")} | {"test_two_layers_learn"}


@pytest.mark.slow
def test_the_example_trains_by_its_name_in_a_config(tree):
    arguments = arguments_of(".venv/bin/python -m experiments.train ")
    output = run(tree, "experiments.train", *arguments, *BRIEFLY.split())
    assert re.search(r"^test +accuracy 0\.", output, re.MULTILINE)


def test_the_example_is_in_the_format_of_the_project(tree):
    changed = [*blocks("python"), *blocks("diff")]
    run(tree, "ruff", "check", *changed)
    run(tree, "ruff", "format", "--check", *changed)
