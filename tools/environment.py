"""Makes `.venv` and installs the pinned requirements and the project into it; called by tools/environment.sh.

    .venv/bin/python tools/environment.py          bring .venv up to date
    python3.12 tools/environment.py rebuild        make .venv anew with the Python that runs this

Exit codes: 0 the environment is ready, 1 an install failed, 3 it has to be made anew.

A stamp in the environment records what was installed; it is written last. During an install, another file marks the
environment as unfinished, so that an interrupted install is never considered complete. An environment without either
file, for example one made by hand, is kept if every pinned version in it is complete.
"""

import csv
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import pathlib
import platform
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
REQUIREMENTS = ROOT / "requirements.txt"
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
STAMP = VENV / "installed"
UNFINISHED = VENV / "unfinished"
READY, FAILED, REBUILD = 0, 1, 3


def expected_stamp() -> str:
    """Returns the expected stamp: the project's folder, the Python, and the files that determine an install."""
    digests = [
        hashlib.sha256((ROOT / name).read_bytes()).hexdigest()
        for name in ("requirements.txt", "pyproject.toml", "setup.py")
    ]
    return "\n".join([str(ROOT), platform.python_version(), *digests])


def stamp_is_current() -> bool:
    """Returns whether the last install matches the current requirements."""
    return STAMP.exists() and STAMP.read_text(encoding="utf-8") == expected_stamp()


def is_whole(package: importlib.metadata.Distribution) -> bool:
    """Returns whether every file in the package's record exists, except bytecode."""
    record = package.read_text("RECORD")
    paths = [row[0] for row in csv.reader(record.splitlines())] if record else []
    return bool(paths) and all(path.endswith(".pyc") or package.locate_file(path).exists() for path in paths)


def wrong_packages(*, look_at_files: bool) -> list[str]:
    """Returns names of pinned packages that are absent, of another version or, if `look_at_files`, lack a file."""
    if importlib.util.find_spec("packaging") is None:
        return ["packaging"]
    from packaging.requirements import Requirement

    wrong = []
    lines = (line.split("#")[0].strip() for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines())
    for requirement in (Requirement(line) for line in lines if line):
        if requirement.marker and not requirement.marker.evaluate():
            continue
        try:
            package = importlib.metadata.distribution(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(requirement.name)
            continue
        fits = requirement.specifier.contains(package.version, prereleases=True)
        if not fits or (look_at_files and not is_whole(package)):
            wrong.append(requirement.name)
    return wrong


def pip(*arguments: str) -> bool:
    """Runs pip in this environment; returns whether it succeeded."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    return subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL).returncode == 0


def install() -> int:
    """Updates the environment that runs this; returns an exit code."""
    if stamp_is_current() and not wrong_packages(look_at_files=False):
        return READY
    if UNFINISHED.exists() or importlib.util.find_spec("pip") is None:
        return REBUILD
    STAMP.unlink(missing_ok=True)
    UNFINISHED.touch()
    if wrong_packages(look_at_files=False):
        print(
            "Installing the packages of requirements.txt (about 1.2 GB; some minutes the first time).",
            flush=True,
        )
        if not pip("install", "--quiet", "--requirement", str(REQUIREMENTS)):
            UNFINISHED.unlink()
            return FAILED
    damaged = wrong_packages(look_at_files=True)
    if damaged:
        print(f"Not whole in .venv: {', '.join(damaged)}.", flush=True)
        return REBUILD
    if not pip("install", "--quiet", "--no-deps", "--no-build-isolation", "--editable", str(ROOT)):
        UNFINISHED.unlink()
        return FAILED
    UNFINISHED.unlink()
    STAMP.write_text(expected_stamp(), encoding="utf-8")
    return READY


def rebuild() -> int:
    """Recreates the environment, unless another call has just done so; returns an exit code."""
    works = (
        VENV_PYTHON.exists() and subprocess.run([VENV_PYTHON, "-c", ""], capture_output=True).returncode == 0
    )
    if works and stamp_is_current() and not UNFINISHED.exists():
        return READY
    print(f"Making .venv with Python {platform.python_version()} ({sys.executable}).", flush=True)
    if subprocess.run([sys.executable, "-m", "venv", "--clear", VENV]).returncode != 0:
        return FAILED
    return subprocess.run([VENV_PYTHON, __file__, "install"]).returncode


def main(mode: str | None = None) -> int:
    """Runs one mode under a lock, so that concurrent calls of make do not interfere; returns an exit code."""
    if mode == "install":  # called by `rebuild`, which holds the lock
        return install()
    with open(__file__, encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return rebuild() if mode == "rebuild" else install()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
