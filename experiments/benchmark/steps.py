"""The study `steps`: whole training steps of language models, on rows that are whole, marked as one segment, or packed.

A step is that of training (`experiments.training.step`): embedding, layers, cross-entropy, both passes and
the optimizer. Models have 12 layers of width 768, SwiGLU, tied embeddings of 32,768 tokens and bfloat16 activations, about
110 to 117 million parameters. Tokens are random.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments.benchmark.processes import Say
from experiments.benchmark.timing import interleaved
from experiments.config.loading import MeshConfig
from experiments.parallel.mesh import Devices
from experiments.tasks import tokens
from experiments.training.model import SplitModel
from experiments.training.optimizers import Optimizer, OptimizerConfig
from experiments.training.step import StepFunctions, metric_names_of
from layers.kernels import dispatch
from layers.registry import suggestion
from seqmodels import build_model

MODELS: dict[str, dict[str, Any]] = {
    "transformer": dict(pattern=("attention",), mixers={"attention": dict(heads=12)}),
    "gated_deltanet": dict(
        pattern=("gated_deltanet",), mixers={"gated_deltanet": dict(heads=6, key_dim=128, value_dim=128)}
    ),
    "rg_lru": dict(pattern=("rg_lru",)),
    "mamba2": dict(pattern=("mamba2",)),
}
ROWS = ("whole", "ones", "packed")
DOCUMENTS = 4  # per packed row
SECONDS = 0.5  # of a measurement
SIZES = dict(width=768, depth=12, vocab_size=32768)
ON_CPU = dict(width=96, depth=2, vocab_size=64)
SHAPE, SHAPE_ON_CPU = (8, 4096), (2, 64)


def run(
    models: Sequence[str],
    rows: Sequence[str],
    count: int,
    shape: tuple[int | None, int | None],
    rounds: int,
    report: Callable[[dict[str, Any]], None],
    say: Say,
) -> list[dict[str, Any]]:
    """Returns the time of a step for each model and kind of rows; `report` receives each row as it is known.

    Args:
      models: names in `MODELS`; all if empty.
      rows: "whole" (no segment ids), "ones" (one segment per row) or "packed" (four documents per row).
      count: number of devices, which divide the batch.
      shape: rows per device and tokens per row, in place of the defaults.
      rounds: measurements per step.

    Raises:
      ValueError: unknown names, more devices than there are, or rows too short to be packed.
    """
    for name, known in [*((m, MODELS) for m in models), *((r, ROWS) for r in rows)]:
        if name not in known:
            raise ValueError(f"{name!r} is unknown{suggestion(name, known)}; choose from {', '.join(known)}")
    length = shape[1] or (SHAPE_ON_CPU if jax.default_backend() == "cpu" else SHAPE)[1]
    if "packed" in rows and length < DOCUMENTS:
        raise ValueError(
            f"time={length} with rows=packed; expected at least {DOCUMENTS} tokens, one per document"
        )
    devices = Devices.first(count, MeshConfig())
    found = []
    for name in models or MODELS:
        for kind in rows:
            found.append(_measure(name, kind, devices, shape, rounds, say))
            report(found[-1])
    return found


def line(row: Mapping[str, Any]) -> str:
    """Returns a row of the table."""
    label = f"{row['model']}, {row['rows']} rows"
    return (
        f"{label:32}  {row['milliseconds']:9.2f} ms  {row['tokens_per_second']:10.0f} tokens/s  "
        f"{row['temporary_bytes'] / 1e9:7.2f} GB  {', '.join(row['implementations'])}"
    )


def _measure(name, kind, devices, shape, rounds, say) -> dict[str, Any]:
    on_cpu = jax.default_backend() == "cpu"
    default = SHAPE_ON_CPU if on_cpu else SHAPE
    batch, length = (given or usual for given, usual in zip(shape, default, strict=True))
    config = MODELS[name] | (ON_CPU if on_cpu else SIZES) | dict(kind="language_model", dtype="bfloat16")
    arrays = _batch(kind, batch * len(devices), length, config["vocab_size"])
    most = DOCUMENTS if kind == "packed" else 1
    model = SplitModel(
        lambda rngs: build_model(config, rngs=rngs), padding="end", packed=most, unprojected=True
    )
    rule = OptimizerConfig(learning_rate=1e-3, weight_decay=0.1)
    functions = StepFunctions(
        model,
        Optimizer(rule, model.parameters, warmup_steps=10, total_steps=1000),
        tokens.cross_entropy,
        metric_names=metric_names_of(model, tokens.cross_entropy, {k: v[:1] for k, v in arrays.items()}),
        devices=devices,
    )
    state, given = functions.layout.initial(0), devices.put_batch(arrays)
    start = time.perf_counter()
    with dispatch.noted() as taken:
        step = functions.train.lower(state, given).compile()
    seconds = time.perf_counter() - start
    say(f"{name}, {kind} rows: compiled in {seconds:.0f} s")

    def take() -> Any:
        nonlocal state
        state, metrics = step(state, given)
        return metrics

    timing = interleaved({"step": take}, rounds, SECONDS)["step"]
    return dict(
        model=name,
        rows=kind,
        batch=batch * len(devices),
        time=length,
        devices=len(devices),
        parameters=model.num_parameters,
        milliseconds=timing.median,
        quartiles_milliseconds=[timing.low, timing.high],
        tokens_per_second=1e3 * batch * len(devices) * length / timing.median,
        temporary_bytes=step.memory_analysis().temp_size_in_bytes,
        implementations=sorted({"/".join(one) for one in taken}),
        compile_seconds=seconds,
    )


def _batch(kind: str, batch: int, length: int, vocabulary: int) -> dict[str, np.ndarray]:
    """Random tokens, the next ones as labels, and segment ids of this kind."""
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
