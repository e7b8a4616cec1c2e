"""The study `weak_scaling`: training steps with as many rows per device on 1, 2, 4 and more devices of one host.

Each case runs in a process of its own (`alone`), one after the other:

    MODEL/fsdp/COUNT      parameters and optimizer are divided over COUNT devices, as FSDP does
    MODEL/tensor/COUNT    heads and hidden channels over 2 devices, the rest as FSDP over the others; from 4 devices on

COUNT is 1, 2, 4, ... up to all devices. A row has the tokens per second and device, also as a share of those of MODEL/fsdp/1, the bytes
that a device sends per step, counted from the compiled program, and the memory that the program needs on each. Rows that devices
share are those of the study `long_rows`.
"""

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.benchmark import alone, models, steps
from experiments.benchmark.record import Record
from experiments.config.command_line import ArgumentError
from experiments.config.loading import MeshConfig
from experiments.parallel.mesh import Devices
from layers.kernels import dispatch

MODELS = "attention", "gated_deltanet", "mamba2"
TENSOR = 2  # devices that share heads


class Setting(NamedTuple):
    """How steps are measured.

    Attributes:
      size: a size in `models.SIZES`; 1.3b, or tiny on a CPU, if None.
      batch, time: rows per device and tokens per row; those of the size if None.
      unrolled: whether layers are compiled one by one instead of under `jax.lax.scan`.
      rounds: measurements per step.
      prefer: implementations of primitives that are taken wherever they can be, by primitive.
    """

    size: str | None = None
    batch: int | None = None
    time: int | None = None
    unrolled: bool = False
    rounds: int = 5
    prefer: Mapping[str, str] = {}


def study(out: Path, setting: Setting, only: Sequence[str], count: int | None, patience: float) -> int:
    """Measures every case in a process of its own, writes weak_scaling.json and weak_scaling.png, and returns the exit code.

    This process leaves the devices alone.

    Args:
      only: models; the usual ones if empty.
      count: number of devices to go up to; all if None.
      patience: seconds that a case may prepare, and that its steps may take.
    """
    models.chosen(only)  # raises for an unknown one
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")
    (found,) = alone.run(look, [str(count or "all")], patience, lambda _: None)
    if "failed" in found:
        raise ArgumentError(found["failed"].removeprefix("ValueError: "))
    print(found["device"], flush=True)
    record = Record(out / "weak_scaling.json", compared, line, device=found["device"])
    alone.run(functools.partial(measure, setting), cases(found["count"], only), patience, record.add)
    draw(record.rows, out / "weak_scaling.png", found["device"])
    return 1 if any("failed" in row for row in record.rows) else 0


def look(name: str) -> dict[str, Any]:
    """Returns how many devices there are, and which; for a process of its own, as looking takes memory of each.

    Args:
      name: number of devices to look for, or "all".
    """
    devices = Devices.first(None if name == "all" else int(name))
    return dict(count=len(devices), device=devices.describe())


def cases(count: int, names: Sequence[str]) -> list[str]:
    """Returns the cases on up to `count` devices.

    Args:
      names: models; the usual ones if empty.

    Raises:
      ValueError: a model is unknown.
    """
    counts = [2**power for power in range(count.bit_length()) if 2**power <= count]
    found = []
    for name in models.chosen(names or MODELS):
        found += [f"{name}/fsdp/{number}" for number in counts]
        found += [f"{name}/tensor/{number}" for number in counts if number > TENSOR]
    return found


def measure(setting: Setting, case: str) -> dict[str, Any]:
    """Returns what a case gives."""
    name, how, number = case.split("/")
    count = int(number)
    mesh = MeshConfig(fsdp=count) if how == "fsdp" else MeshConfig(tensor=TENSOR, fsdp=count // TENSOR)
    devices = Devices.first(count, mesh)
    size = setting.size or ("tiny" if jax.default_backend() == "cpu" else "1.3b")
    rows, length = models.SIZES[size][2:4]
    config = models.config(name, size, setting.time or length) | dict(scan=not setting.unrolled)
    with dispatch.preferred(setting.prefer):
        found = steps.measured(
            config, "whole", devices, setting.batch or rows, setting.time or length, setting.rounds
        )
    per_device = found["tokens_per_second"] / count
    return (
        dict(model=name, size=size, mesh=devices.describe(), tokens_per_second_per_device=per_device) | found
    )


def compared(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the row with its speed per device as a share of that of one device, if this is the row or one before it."""
    name = row["case"].partition("/")[0]
    one = next((r for r in (*rows, row) if r["case"] == f"{name}/fsdp/1" and "tokens_per_second" in r), None)
    if one is None or "tokens_per_second" not in row:
        return dict(row)
    return dict(row) | dict(
        efficiency=row["tokens_per_second_per_device"] / one["tokens_per_second_per_device"]
    )


def line(row: Mapping[str, Any]) -> str:
    """Returns a line of the table."""
    if "tokens_per_second" not in row:
        return f"{row['case']:<28}{row.get('out_of_memory') or row.get('failed')}"
    sent = row["sent_bytes"]
    share = f"{row['efficiency']:7.1%}" if "efficiency" in row else ""
    used = "" if row["utilization"] is None else f"{row['utilization']:7.1%} of the peak"
    return (
        f"{row['case']:<28}{row['tokens_per_second_per_device']:>12.0f} tokens/s per device {share}{used}"
        f"  {row['needed_bytes'] / 1e9:7.2f} GB" + ("" if sent is None else f"  {sent / 1e9:7.2f} GB sent")
    )


def draw(rows: Sequence[Mapping[str, Any]], path: Path, device: str) -> None:
    """Draws the tokens per second and device against the number of devices."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    kinds = dict.fromkeys(row["case"].rpartition("/")[0] for row in rows if "tokens_per_second" in row)
    for kind in kinds:
        points = sorted(
            (row["devices"], row["tokens_per_second_per_device"])
            for row in rows
            if row["case"].rpartition("/")[0] == kind and "tokens_per_second" in row
        )
        axes.plot(*zip(*points, strict=True), marker="o", label=kind)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("devices")
    axes.set_ylabel("tokens per second and device")
    axes.set_title(device)
    if kinds:
        axes.legend()
    figure.savefig(path, dpi=120)
