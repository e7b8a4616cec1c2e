"""Sweeps over whole training runs: the points of a file, each a run of `experiments.train` in a folder of its own.

The file defines get_sweep(), which returns or yields one item per run: a dict of values by field, such as
{"optimizer.learning_rate": 1e-3, "seed": 1}, or a list of texts, such as ["optimizer.learning_rate=1e-3", "seed=1"]. The field
"config" is the config of that run, where it is not that of the command.
"""

import dataclasses
import math
import os
import re
import runpy
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.config.command_line import EXIT_INTERRUPTED, ArgumentError, ConfigFileError, load
from experiments.runs.directory import RunDirectory
from experiments.runs.files import DamagedFileError, to_json_text, write_atomically
from experiments.runs.results import number as metric_text
from experiments.runs.results import total_seconds
from experiments.runs.trainings import Trainings

PREFIX = "--config."
ARRAY_TASK = "SLURM_ARRAY_TASK_ID"
LONGEST_NAME = 80
MEMORY = 0.9  # part of a device's memory that runs share


@dataclasses.dataclass(frozen=True)
class Point:
    """A run of a sweep.

    Attributes:
      number: its place in the file, from 0.
      config: config file and its arguments.
      overrides: fields and the texts of their values, in the order of the file.
    """

    number: int
    config: str
    overrides: tuple[tuple[str, str], ...]

    @property
    def name(self) -> str:
        """Name of its folder: the number, and what the point sets."""
        said = ",".join(f"{field.rpartition('.')[2]}={text}" for field, text in self.overrides)
        return re.sub(r"[^\w.,=+-]+", "_", f"{self.number:03d}-{said}")[:LONGEST_NAME].rstrip("-,")

    def plain_config(self) -> dict[str, Any]:
        """Returns the config with the overrides."""
        return load(self.config, self.overrides)

    def flags(self, folder: Path) -> list[str]:
        """Returns the arguments of `experiments.train` for a run in a folder."""
        values = [f"{PREFIX}{field}={text}" for field, text in self.overrides]
        return [f"--config={self.config}", *values, f"--workdir={folder}"]


def read(file: Path, config: str | None) -> list[Point]:
    """Returns the points of a file.

    Args:
      config: config of the points that name none.

    Raises:
      ArgumentError: if the file cannot be run, defines no get_sweep, or an item of it is no point.
    """
    if file.is_dir():
        raise ArgumentError(f"--file={file} is a folder; give a Python file that defines get_sweep")
    if not file.is_file():
        raise ArgumentError(f"--file={file}: there is no such file")
    try:
        get_sweep = runpy.run_path(str(file)).get("get_sweep")
        given = get_sweep() if callable(get_sweep) else ()
        items = list(given) if isinstance(given, Iterable) else None
    except Exception as error:  # noqa: BLE001  whatever the file of a user raises
        raise ConfigFileError(f"--file={file}: {type(error).__name__}: {error}") from None
    if not callable(get_sweep):
        raise ArgumentError(f"--file={file}: the file defines no get_sweep")
    if items is None or isinstance(given, Mapping | str):
        raise ArgumentError(
            f"--file={file}: get_sweep gives {given!r}; expected one item for each run, in a list"
        )
    if not items:
        raise ArgumentError(f"--file={file}: get_sweep gives no run")
    return [_point(file, number, item, config) for number, item in enumerate(items)]


