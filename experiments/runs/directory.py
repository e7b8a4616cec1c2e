"""The folder of a run: everything needed to resume, inspect or repeat it.

    config.json       the config           manifest.json    of the data
    sessions.jsonl    one line per start: time, command, step, versions, git revision, devices
    parameters.txt    groups of the optimizer
    metrics.jsonl     the log              tensorboard/     the same as event files
    checkpoints/      see `checkpoints`    curves.png, results.json: at the end

It holds no absolute path of the run, so it may be moved to another folder or machine.
"""

import datetime as dt
import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.config import loading as config_loading
from experiments.runs.files import read_json, to_json_text, write_atomically

try:
    import fcntl
except ImportError:  # Windows, where two processes in one folder are not detected
    fcntl = None

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "ml_collections")
LOCK = ".lock"


class WorkdirError(ValueError):
    """A work directory that a run cannot use."""


class RunDirectory:
    """A run's folder, opened for reading. `RunDirectory.open` creates and locks one for training."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._lock: Any = None

    @classmethod
    def open(cls, folder: str | Path, config: Mapping[str, Any]) -> "RunDirectory":
        """Returns the locked folder of a new run, or of a run to resume.

        Raises:
          WorkdirError: if the folder holds something else, a run of another config (the fields that differ are named),
            or a run that another process is training.
        """
        run = cls(folder)
        run.folder.mkdir(parents=True, exist_ok=True)
        if run.config_file.exists():
            run._check_config(config)
        elif found := sorted(path.name for path in run.folder.iterdir() if not path.name.startswith(".")):
            raise WorkdirError(
                f"workdir={folder} is not empty ({', '.join(found[:3])}) and holds no run; "
                "give a new folder or that of a run"
            )
        run._take_lock()
        return run

    def begin(self, config: Mapping[str, Any], manifest: Mapping[str, Any], parameters: str) -> None:
        """Records the inputs of a new run, or checks that a known run has the same data.

        Args:
          manifest: manifest of the data.
          parameters: table of the optimizer's groups.

        Raises:
          WorkdirError: if the data differ from those at the start of the run.
        """
        if not self.config_file.exists():
            write_atomically(self.config_file, config_loading.to_json(config))
        file = self.folder / "manifest.json"
        recorded = read_json(file)
        if recorded is None:
            write_atomically(file, to_json_text(manifest))
        elif recorded != manifest:
            fields = recorded.keys() | manifest.keys()
            differing = sorted(name for name in fields if recorded.get(name) != manifest.get(name))
            raise WorkdirError(
                f"workdir={self.folder} was trained on other data: {', '.join(differing)} differ from its "
                "manifest.json; restore that data or give a new workdir"
            )
        write_atomically(self.folder / "parameters.txt", parameters + "\n")

    @property
    def config_file(self) -> Path:
        return self.folder / "config.json"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.folder / "tensorboard"

    @property
    def curves(self) -> Path:
        return self.folder / "curves.png"

    def config(self) -> dict[str, Any]:
        """Returns the config of the run.

        Raises:
          WorkdirError: if there is none.
        """
        try:
            return config_loading.from_json(self.config_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise WorkdirError(f"workdir={self.folder} holds no run: there is no config.json") from None

    def results(self) -> dict[str, Any] | None:
        """Returns the results of a finished run, or None."""
        return read_json(self.folder / "results.json")

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Writes the results, which marks the run as finished."""
        write_atomically(self.folder / "results.json", to_json_text(results))

    def add_session(self, *, step: int, devices: str) -> dict[str, Any]:
        """Records a start of training from `step`, and returns the record."""
        session = dict(
            time=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            step=step,
            command=[Path(sys.argv[0]).name, *sys.argv[1:]],
            devices=devices,
            versions=versions(),
            git=git_revision(),
        )
        with (self.folder / "sessions.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(session) + "\n")
        return session

    def release(self) -> None:
        """Releases the lock for other processes; the end of the process does so too."""
        self._lock.close()

    def _take_lock(self) -> None:
        self._lock = (self.folder / LOCK).open("w")
        if fcntl is None:
            return
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise WorkdirError(
                f"workdir={self.folder}: another process is training this run; wait for it or give another workdir"
            ) from None

    def _check_config(self, config: Mapping[str, Any]) -> None:
        if lines := config_loading.differences(self.config(), config):
            raise WorkdirError(
                f"workdir={self.folder} holds a run of another config; give another workdir, or the config of the run:\n"
                + "\n".join(f"  {line}" for line in lines)
            )


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
