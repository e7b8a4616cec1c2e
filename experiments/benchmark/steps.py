"""The study `steps`: whole training steps of language models, on rows that are whole, marked as one segment, or packed.

A step is that of training (`experiments.training.step`): embedding, layers, cross-entropy, both passes and
the optimizer, AdamW. Models are those of `experiments.benchmark.models`, and tokens are random.
"""

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.analysis.utilization import peak_flops, training_flops
from experiments.benchmark import alone, models
from experiments.benchmark.collectives import total_sent
from experiments.benchmark.processes import Say
from experiments.benchmark.timing import interleaved, peak_bytes
from experiments.config.loading import MeshConfig
from experiments.parallel.mesh import Devices
from experiments.tasks import tokens
from experiments.training.model import SplitModel
from experiments.training.optimizers import Optimizer, OptimizerConfig
from experiments.training.step import StepFunctions, metric_names_of
from layers.kernels import dispatch
from layers.registry import suggestion
from seqmodels import build_model

ROWS = ("whole", "ones", "packed")
DOCUMENTS = 4  # per packed row
SECONDS = 0.5  # of a measurement


class Setting(NamedTuple):
    """How steps are measured.

    Attributes:
      size: a size in `models.SIZES`; the usual one if None.
      batch, time: rows per device and tokens per row; those of the size if None.
      count: number of devices, which divide the batch.
      unrolled: whether layers are compiled one by one instead of under `jax.lax.scan`.
      rounds: measurements per step.
      prefer: implementations of primitives that are taken wherever they can be, by primitive.
    """

    size: str | None = None
    batch: int | None = None
    time: int | None = None
    count: int = 1
    unrolled: bool = False
    rounds: int = 5
    prefer: Mapping[str, str] = {}

    @property
    def shape(self) -> tuple[str, int, int]:
        """Size, rows per device and tokens per row."""
        size = self.size or models.usual_size()
        rows, length = models.SIZES[size][2:4]
        return size, self.batch or rows, self.time or length


def cases(setting: Setting, names: Sequence[str], rows: Sequence[str]) -> list[str]:
    """Returns what is measured, "MODEL/ROWS".

    Args:
      names: models; the usual ones if empty.
      rows: "whole" (no segment ids), "ones" (one segment per row) or "packed" (four documents per row).

    Raises:
      ValueError: unknown names, more devices than there are, or rows too short to be packed.
    """
    for kind in rows:
        if kind not in ROWS:
            raise ValueError(f"{kind!r} is unknown{suggestion(kind, ROWS)}; choose from {', '.join(ROWS)}")
    _, _, length = setting.shape
    if "packed" in rows and length < DOCUMENTS:
        raise ValueError(
            f"time={length} with rows=packed; expected at least {DOCUMENTS} tokens, one per document"
        )
    Devices.first(setting.count, MeshConfig())
    return [f"{name}/{kind}" for name in models.chosen(names) for kind in rows]


def run(
    setting: Setting,
    chosen: Sequence[str],
    report: Callable[[dict[str, Any]], None],
    say: Say,
    workers: int | None = None,
    patience: float = math.inf,
) -> list[dict[str, Any]]:
    """Returns the time of a step for each of `cases`; `report` receives each row as it is known.

    Args:
      workers: processes that compile beside each other and measure in turn (see `alone`), where a step that fails is a row; None
        measures in this process.
      patience: seconds for a step after the one before it, with `workers`.
    """
    if workers is not None:
        return alone.run(functools.partial(measure, setting), chosen, patience, report, workers)
    rows = []
    for case in chosen:
        say(case)
        rows.append(dict(case=case) | measure(setting, case))
        report(rows[-1])
    return rows


def measure(setting: Setting, case: str) -> dict[str, Any]:
    """Returns the time of a step and what it needs."""
    name, kind = case.split("/")
    size, batch, length = setting.shape
    config = models.config(name, size, length) | dict(scan=not setting.unrolled)
    devices = Devices.first(setting.count, MeshConfig())
    with dispatch.preferred(setting.prefer):
        found = measured(config, kind, devices, batch, length, setting.rounds)
    return dict(model=name, size=size, unrolled=setting.unrolled) | found


