"""The study `long_rows`: rows so long that several devices share one, in training and in prefill, beside one device.

Each case runs in a process of its own (`alone`), of which `--workers` compile beside each other. With T tokens, 262,144 if
`--time` does not say otherwise, they are

    links                             what sends, gathers and exchanges between the devices take (`links`)
    train/MODEL/one, /whole, /METHOD  a training step on one row: T / 2 tokens and T on one device, T cut over all. MODEL is a
                                      Gated DeltaNet, METHOD all_gather or all_scan, or a 3:1 hybrid, METHOD ulysses, zigzag or
                                      balanced_ring
    transformer/one, /METHOD          a training step of a Transformer on T / 2 tokens, by every method of attention
    memory/one/LENGTH, /all/LENGTH    the Gated DeltaNet on 2 T and 4 T tokens, with a backward pass that recomputes blocks
    prefill/float32, /bfloat16        4 T tokens read in chunks by one device that carries the state, and cut over all: a small
                                      Gated DeltaNet in float32, and the one of `--size` (`parallel_row`)

Steps are those of the study `steps`, with layers under a scan but on a CPU. Rows of several devices have the bytes that each
sends per step, counted from the compiled program. A device without memory for a step is a result. Cases of `memory` run one after
the other, whatever `--workers` is.
"""

import functools
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import numpy as np

from experiments.analysis.utilization import training_flops
from experiments.benchmark import alone, links, models, parallel_row
from experiments.benchmark.collectives import total_sent
from experiments.benchmark.record import Record
from experiments.benchmark.steps import random_batch, step_functions
from experiments.benchmark.timing import peak_bytes
from experiments.config.loading import MeshConfig
from experiments.parallel.mesh import Devices
from experiments.tasks import tokens as token_task
from layers.kernels import dispatch
from layers.kernels.sequence_parallel import AttentionMethod
from layers.registry import suggestion

TIME, TIME_ON_CPU = 2**18, 2**8
CHUNKS = 16  # that one device reads a row in
SECONDS = 15.0  # of the measured steps of a case
LINK_BYTES = tuple(4**n for n in range(6, 15, 2))
LINK_BYTES_ON_CPU = tuple(4**n for n in range(6, 9))
ALONE = "one", "whole"  # on one device: T / 2 tokens, T
DELTA, HYBRID = "gated_deltanet", "gated_deltanet_3_1"
TRAINED = {DELTA: ("all_gather", "all_scan"), HYBRID: ("ulysses", "zigzag", "balanced_ring")}


class Setting(NamedTuple):
    """How cases are measured.

    Attributes:
      time: T, tokens; the usual number if None.
      size: size of the models in `models.SIZES`; the usual one if None.
      count: number of devices that a row is cut over; all if None.
      rounds: measured steps.
      remat: what the backward pass of the cases `train` recomputes.
      prefer: implementations of primitives that are taken wherever they can be, by primitive.
    """

    time: int | None = None
    size: str | None = None
    count: int | None = None
    rounds: int = 3
    remat: str = "attention"
    prefer: Mapping[str, str] = {}

    @property
    def on_cpu(self) -> bool:
        """Whether devices are those that a CPU emulates."""
        return jax.default_backend() == "cpu"

    @property
    def tokens(self) -> int:
        """T, tokens."""
        return self.time or (TIME_ON_CPU if self.on_cpu else TIME)


def study(out: Path, setting: Setting, only: Sequence[str], patience: float, workers: int) -> int:
    """Measures every case in a process of its own, writes long_rows.json and returns the exit code.

    This process leaves the devices alone.

    Args:
      only: cases, or what their names begin with; all if empty.
      patience: seconds that a case may prepare, and that its turn may take.
      workers: the most processes at a time.
    """
    groups = grouped(chosen(only), workers)
    record = Record(out / "long_rows.json", compared, json.dumps)
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")
    measured = functools.partial(measure, setting)
    preallocate = os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE")
    for group, count in groups:
        # Processes inherit it. One pool of all memory leaves no gaps between what a large step allocates.
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = preallocate or ("false" if count > 1 else "true")
        alone.run(measured, group, patience, record.add, count)
    return 1 if any("failed" in row for row in record.rows) else 0


def cases() -> tuple[str, ...]:
    """Returns the names of all cases, each after those that it is compared with."""
    trained = [f"train/{model}/{how}" for model, by in TRAINED.items() for how in (*ALONE, *by)]
    attending = [f"transformer/{how}" for how in ("one", *get_args(AttentionMethod))]
    memory = [f"memory/{where}/{times}T" for times in (2, 4) for where in ("one", "all")]
    return ("links", *trained, "prefill/float32", "prefill/bfloat16", *attending, *memory)


def chosen(only: Sequence[str]) -> list[str]:
    """Returns the cases with these names, or whose names begin with one of them; all if there are none.

    Raises:
      ValueError: an unknown name.
    """
    known = cases()
    for name in only:
        if not any(_within(case, name) for case in known):
            raise ValueError(
                f"only={name!r} is no case{suggestion(name, known)}; expected {', '.join(known)}"
            )
    return [case for case in known if not only or any(_within(case, name) for name in only)]


def _within(case, name):
    return f"{case}/".startswith(f"{name}/")


def measure(setting: Setting, case: str) -> dict[str, Any]:
    """Returns what a case gives."""
    kind, *how = case.split("/")
    with dispatch.preferred(setting.prefer):
        row = {
            "links": _links,
            "train": _train,
            "transformer": _transformer,
            "memory": _memory,
            "prefill": _prefill,
        }[kind](setting, *how)
    return dict(device=f"{row['devices']} x {jax.devices()[0].device_kind}") | row


