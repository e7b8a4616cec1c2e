"""The study `decode`: steps of generation of whole language models, against batch and context.

Models are those of the study `steps`. A context of random tokens is read as `seqmodels.generate` reads a prompt; then greedy
steps run in one compiled loop, each from the state of the one before. The state is what the model carries between steps: for attention the keys and
values of the context, for recurrences a size that does not depend on it.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.benchmark import models as language_models
from experiments.benchmark.processes import Say
from experiments.benchmark.report import COLOURS
from experiments.benchmark.timing import interleaved
from layers.caches import CachePolicy
from seqmodels import build_model, caching
from seqmodels.generation import FULL, prefill

BATCHES, LENGTHS = (1, 32), (1024, 4096, 16384, 65536)
BATCHES_ON_CPU, LENGTHS_ON_CPU = (1, 4), (64, 256)
STEPS, CHUNK = 32, 2048
SECONDS = 0.2  # of a measurement


def run(
    models: Sequence[str],
    size: str | None,
    batches: Sequence[int] | None,
    lengths: Sequence[int] | None,
    rounds: int,
    report: Callable[[dict[str, Any]], None],
    say: Say,
    cache: CachePolicy | None = None,
) -> list[dict[str, Any]]:
    """Returns the time of a step for each model, batch and context; `report` receives each row as it is known.

    Args:
      models: names; the usual ones if empty.
      size: a size in `experiments.benchmark.models.SIZES`; the usual one if None.
      batches: numbers of rows, in place of the defaults.
      lengths: tokens of context, in place of the defaults.
      rounds: measurements per step.
      cache: policy of the caches of attention.

    Raises:
      ValueError: an unknown name, or the policy cannot be used.
    """
    models, size = language_models.chosen(models), size or language_models.usual_size()
    on_cpu = jax.default_backend() == "cpu"
    batches = batches or (BATCHES_ON_CPU if on_cpu else BATCHES)
    lengths = lengths or (LENGTHS_ON_CPU if on_cpu else LENGTHS)
    rows = []
    for name in models:
        config = language_models.config(name, size, max(lengths) + STEPS) | dict(scan=False)
        model = nnx.jit(partial(_model, config))()
        for batch in batches:
            for length in lengths:
                say(f"{name}, {batch} x {length}")
                named = dict(model=name, size=size) | ({} if cache is None else dict(cache=str(cache)))
                rows.append(named | _measure(model, batch, length, rounds, cache))
                report(rows[-1])
    return rows


def line(row: Mapping[str, Any]) -> str:
    """Returns a row of the table."""
    return (
        f"{row['model']:16} {row['batch']:4d} x {row['context']:<7d}  {row['milliseconds']:9.3f} ms a step  "
        f"{row['tokens_per_second']:10.0f} tokens/s  state {row['state_bytes'] / 1e6:10.2f} MB"
    )


def draw(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draws the time of a step and the state against the context, a line per model and batch."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    models = list(dict.fromkeys(row["model"] for row in rows))
    for model in models:
        for style, batch in zip(("-", "--", ":", "-."), sorted({row["batch"] for row in rows}), strict=False):
            line = [row for row in rows if (row["model"], row["batch"]) == (model, batch)]
            contexts = [row["context"] for row in line]
            look = dict(
                ls=style, marker=".", color=COLOURS[models.index(model)], label=f"{model}, {batch} rows"
            )
            left.plot(contexts, [row["milliseconds"] for row in line], **look)
            right.plot(contexts, [row["state_bytes"] / 1e6 for row in line], **look)
    for axes, label in ((left, "milliseconds a step"), (right, "MB of state")):
        axes.set(xscale="log", yscale="log", xlabel="tokens of context", ylabel=label)
        axes.grid(alpha=0.3)
    left.legend(fontsize=7)
    figure.suptitle(title)
    FigureCanvasAgg(figure).print_png(path)


def _model(config: Mapping[str, Any]) -> nnx.Module:
    return build_model(config, rngs=nnx.Rngs(0))


def _measure(
    model: nnx.Module, batch: int, length: int, rounds: int, cache: CachePolicy | None
) -> dict[str, Any]:
    tokens = jax.random.randint(jax.random.key(1), (batch, length), 0, model.config.input.vocab_size)
    if cache is not None:
        caching.check(model, cache, length, STEPS)
    rows, surprise = prefill(model, list(np.asarray(tokens)), STEPS, CHUNK, FULL if cache is None else cache)
    state = rows.state
    if cache is not None and cache.compresses:
        _, state = nnx.jit(lambda model: model(rows.token[:, None], state))(model)
        state = caching.compress(model, state, policy=cache, room=STEPS, call=1, surprise=surprise)
    timing = interleaved({"steps": lambda: _steps(model, rows.token, state)}, rounds, SECONDS)["steps"]
    return dict(
        batch=batch,
        context=length,
        milliseconds=timing.median / STEPS,
        quartiles_milliseconds=[timing.low / STEPS, timing.high / STEPS],
        tokens_per_second=1e3 * batch * STEPS / timing.median,
        state_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
    )


@jax.jit
def _steps(model, token, state):
    def step(carry, _):
        token, state = carry
        logits, state = model(token[:, None], state)
        token = jnp.argmax(logits[:, 0], -1).astype(token.dtype)
        return (token, state), token

    return jax.lax.scan(step, (token, state), length=STEPS)[1]
