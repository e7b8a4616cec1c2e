"""The study `pretrained`: random checkpoints of the shapes of published models, loaded, and continued beside transformers.

Each case runs in a process of its own (`alone`). With the sizes of `random_checkpoints`, they are

    write/MODEL          a checkpoint in bfloat16 shards
    load/MODEL           `load_pretrained` onto the device beside reading the bytes of the files, from the disk where the system
                         lets go of what it holds of them ("cold"), and from memory ("warm")
    decode/MODEL         greedy tokens of `seqmodels.generate` after a context, per second, in bfloat16
    decode/transformers  the same of the checkpoint `llama` by transformers: a static cache, and its forward compiled by
                         torch.compile(mode="reduce-overhead"); left out where torch or transformers cannot be imported
    long/mamba2          a recurrent model after contexts of up to 128k tokens: the bytes of its state and of all memory
"""

import functools
import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.benchmark import alone, random_checkpoints, transformers_decode
from experiments.benchmark.record import Record
from layers.kernels import dispatch
from layers.registry import suggestion
from seqmodels import LanguageModel, load_pretrained, stream

CASES = (
    "write/llama",
    "load/llama",
    "decode/llama",
    "decode/transformers",
    "write/mamba2",
    "long/mamba2",
    "write/qwen3_next",
    "load/qwen3_next",
    "decode/qwen3_next",
)
SIZES = tuple(random_checkpoints.CONFIGS["llama"])
BATCHES, CONTEXT, LONG = (1, 32), 4096, (4096, 32768, 131072)
BATCHES_ON_CPU, CONTEXT_ON_CPU, LONG_ON_CPU = (1, 2), 48, (48, 200)
BLOCK, BLOCKS = 64, 4  # tokens of a block, and blocks, the first of which is not timed
BLOCK_ON_CPU = 4
CHUNK = 2048  # tokens that a prompt is read in
PIECE = 1 << 24  # bytes of a read
PATIENCE = 300.0  # seconds for a case
ROUNDS = 3


class Setting(NamedTuple):
    """How cases are measured.

    Attributes:
      folder: where checkpoints are.
      size: one of `SIZES`; that of the device if None.
      rounds: measurements of loading.
    """

    folder: Path
    size: str | None = None
    rounds: int = ROUNDS

    @property
    def on_cpu(self) -> bool:
        """Whether sizes are those of a CPU."""
        return jax.default_backend() == "cpu"

    def config(self, model: str) -> dict[str, Any]:
        """Returns the config.json of a model."""
        return random_checkpoints.CONFIGS[model][self.size or ("tiny" if self.on_cpu else "1.5b")]


def chosen(only: Sequence[str]) -> list[str]:
    """Returns the cases with these names or whose names begin with one of them, after the checkpoints that they need.

    Raises:
      ValueError: an unknown name.
    """

    def within(case: str, name: str) -> bool:
        return f"{case}/".startswith(f"{name}/")

    for name in only:
        if not any(within(case, name) for case in CASES):
            raise ValueError(
                f"only={name!r} is no case{suggestion(name, CASES)}; expected {', '.join(CASES)}"
            )
    wanted = {case for case in CASES if not only or any(within(case, name) for name in only)}
    wanted |= {f"write/{_model(case)}" for case in wanted}
    return [case for case in CASES if case in wanted]


def study(out: Path, size: str | None, only: Sequence[str], rounds: int | None, seconds: float | None) -> int:
    """Measures every case in a process of its own, writes pretrained.json and returns the exit code.

    Args:
      out: folder of the results, where the checkpoints are too while they are needed.
      size, rounds: see `Setting`; the usual ones if None.
      only: see `chosen`.
      seconds: the longest that a case may take; `PATIENCE` if None.
    """
    names = chosen(only)
    record = Record(out / "pretrained.json", compared, line)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        measured = functools.partial(measure, Setting(Path(folder), size, rounds or ROUNDS))
        alone.run(measured, names, seconds or PATIENCE, record.add)
    return 1 if any("failed" in row or "out_of_memory" in row for row in record.rows) else 0


