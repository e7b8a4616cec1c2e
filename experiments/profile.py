"""Says what one training step spends its time on: traces a few on a GPU and sums kernels by our source files.

    python -m experiments.profile --config=configs/lra/listops.py:mixer=s5 --out=profiles/listops-s5 --width=960

Uses one GPU, a full batch of one bucket width, and the state before the first step. `--prefer=linear_recurrence/gpu` takes
an implementation of a primitive wherever it can be taken; `--compare=linear_recurrence/xla` times the step with it too, in
turn with the one that is profiled. Prints a table and writes profile.json. Exit codes: 0 done; 2 no GPU, or the config or an
argument cannot be used.
"""

import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.analysis.hlo_sources import attribute, kernel_sources
from experiments.benchmark.timing import Timing, interleaved
from experiments.config.command_line import EXIT_REFUSED, Parser, folder, names, positive_integer, reporting
from experiments.data import bucketing
from experiments.parallel.mesh import Devices
from experiments.runs.files import to_json_text, write_atomically
from experiments.runs.sessions import git_revision, versions
from experiments.training import experiment
from layers.kernels import dispatch
from layers.kernels.suites import SUITES

STEPS_SECONDS = 0.2  # length of a measurement
ROOT = Path(__file__).absolute().parents[1]


class Kernel(NamedTuple):
    """A kernel run in a trace: its name, the instruction that launched it if known, and milliseconds."""

    name: str
    operation: str | None
    milliseconds: float


@reporting
def main(argv: Sequence[str] | None = None) -> int:
    """Profiles and reports; returns the exit code."""
    parser = Parser("experiments.profile", __doc__, config=True)
    parser.add_argument(
        "--out", required=True, type=folder, help="folder for profile.json; made if it does not exist"
    )
    parser.add_argument(
        "--width", type=positive_integer, help="width of the batch (default: that of most sequences)"
    )
    parser.add_argument(
        "--steps",
        type=positive_integer,
        default=10,
        help="steps to trace, and rounds in which steps are timed",
    )
    parser.add_argument(
        "--prefer", type=names, default=(), help="implementations, as primitive/implementation"
    )
    parser.add_argument(
        "--compare", type=names, default=(), help="implementations that the step is timed with too"
    )
    values = parser.parse_args(argv)
    if jax.default_backend() != "gpu":
        print(
            f"Profiling needs a GPU, whose kernels the trace names; JAX has found {jax.default_backend()} only.",
            file=sys.stderr,
        )
        return EXIT_REFUSED
    prefer = preferences(values.prefer)
    others = {name: prefer | preferences([name], "compare") for name in values.compare}
    plan = experiment.build(values.config)
    devices = Devices.first(1)
    plan.check_devices(devices)
    batch = training_batch(plan, values.width)
    record = dict(
        command=["experiments.profile", *sys.argv[1:]],
        devices=devices.describe(),
        versions=versions(),
        git=git_revision(),
        batch={name: list(array.shape) for name, array in batch.items()},
        steps=values.steps,
    )
    record |= profile_step(plan, devices, batch, values.steps, prefer, others)
    values.out.mkdir(parents=True, exist_ok=True)
    write_atomically(values.out / "profile.json", to_json_text(record))
    print(describe(record))
    return 0


def preferences(names: Sequence[str], flag: str = "prefer") -> dict[str, str]:
    """Returns implementations by primitive, from "primitive/implementation" as passed by `flag`.

    Raises:
      ValueError: there is no such primitive or implementation.
    """
    known = [
        f"{primitive}/{impl}"
        for primitive, suite in SUITES.items()
        for impl in ("reference", *suite.implementations, *suite.gpu_implementations)
    ]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{flag}={unknown[0]!r} is no implementation; choose from {', '.join(known)}")
    return dict(name.split("/") for name in names)


def training_batch(plan: experiment.Experiment, width: int | None) -> dict[str, np.ndarray]:
    """Returns a batch of training sequences padded to `width`, repeated if there are too few.

    Args:
      width: width of training batches; None for that of most sequences.

    Raises:
      ValueError: if no batch has this width.
    """
    source = plan.task.splits["train"]
    bounds = bucketing.check_bucket_bounds(source.lengths, plan.data.bucket_bounds)
    padded = bounds[np.searchsorted(bounds, source.lengths)]
    widths, counts = np.unique(padded, return_counts=True)
    if width is None:
        width = int(widths[np.argmax(counts)])
    if width not in widths:
        raise ValueError(f"width={width}; training batches have the widths {', '.join(map(str, widths))}")
    rows = np.resize(np.flatnonzero(padded == width), plan.train.batch_size)
    return source.gather(rows, width) | {"weight": np.ones(len(rows), np.float32)}