def _links(setting):
    devices = jax.devices()[: setting.count]
    sizes = LINK_BYTES_ON_CPU if setting.on_cpu else LINK_BYTES
    with alone.turn():
        return links.measure(devices, sizes, setting.rounds)


def _train(setting, model, how):
    length = setting.tokens // 2 if how == "one" else setting.tokens
    return _step(setting, model, length, how, setting.remat)


def _transformer(setting, how):
    return _step(setting, "attention", setting.tokens // 2, how, "none")


def _memory(setting, where, times):
    length = int(times.removesuffix("T")) * setting.tokens
    return _step(setting._replace(rounds=1), DELTA, length, "one" if where == "one" else "all_gather", "full")


def _prefill(setting, dtype):
    length = 4 * setting.tokens
    small = dtype == "float32"
    config = _config(setting, DELTA, length, "none", size="tiny" if small else None) | dict(dtype=dtype)
    with jax.default_matmul_precision("highest" if small else "default"):
        devices = jax.devices()[: setting.count]
        return parallel_row.compare(length, length // CHUNKS, devices, config, alone.turn)


def _config(setting, model, length, remat, size=None):
    config = models.config(model, size or setting.size or models.usual_size(), length)
    # A pattern that is longer than the model would leave out its attention.
    depth = max(config["depth"], len(config["pattern"]))
    return config | dict(depth=depth, remat=remat, scan=not setting.on_cpu)


def _devices(setting, how) -> Devices:
    """One device, or all with time cut over them by a method of attention or of states."""
    if how in ALONE:
        return Devices.first(1, MeshConfig())
    by = {"method": how} if how in get_args(AttentionMethod) else {"states": how}
    count = setting.count or len(jax.devices())
    return Devices.first(count, MeshConfig(sequence=count, **by))


def _step(setting, name, length, how, remat) -> dict[str, Any]:
    devices = _devices(setting, how)
    devices.check_time("a row", length)
    config = _config(setting, name, length, remat)
    arrays = random_batch("whole", 1, length, config["vocab_size"])
    model, functions = step_functions(config, arrays, devices)
    state, batch = functions.layout.initial(0), devices.put_batch(arrays)
    start = time.perf_counter()
    with dispatch.noted() as taken:
        step = functions.train.lower(state, batch).compile()
    compile_seconds = time.perf_counter() - start
    row = dict(
        model=name,
        method=how,
        time=length,
        devices=len(devices),
        remat=remat,
        parameters=model.num_parameters,
        flops=training_flops(model, token_task.cross_entropy, arrays),
        implementations=sorted({"/".join(one) for one in taken}),
        compile_seconds=compile_seconds,
        needed_bytes=peak_bytes(step),
        sent_bytes=None if len(devices) == 1 else total_sent(step.as_text()),
    )
    lacking = lacks(row["needed_bytes"], device_memory())
    if lacking:
        return row | dict(out_of_memory=lacking)
    try:
        with alone.turn():
            seconds, sums = _steps(step, state, batch, setting.rounds)
    except jax.errors.JaxRuntimeError as error:
        if not alone.lacks_memory(error):
            raise
        return row | dict(out_of_memory=alone.reason(error))
    sums = dict(zip(functions.train_metric_names, sums, strict=False))
    return row | dict(
        loss=float(sums["loss"] / sums["count"]),
        step_seconds=seconds,
        tokens_per_second=length / statistics.median(seconds),
    )


def device_memory() -> Mapping[str, int] | None:
    """Returns what the first device says of its memory; None if it says nothing, as a CPU does."""
    return jax.devices()[0].memory_stats()


def lacks(needed: int, stats: Mapping[str, int] | None) -> str | None:
    """Returns why a device has too little memory for a program, or None if it may have enough.

    A program that is started without it can end on one device while the others wait for that one.
    """
    limit = (stats or {}).get("bytes_limit")
    if limit is None or needed <= limit:
        return None
    return f"the program needs {needed:,} bytes, and a device gives {limit:,}"


def grouped(cases: Sequence[str], workers: int) -> list[tuple[list[str], int]]:
    """Returns the cases in groups, each with how many run beside each other: those of `memory` have the devices to themselves."""
    memory = [case for case in cases if case.startswith("memory/")]
    shared = [case for case in cases if case not in memory]
    return [(group, count) for group, count in ((shared, workers), (memory, 1)) if group]


def _steps(step, state, batch, rounds):
    """The seconds of steps after the first, of which no more begin when they took `SECONDS`, and the sums of the first."""
    state, sums = step(state, batch)
    sums, seconds = np.asarray(sums), []
    while len(seconds) < rounds and sum(seconds) < SECONDS:
        start = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - start)
    return seconds, sums


def compared(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the row with its speed by that of the cases on one device that are among the rows before it.

    A row of T tokens through attention takes more operations per token than one of T / 2, so operations per second (those of
    `training_flops`) are compared beside tokens per second.
    """
    kind, _, how = row["case"].rpartition("/")
    if how in ALONE or "tokens_per_second" not in row:
        return dict(row)
    alone = {r["case"]: r for r in rows if "tokens_per_second" in r}
    found = {}
    for name, label in (("one", "times_one_device"), ("whole", "times_one_device_whole")):
        if one := alone.get(f"{kind}/{name}"):
            found[label] = row["tokens_per_second"] / one["tokens_per_second"]
            found[f"operations_{label}"] = found[label] * _per_token(row) / _per_token(one)
    return dict(row) | found


def _per_token(row):
    return row["flops"] / row["time"]