def compared(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns a row of decode/transformers with how many times faster decode/llama is, by batch, if it is in `rows`."""
    ours = next((other for other in rows if other["case"] == "decode/llama" and "steps" in other), None)
    if row["case"] != "decode/transformers" or ours is None or "steps" not in row:
        return row
    pairs = zip(ours["steps"], row["steps"], strict=True)
    return row | dict(
        ours_over_theirs={str(a["batch"]): a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs}
    )


def measure(setting: Setting, case: str) -> dict[str, Any]:
    """Returns what a case gives."""
    kind, model = case.split("/")
    folder = setting.folder / _model(case)
    if model == "transformers":
        if missing := [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]:
            return dict(left_out=f"{' and '.join(missing)} cannot be imported")
        # JAX only says which device there is, and leaves its memory alone.
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        return transformers_decode.measure(folder, **_lengths(setting))
    row = {"write": _write, "load": _load, "decode": _decode, "long": _long}[kind](setting, folder)
    return dict(device=jax.devices()[0].device_kind) | row


def _model(case: str) -> str:
    """Returns the checkpoint that a case needs."""
    name = case.split("/")[1]
    return "llama" if name == "transformers" else name


def _lengths(setting: Setting) -> dict[str, Any]:
    if setting.on_cpu:
        return dict(batches=BATCHES_ON_CPU, context=CONTEXT_ON_CPU, block=BLOCK_ON_CPU, blocks=BLOCKS)
    return dict(batches=BATCHES, context=CONTEXT, block=BLOCK, blocks=BLOCKS)


def _write(setting: Setting, folder: Path) -> dict[str, Any]:
    start = time.perf_counter()
    parameters = random_checkpoints.write(folder, setting.config(folder.name))
    return dict(parameters=parameters, bytes=_bytes(folder), seconds=time.perf_counter() - start)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in _files(folder))


def _load(setting: Setting, folder: Path) -> dict[str, Any]:
    jax.block_until_ready(jax.device_put(np.zeros(1)))  # so that the device is ready
    calls = {"read": lambda: _read(folder), "load": lambda: jax.block_until_ready(_arrays(_opened(folder)))}
    seconds: dict[str, list[float]] = {}
    for _ in range(setting.rounds):
        for where in ("cold", "warm"):
            for name, call in calls.items():
                if where == "cold":
                    _let_go(folder)
                start = time.perf_counter()
                call()
                seconds.setdefault(f"{where}_{name}", []).append(time.perf_counter() - start)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    ratios = {
        f"{where}_ratio": medians[f"{where}_load"] / medians[f"{where}_read"] for where in ("cold", "warm")
    }
    return dict(bytes=_bytes(folder), seconds=seconds) | ratios


def _opened(folder: Path) -> LanguageModel:
    """Returns the model in bfloat16, with layers one by one, as generation runs them."""
    return load_pretrained(folder, dtype="bfloat16", param_dtype="bfloat16", scan=False)[0]


def _arrays(model: LanguageModel) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(model) if isinstance(leaf, jax.Array)]


def _read(folder: Path) -> None:
    buffer = bytearray(PIECE)
    for file in _files(folder):
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def _let_go(folder: Path) -> None:
    """Asks the system to forget what it holds of the files in memory."""
    for file in _files(folder):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _decode(setting: Setting, folder: Path) -> dict[str, Any]:
    lengths = _lengths(setting)
    opened = _opened(folder)
    with dispatch.noted() as taken:
        steps = [_continued(opened, batch, lengths["context"], lengths) for batch in lengths["batches"]]
    return dict(context=lengths["context"], steps=steps, implementations=sorted(set(map("/".join, taken))))


def _long(setting: Setting, folder: Path) -> dict[str, Any]:
    opened, lengths = _opened(folder), _lengths(setting)
    contexts = LONG_ON_CPU if setting.on_cpu else LONG
    return dict(steps=[_continued(opened, 1, context, lengths) for context in contexts])


def _continued(model: LanguageModel, batch: int, context: int, lengths: dict[str, Any]) -> dict[str, Any]:
    """Returns the rate of greedy tokens after a random context, and what is in memory."""
    size, vocabulary = lengths["block"], model.config.input.vocab_size
    # The last token is read by the first step, so that pieces of the context are whole.
    prompts = np.random.default_rng(0).integers(0, vocabulary, (batch, context + 1))
    blocks = stream(
        model, prompts, max_new_tokens=lengths["blocks"] * size, temperature=0, block=size, chunk=CHUNK
    )
    _, seconds = _timed(blocks)
    tokens, total = 0, 0.0
    for _ in range(lengths["blocks"] - 1):
        block, spent = _timed(blocks)
        tokens, total = tokens + int(block.lengths.sum()), total + spent
    state = jax.eval_shape(lambda model: model.init_state(batch, max_length=context), model)
    memory = jax.devices()[0].memory_stats() or {}
    return dict(
        batch=batch,
        context=context,
        tokens_per_second=tokens / total,
        milliseconds=1e3 * total * batch / tokens,
        first_block_seconds=seconds,
        state_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
        peak_bytes=memory.get("peak_bytes_in_use"),
    )


def _timed(blocks: Iterator[Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    block = next(blocks)
    return block, time.perf_counter() - start


def line(row: dict[str, Any]) -> str:
    """Returns the lines of a case in the table."""
    case = f"{row['case']:20}"
    for problem in ("failed", "out_of_memory", "left_out"):
        if problem in row:
            return f"{case} {problem.replace('_', ' ')}: {row[problem]}"
    if "parameters" in row:
        return f"{case} {row['parameters'] / 1e9:.3f}B parameters, {row['bytes'] / 1e9:.2f} GB in {row['seconds']:.1f} s"
    if "cold_ratio" in row:
        parts = (
            f"{where}: {statistics.median(row['seconds'][f'{where}_load']):.2f} s, {row[f'{where}_ratio']:.2f} of reading"
            for where in ("cold", "warm")
        )
        return f"{case} {'; '.join(parts)}"
    lines = [
        f"{case} {step['batch']:3d} x {step['context']:<7d} {step['milliseconds']:8.3f} ms a step "
        f"{step['tokens_per_second']:9.1f} tokens/s  state {step.get('state_bytes', 0) / 1e6:9.2f} MB  "
        f"peak {(step.get('peak_bytes') or 0) / 1e9:6.2f} GB"
        for step in row["steps"]
    ]
    ratios = row.get("ours_over_theirs", {})
    return "\n".join(
        [*lines, *(f"{case} batch {b}: ours is {r:.2f} times as fast" for b, r in ratios.items())]
    )
