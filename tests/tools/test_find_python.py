"""tools/find_python.sh: which Python is taken, and what is said when none fits."""

import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "tools" / "find_python.sh"


@pytest.fixture
def machine(tmp_path):
    """An empty machine whose folders have spaces in their names."""
    return Machine(tmp_path / "an empty machine")


class Machine:
    """A home and a PATH with nothing but the Pythons put there."""

    def __init__(self, root: pathlib.Path):
        self.root = root

    def program(self, place: str, script: str) -> str:
        path = self.root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return str(path)

    def python(self, place: str, minor: int) -> str:
        """A stand-in that answers the script's question as Python 3.`minor` would."""
        return self.program(place, f'echo "{minor} $0"' if minor >= 12 else "exit 1")

    def find(self, **environment: str) -> subprocess.CompletedProcess:
        env = {"PATH": str(self.root / "bin"), "HOME": str(self.root / "home"), **environment}
        return subprocess.run(["/bin/sh", str(SCRIPT)], env=env, capture_output=True, text=True, timeout=60)


def test_takes_3_12_before_newer_ones(machine):
    machine.python("bin/python3", 14)
    machine.python("bin/python3.13", 13)
    wanted = machine.python("bin/python", 12)
    assert machine.find().stdout.strip() == wanted


def test_takes_the_oldest_of_the_newer_ones(machine):
    machine.python("bin/python3.14", 14)
    wanted = machine.python("bin/python3.13", 13)
    assert machine.find().stdout.strip() == wanted


def test_looks_past_shims_that_fail_and_old_versions(machine):
    machine.program("bin/python3.12", "echo 'python3.12: command not found' >&2; exit 127")
    machine.program("bin/python3.13", "echo some other answer")
    machine.python("bin/python3", 11)
    machine.python("home/.pyenv/versions/3.9.1/bin/python", 9)
    wanted = machine.python("home/.pyenv/versions/3.12.1/bin/python", 12)
    machine.python("home/.pyenv/versions/3.13.0/bin/python", 13)
    assert machine.find().stdout.strip() == wanted


def test_takes_path_before_pyenv_before_uv(machine):
    uv = machine.python("uv/python3.12", 12)
    machine.program("bin/uv", f'case "$1" in --version) ;; python) echo "{uv}" ;; esac')
    assert machine.find().stdout.strip() == uv
    pyenv = machine.python("elsewhere/versions/3.13.0/bin/python", 13)
    assert machine.find(PYENV_ROOT=str(machine.root / "elsewhere")).stdout.strip() == pyenv
    path = machine.python("bin/python3", 14)
    assert machine.find(PYENV_ROOT=str(machine.root / "elsewhere")).stdout.strip() == path


def test_takes_the_python_that_is_given(machine):
    machine.python("bin/python3.12", 12)
    given = machine.python("given/python", 13)
    assert machine.find(PYTHON=given).stdout.strip() == given


def test_refuses_a_given_python_that_does_not_fit(machine):
    machine.python("bin/python3.12", 12)
    answer = machine.find(PYTHON=machine.python("given/python", 11))
    assert answer.returncode != 0
    assert answer.stdout == ""
    assert "cannot be used: it must run, be Python 3.12 or newer" in answer.stderr


def test_says_what_to_install_when_nothing_fits(machine):
    answer = machine.find()
    assert answer.returncode != 0
    assert answer.stdout == ""
    for command in ("apt-get install python3.12", "pyenv install 3.12", "uv python install 3.12", "PYTHON="):
        assert command in answer.stderr


def test_says_when_only_venv_is_missing(machine):
    machine.program("bin/python3", "echo novenv /usr/bin/python3")
    answer = machine.find()
    assert answer.returncode != 0
    assert "/usr/bin/python3 is new enough, but lacks venv or ensurepip" in answer.stderr


def test_a_real_python_answers_with_the_one_it_was_made_from(machine):
    answer = machine.find(PYTHON=sys.executable)
    assert os.path.samefile(answer.stdout.strip(), sys._base_executable)
