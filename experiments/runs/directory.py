"""The folder of a run: everything needed to resume, inspect or repeat it.

    config.json       the config           manifest.json    of the data
    hashes.json       of what is relied on, see `trusted`
    sessions.jsonl    one line per start: time, command, step, versions, git revision, devices
    parameters.txt    groups of the optimizer
    metrics.jsonl     the log              tensorboard/     the same as event files
    checkpoints/      see `checkpoints`    curves.png, results.json: at the end

It holds no absolute path of the run, so it may be moved to another folder or machine.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from experiments.config import loading as config_loading
from experiments.runs import manifests, sessions, trusted
from experiments.runs.files import DamagedFileError, to_json_text
from experiments.runs.logs import WANDB_ID, read_lines
from experiments.runs.manifests import DAMAGED

try:
    import fcntl
except ImportError:  # Windows, where two processes in one folder are not detected
    fcntl = None

LOCK = ".lock"
MANIFEST = "manifest.json"
PARAMETERS = "parameters.txt"
# Fields that a run may be extended by.
LENGTH = ("train.steps", "train.epochs")
ExtensionProblem = Callable[[Mapping[str, Any], int], str | None]


class WorkdirError(ValueError):
    """A work directory that a run cannot use."""


class RunDirectory:
    """A run's folder, opened for reading. `RunDirectory.open` creates and locks one for training."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._lock: Any = None
        self._made: list[Path] = []

    @classmethod
    def open(
        cls, folder: str | Path, config: Mapping[str, Any], extension_problem: ExtensionProblem | None = None
    ) -> "RunDirectory":
        """Returns the locked folder of a new run, or of a run to resume.

        Raises:
          WorkdirError: if `check` refuses the config, or another process is training the run. Nothing is left behind.
        """
        run = cls(folder)
        run.check(config, extension_problem)
        run._made = [path for path in (run.folder, *run.folder.parents) if not path.exists()]
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
            run._take_lock()
            run.check(config, extension_problem)  # another process may have begun a run since
        except BaseException:
            run._undo()
            raise
        return run

    def check(
        self, config: Mapping[str, Any], extension_problem: ExtensionProblem | None = None
    ) -> Mapping[str, Any] | None:
        """Returns the config of the run in the folder; None if the folder can take a new run. Changes nothing.

        A run without a checkpoint gives way to a new one. Another number of steps or epochs is left to
        `extension_problem`, which receives the config of the run and its newest step, and returns a reason to refuse or None.

        Raises:
          WorkdirError: if the folder holds something else, or a run of another config (the fields that differ are named).
        """
        for path in (self.folder, *self.folder.parents):
            if path.exists() and not path.is_dir():
                raise WorkdirError(f"workdir={self.folder}: {path} is a file; give a folder")
        if not self.folder.exists():
            return None
        if not self.config_file.exists():
            names = [path.name for path in self.folder.iterdir() if not path.name.startswith(".")]
            if found := sorted(set(names) - {manifests.NAME}):  # which a killed process writes first
                raise WorkdirError(
                    f"workdir={self.folder} is not empty ({', '.join(found[:3])}) and holds no run; "
                    "give a new folder or that of a run"
                )
            return None
        if not self.has_steps and not self._results_file.exists():
            return None
        known = self.config()
        ignored = config_loading.FREE_FIELDS + LENGTH
        if lines := config_loading.differences(known, config, ignore=ignored):
            raise WorkdirError(
                f"workdir={self.folder} holds a run of another config; give another workdir, or the config of the run:\n"
                + "\n".join(f"  {line}" for line in lines)
            )
        lines = _length_differences(known, config)
        if lines and extension_problem and (reason := extension_problem(known, self._newest_step())):
            raise WorkdirError(
                f"workdir={self.folder}: {reason}\n" + "\n".join(f"  {line}" for line in lines)
            )
        return known

    def begin(self, config: Mapping[str, Any], manifest: Mapping[str, Any], parameters: str) -> None:
        """Records the inputs of a new run, or checks that a known run has the same data.

        Where the config asks for more steps than the run has, the record of the run follows it.

        Args:
          manifest: manifest of the data.
          parameters: table of the optimizer's groups.

        Raises:
          WorkdirError: if the data differ from those at the start of the run.
        """
        known = self.check(config)
        if known is None:
            files = {
                self.config_file.name: config_loading.to_json(config),
                MANIFEST: to_json_text(manifest),
                PARAMETERS: parameters + "\n",
            }
            try:
                (self.folder / WANDB_ID).unlink(missing_ok=True)
                trusted.begin(self.folder, files)
            except OSError:
                if self._made:
                    for name in (*files, manifests.NAME):
                        (self.folder / name).unlink(missing_ok=True)
                self._undo()
                raise
            return
        self.check_data(manifest, "restore that data or give a new workdir")
        trusted.forget(self.folder, self.metrics.name)
        files = {PARAMETERS: parameters + "\n"}
        if not (self.folder / MANIFEST).exists():
            files[MANIFEST] = to_json_text(manifest)
        if _length_differences(known, config):
            self._results_file.unlink(missing_ok=True)  # first: they are those of fewer steps
            files[self.config_file.name] = config_loading.to_json(_with_length(known, config))
        present = {self.config_file.name, MANIFEST} - files.keys()
        trusted.write(self.folder, files, finished=present)

    def data(self) -> dict[str, Any] | None:
        """Returns the manifest of the data that the run was trained on; None if it has none.

        Raises:
          DamagedFileError: if it is damaged.
        """
        return trusted.read_json(self.folder / MANIFEST)

    def check_data(self, manifest: Mapping[str, Any], remedy: str) -> None:
        """Raises WorkdirError, which ends with `remedy`, if the run was trained on data with another manifest.

        Raises:
          DamagedFileError: if the recorded manifest is damaged.
        """
        recorded, given = self.data(), json.loads(to_json_text(manifest))
        if recorded is None or recorded == given:
            return
        fields = recorded.keys() | given.keys()
        differing = sorted(name for name in fields if recorded.get(name) != given.get(name))
        raise WorkdirError(
            f"workdir={self.folder} was trained on other data: {', '.join(differing)} differ from its {MANIFEST}; {remedy}"
        )

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

    @property
    def _results_file(self) -> Path:
        return self.folder / "results.json"

    @property
    def has_steps(self) -> bool:
        """Whether the run has a checkpoint, be it a damaged one."""
        names = [path.name for path in self.checkpoints.glob("*")]
        return any(name.removesuffix(DAMAGED).isdecimal() for name in names)

    def _newest_step(self) -> int:
        steps = [int(path.name) for path in self.checkpoints.glob("*") if path.name.isdecimal()]
        return max(steps, default=0)

    def config(self) -> dict[str, Any]:
        """Returns the config of the run.

        Raises:
          WorkdirError: if there is none.
          DamagedFileError: if it is damaged.
        """
        if self.folder.is_file():
            raise WorkdirError(f"workdir={self.folder} is a file; give the folder of a run")
        plain = trusted.read_json(self.config_file)
        if plain is None:
            raise WorkdirError(f"workdir={self.folder} holds no run: there is no config.json")
        try:
            return config_loading.to_plain(plain)
        except (ValueError, TypeError, AttributeError) as error:
            raise DamagedFileError(f"{self.config_file} is no config of a run: {error}") from None

    def results(self) -> dict[str, Any] | None:
        """Returns the results of a finished run, or None.

        Raises:
          DamagedFileError: if they are damaged.
        """
        return trusted.read_json(self._results_file, "delete it, and experiments.train writes it anew")

    def results_of(self, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """Returns the results of a finished run; None also if the config has another number of steps than the run."""
        results = self.results()
        return None if results is None or _length_differences(self.config(), config) else results

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Writes the results, which marks the run as finished."""
        text = {self._results_file.name: to_json_text(results)}
        trusted.write(self.folder, text, finished=[self.metrics.name] if self.metrics.exists() else [])

    def log(self) -> list[dict[str, Any]]:
        """Returns the lines of the log; what is damaged is named on standard error, and what can be read is kept."""
        if problem := trusted.problem(self.metrics):
            print(f"{problem}; lines of it may be wrong", file=sys.stderr)
        return read_lines(self.metrics)

    def add_session(self, *, step: int, devices: str) -> str | None:
        """Records a start of training from `step`; returns what differs from the session before (see `sessions.add`)."""
        return sessions.add(self.folder / "sessions.jsonl", step=step, devices=devices)

    def release(self) -> None:
        """Releases the lock for other processes; the end of the process does so too."""
        self._lock.close()

    def _undo(self) -> None:
        """Removes the folders that `open` made, if nothing is in them."""
        if self._lock is not None:
            self._lock.close()
        with contextlib.suppress(OSError):
            if self._made:
                (self.folder / LOCK).unlink(missing_ok=True)
            for path in self._made:
                path.rmdir()

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


def _length_differences(run: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Returns the lines of `loading.differences` about the length of training."""
    parts = [{"train": {name: c["train"].get(name) for name in ("steps", "epochs")}} for c in (run, given)]
    return config_loading.differences(*parts, ignore=())


def _with_length(run: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config of a run with the length of training of another config."""
    fields = ("steps", "epochs")
    kept = {name: value for name, value in run["train"].items() if name not in fields}
    return {**run, "train": kept | {name: given["train"][name] for name in fields if name in given["train"]}}