class Steps:
    """The compiled training step, run repeatedly on one batch.

    Attributes:
      compiled: compiled step.
    """

    def __init__(self, plan: experiment.Experiment, devices: Devices, batch: Any, prefer: Mapping[str, str]):
        self._batch = batch
        functions = plan.step_functions(devices)
        self._state = functions.layout.initial(plan.config["seed"])
        with dispatch.preferred(prefer):
            self.compiled = functions.train.lower(self._state, batch).compile()

    def take(self) -> Any:
        """Runs a step and returns its metrics, which may still be being computed."""
        self._state, metrics = self.compiled(self._state, self._batch)
        return metrics


def profile_step(
    plan: experiment.Experiment,
    devices: Devices,
    batch: Mapping[str, np.ndarray],
    steps: int,
    prefer: Mapping[str, str],
    others: Mapping[str, Mapping[str, str]],
) -> dict[str, Any]:
    """Compiles, times and traces the training step; returns the figures of `summarize`.

    Args:
      steps: number of steps to trace, and of rounds in which steps are timed.
      prefer: preferred implementations by primitive.
      others: the same by name, for further steps that are timed too.
    """
    batch = devices.put_batch(batch)
    step = Steps(plan, devices, batch, prefer)
    beside = {name: Steps(plan, devices, batch, choices) for name, choices in others.items()}
    # Timed outside the trace, which slows the host, and many in a row: as in training, the host runs ahead.
    takers = {"profiled": step.take, **{name: one.take for name, one in beside.items()}}
    times = interleaved(takers, steps, seconds=STEPS_SECONDS)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                metrics = step.take()
            jax.block_until_ready(metrics)
        (file,) = Path(folder).rglob("*.xplane.pb")
        kernels = kernels_in(jax.profiler.ProfileData.from_file(str(file)).planes)
    figures = summarize(kernels, kernel_sources(step.compiled.as_text(), ROOT), steps, times.pop("profiled"))
    return figures | {"others": {name: _milliseconds(timing) for name, timing in times.items()}}


def _milliseconds(timing: Timing) -> dict[str, Any]:
    return dict(
        milliseconds_per_step=timing.median, quartiles_milliseconds_per_step=[timing.low, timing.high]
    )


def kernels_in(planes: Iterable[Any]) -> list[Kernel]:
    """Returns all kernels on the GPU streams of a trace (`jax.profiler.ProfileData.planes`)."""
    lines = (line for plane in planes if "GPU" in plane.name for line in plane.lines)
    events = (event for line in lines if "Stream" in line.name for event in line.events)
    return [Kernel(event.name, dict(event.stats).get("hlo_op"), event.duration_ns / 1e6) for event in events]


def summarize(
    kernels: Iterable[Kernel], sources: Mapping[str, str], steps: int, timing: Timing
) -> dict[str, Any]:
    """Returns averages over the steps, in total and by source file, in order of decreasing time.

    Args:
      sources: files by kernel, from `hlo_sources.kernel_sources`.
      timing: timing of a step without a trace.

    Raises:
      RuntimeError: if there are no kernels.
    """
    totals: dict[str, list[float]] = {}
    for kernel in kernels:
        total = totals.setdefault(attribute(kernel.name, kernel.operation, sources), [0.0, 0])
        total[0] += kernel.milliseconds
        total[1] += 1
    busy = sum(spent for spent, _ in totals.values())
    if not busy:
        raise RuntimeError("the trace holds no kernels of a GPU; another profiler may be using it")
    return _milliseconds(timing) | dict(
        busy_milliseconds_per_step=busy / steps,
        kernels_per_step=sum(count for _, count in totals.values()) / steps,
        sources={
            file: dict(milliseconds=spent / steps, kernels=count / steps, share=spent / busy)
            for file, (spent, count) in sorted(totals.items(), key=lambda item: -item[1][0])
        },
    )


def describe(record: Mapping[str, Any]) -> str:
    """Returns the readable table."""
    shape = " x ".join(map(str, record["batch"]["inputs"]))
    whole, busy = record["milliseconds_per_step"], record["busy_milliseconds_per_step"]
    others = {name: other["milliseconds_per_step"] for name, other in record["others"].items()}
    rows = record["sources"] | {"all": dict(milliseconds=busy, share=1.0, kernels=record["kernels_per_step"])}
    wide = max(map(len, rows))
    return "\n".join(
        [
            f"{record['devices']}, batch {shape}: {whole:.2f} ms a step, kernels {busy:.2f} ms",
            *(f"with {name}: {other:.2f} ms a step, {other / whole:.2f}x" for name, other in others.items()),
            f"{'':{wide}}  {'ms':>8}  {'share':>6}  {'kernels':>7}",
            *(
                f"{name:{wide}}  {row['milliseconds']:8.3f}  {row['share']:6.1%}  {row['kernels']:7.0f}"
                for name, row in rows.items()
            ),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
