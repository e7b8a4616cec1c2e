"""Sessions of a run: one line of JSON per start of training, with time, command, step, versions, git revision and devices."""

import datetime as dt
import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.runs.files import append_json_lines, read_json_lines

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "ml_collections")


def add(file: Path, *, step: int, devices: str) -> str | None:
    """Records a start of training from `step`; cut or damaged lines of earlier ones are named on standard error.

    Returns:
      What differs from the session before, in versions of packages or in devices, as text; None if nothing does.
    """
    session = dict(
        time=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        step=step,
        command=[Path(sys.argv[0]).name, *sys.argv[1:]],
        devices=devices,
        versions=versions(),
        git=git_revision(),
    )
    earlier, problems = read_json_lines(file, ("step", "devices", "versions"))
    for problem in problems:
        print(problem, file=sys.stderr)
    append_json_lines(file, [session])
    return _changes(earlier[-1], session) if earlier and step else None


def _changes(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    old, new = dict(earlier["versions"]), now["versions"]
    changed = [
        f"{name} {old[name]} then, {new[name]} now" for name in new if name in old and old[name] != new[name]
    ]
    if earlier["devices"] != now["devices"]:
        changed.append(f"{earlier['devices']} then, {now['devices']} now")
    return f"This session has other conditions than the one before: {'; '.join(changed)}" if changed else None


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in PACKAGES
    }


def git_revision() -> str | None:
    """Returns the commit of the sources, with "+changes" if files differ from it; None outside a repository."""
    root = Path(__file__).resolve().parents[2]

    def git(*args: str) -> str:
        command = ["git", "-C", str(root), *args]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