def line(row: Mapping[str, Any]) -> str:
    """Returns a row of the table."""
    if wrong := row.get("failed") or row.get("out_of_memory"):
        return f"{row['case']:36}  {wrong}"
    label = f"{row['model']} {row['size']}, {row['rows']} rows"
    share = f"{row['utilization']:5.1%}" if row["utilization"] else ""
    return (
        f"{label:36}  {row['milliseconds']:9.2f} ms  {row['tokens_per_second']:10.0f} tokens/s  {share:5}  "
        f"{row['temporary_bytes'] / 1e9:7.2f} GB  {', '.join(row['implementations'])}"
    )


def step_functions(
    config: Mapping[str, Any], arrays: Mapping[str, np.ndarray], devices: Devices, packed: int = 1
) -> tuple[SplitModel, StepFunctions]:
    """Returns a language model and its training step on these devices.

    Args:
      config: the section `model`.
      arrays: a batch, which names what a step reports.
      packed: the most segments of a row.
    """
    model = SplitModel(
        lambda rngs: build_model(config, rngs=rngs), padding="end", packed=packed, unprojected=True
    )
    rule = OptimizerConfig(learning_rate=1e-3, weight_decay=0.1)
    functions = StepFunctions(
        model,
        Optimizer(rule, model.parameters, warmup_steps=10, total_steps=1000),
        tokens.cross_entropy,
        metric_names=metric_names_of(model, tokens.cross_entropy, {k: v[:1] for k, v in arrays.items()}),
        devices=devices,
    )
    return model, functions


def measured(
    config: Mapping[str, Any], kind: str, devices: Devices, batch: int, length: int, rounds: int
) -> dict[str, Any]:
    """Returns the time of a step of the model of a config, what it needs and, on several devices, what a device sends.

    Args:
      kind: one of `ROWS`.
      batch: rows per device.
    """
    arrays = random_batch(kind, batch * len(devices), length, config["vocab_size"])
    packed = DOCUMENTS if kind == "packed" else 1
    model, functions = step_functions(config, arrays, devices, packed)
    state, given = functions.layout.initial(0), devices.put_batch(arrays)
    start = time.perf_counter()
    with dispatch.noted() as taken:
        step = functions.train.lower(state, given).compile()
    seconds = time.perf_counter() - start

    def take() -> Any:
        nonlocal state
        state, metrics = step(state, given)
        return metrics

    with alone.turn():
        timing = interleaved({"step": take}, rounds, SECONDS)["step"]
    peak = peak_flops(device.device_kind for device in devices.mesh.devices.flat)
    flops = training_flops(model, tokens.cross_entropy, arrays)
    return dict(
        rows=kind,
        batch=batch * len(devices),
        time=length,
        devices=len(devices),
        parameters=model.num_parameters,
        milliseconds=timing.median,
        quartiles_milliseconds=[timing.low, timing.high],
        tokens_per_second=1e3 * batch * len(devices) * length / timing.median,
        flops=flops,
        utilization=peak and 1e3 * flops / (peak * timing.median),
        temporary_bytes=step.memory_analysis().temp_size_in_bytes,
        needed_bytes=peak_bytes(step),
        sent_bytes=None if len(devices) == 1 else total_sent(step.as_text()),
        implementations=sorted({"/".join(one) for one in taken}),
        compile_seconds=seconds,
    )


def random_batch(kind: str, batch: int, length: int, vocabulary: int) -> dict[str, np.ndarray]:
    """Returns random tokens, the next ones as labels, and segment ids of this kind of rows."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(1, vocabulary, (batch, length + 1)).astype(np.int32)
    arrays = dict(inputs=drawn[:, :-1], labels=drawn[:, 1:], weight=np.ones(batch, np.float32))
    if kind == "ones":
        arrays["segment_ids"] = np.ones((batch, length), np.int32)
    if kind == "packed":
        cuts = np.stack(
            [np.sort(rng.choice(np.arange(1, length), DOCUMENTS - 1, replace=False)) for _ in range(batch)]
        )
        arrays["segment_ids"] = 1 + (np.arange(length)[None, :, None] >= cuts[:, None]).sum(2, dtype=np.int32)
    return arrays