def _point(file: Path, number: int, item: Any, config: str | None) -> Point:
    where = f"--file={file}, item {number} of get_sweep"
    if isinstance(item, Mapping):
        pairs = [(field, _text(value)) for field, value in item.items()]
    elif isinstance(item, Iterable) and not isinstance(item, str):
        pairs = [tuple(text.partition("=")[::2]) if isinstance(text, str) else (text, "") for text in item]
    else:
        raise ArgumentError(
            f"{where} is {item!r}; expected a dict of values by field, or a list of FIELD=VALUE"
        )
    for field, text in pairs:
        if not isinstance(field, str) or not field or not text:
            raise ArgumentError(
                f"{where} has {field!r}; expected FIELD=VALUE, such as optimizer.learning_rate=1e-3"
            )
    fields = {field.removeprefix(PREFIX).removeprefix("--"): text for field, text in pairs}
    config = fields.pop("config", config)
    if config is None:
        raise ArgumentError(f"{where} names no config; give --config, or the field config")
    return Point(number, config, tuple(fields.items()))


def _text(value: Any) -> str:
    """Returns the text that the command line reads as the value."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def chosen(points: Sequence[Point], index: str | None) -> list[Point]:
    """Returns the points that --index means: all, one by its number, or that of the SLURM array.

    Raises:
      ArgumentError: if there is no such point.
    """
    if index is None:
        return list(points)
    given = os.environ.get(ARRAY_TASK) if index == "slurm" else index
    if given is None:
        raise ArgumentError(f"--index=slurm, but {ARRAY_TASK} is not set: this is no task of a SLURM array")
    if not given.isdecimal() or int(given) >= len(points):
        said = f"--index={index}" + (f" ({ARRAY_TASK}={given})" if index == "slurm" else "")
        raise ArgumentError(f"{said}; expected a number from 0 to {len(points) - 1}, or slurm")
    return [points[int(given)]]


def environments(devices: Sequence[str] | None) -> list[dict[str, str]]:
    """Returns the variables of the processes of the runs that go on at the same time, one for each item of --devices.

    A device that is named k times has k runs at a time, each with a k-th of its memory.

    Args:
      devices: values of CUDA_VISIBLE_DEVICES; None for one run at a time, on the devices that this process sees.

    Raises:
      ArgumentError: if an item is not one or several names of devices, separated by commas.
    """
    if devices is None:
        return [{}]
    found = []
    for device in devices:
        if not re.fullmatch(r"[\w-]+(,[\w-]+)*", device):
            raise ArgumentError(f"--devices has {device!r}; expected numbers of GPUs, such as 0 1 or 0,1 2,3")
        found.append({"CUDA_VISIBLE_DEVICES": device})
        if (times := devices.count(device)) > 1:
            found[-1]["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{MEMORY / times:.3f}"
    return found


def run(
    points: Sequence[Point],
    everything: Sequence[Point],
    out: Path,
    deadline: float | None,
    devices: Sequence[str] | None = None,
) -> int:
    """Trains the points that are not finished; writes the table of `everything` after each.

    A point with a damaged file is named and counts as failed. With `devices`, the output of each run is appended to OUT/NUMBER.log.

    Args:
      deadline: time of `time.monotonic` at which the runs that are under way save and leave.
      devices: what each of the runs that go on at the same time sees, see `environments`; None for one after the other.

    Returns:
      0 if all are finished; 75 if some are left, and the same command resumes; 1 if some failed.

    Raises:
      ArgumentError, ValueError, TypeError: if a config is invalid or a folder holds another run, before any is trained.
    """
    free = deque(environments(devices))
    waiting, failed = _unfinished(points, out)
    out.mkdir(parents=True, exist_ok=True)
    print(f"{len(points) - len(waiting) - failed} of {len(points)} runs are finished", flush=True)
    total, names = len(waiting), {point.number: point.name for point in waiting}
    interrupted, used = False, {}
    with Trainings() as trainings:
        while True:
            left = math.inf if deadline is None else deadline - time.monotonic()
            while waiting and free and left > 0 and not interrupted and not trainings.signalled:
                point = waiting.popleft()
                print(f"[{total - len(waiting)}/{total}] {point.name}", flush=True)
                limit = [] if deadline is None else [f"--stop_after_seconds={left:.1f}"]
                used[point.number] = free.popleft()
                log = None if devices is None else out / f"{point.number:03d}.log"
                flags = [*point.flags(out / point.name), *limit]
                trainings.start(point.number, flags, used[point.number], log)
            if not trainings:
                break
            number, code = trainings.ended()
            free.append(used.pop(number))
            report(everything, out)
            if code in (EXIT_INTERRUPTED, 130, 143):
                interrupted = True
            elif code:
                failed += 1
                where = "" if devices is None else f"; see {out / f'{number:03d}.log'}"
                print(f"{names[number]} failed with exit code {code}{where}", file=sys.stderr, flush=True)
    report(everything, out)
    if waiting and not interrupted and not trainings.signalled:
        print(f"{len(waiting)} runs are left; the same command resumes", file=sys.stderr)
    if waiting or interrupted:
        return EXIT_INTERRUPTED
    if failed:
        print(f"{failed} of {len(points)} runs failed; the same command tries them again", file=sys.stderr)
    return 1 if failed else 0


def _unfinished(points: Sequence[Point], out: Path) -> tuple[deque[Point], int]:
    """Returns the points without results, and the number of those whose files are damaged, which are named."""
    waiting, failed = deque[Point](), 0
    for point in points:
        said = f"run {point.number} ({point.name})"
        try:
            directory, config = RunDirectory(out / point.name), point.plain_config()
            if directory.check(config) is None or directory.results_of(config) is None:
                waiting.append(point)
        except DamagedFileError as error:
            print(f"{said}: {error}", file=sys.stderr)
            failed += 1
        except (ValueError, TypeError) as error:
            raise ArgumentError(f"{said}: {error}") from None
    return waiting, failed


def report(points: Sequence[Point], out: Path) -> None:
    """Writes the table of all points, those not finished too, to OUT/table.md and OUT/sweep.json."""
    records = [_record(point, RunDirectory(out / point.name)) for point in points]
    write_atomically(out / "sweep.json", to_json_text(records))
    write_atomically(out / "table.md", table(records))


def _record(point: Point, directory: RunDirectory) -> dict[str, Any]:
    try:
        results = directory.results() if directory.config_file.exists() else None
    except DamagedFileError:  # `run` names it
        results = None
    record = dict(number=point.number, name=point.name, config=point.config, overrides=dict(point.overrides))
    if results is None:
        return record | dict(finished=False)
    metric, direction = results["selection"]
    return record | dict(
        finished=True,
        metric=metric,
        direction=direction,
        validation=results["validation"].get(metric),
        test=None if results["test"] is None else results["test"].get(metric),
        best_step=results["best_step"],
        parameters=results["parameters"],
        seconds=total_seconds(results),
        devices=results["devices"],
    )


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Returns a Markdown table with a line per run and, below it, the run with the best validation."""
    fields = list(dict.fromkeys(field for record in records for field in record["overrides"]))
    configs = len({record["config"] for record in records}) > 1
    head = ["run", *(["config"] if configs else []), *fields, "validation", "test", "best step", "seconds"]
    lines = [head, ["---"] * len(head)]
    for record in records:
        line = [str(record["number"]), *([record["config"]] if configs else [])]
        line += [record["overrides"].get(field, "") for field in fields]
        if record["finished"]:
            values = [
                metric_text(record["validation"]),
                "" if record["test"] is None else metric_text(record["test"]),
            ]
            line += [*values, str(record["best_step"]), f"{record['seconds']:.0f}"]
        else:
            line += ["not finished", "", "", ""]
        lines.append(line)
    text = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
    scored = [record for record in records if record["finished"] and record["validation"] is not None]
    if not scored:
        return text + "\n"
    sign = 1 if scored[0]["direction"] == "max" else -1
    best = max(scored, key=lambda record: sign * record["validation"])
    said = f"Best validation {best['metric']}: run {best['number']}, {metric_text(best['validation'])}."
    return f"{text}\n\n{said} Seconds are those of training, evaluation and compilation.\n"
