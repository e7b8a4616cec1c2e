"""Losses by position in a row: whether longer context helps, and what happens beyond the length of training.

Rows are read in chunks with a carried state, so that their length is bounded by the state and not by one pass.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from experiments.analysis.in_chunks import in_chunks
from layers.caches import CachePolicy
from layers.typing import Array, Float, Int
from seqmodels import LanguageModel


def losses_by_position(
    model: LanguageModel,
    inputs: Int[Array, "n t"],
    labels: Int[Array, "n t"],
    *,
    chunk: int = 512,
    cache: CachePolicy | None = None,
) -> Float[np.ndarray, "n t"]:
    """Returns the cross-entropy in nats of each label, given all tokens of the row up to it.

    Args:
      model: a language model.
      inputs: tokens; rows have no padding.
      labels: next tokens; NaN stands where a label is negative.
      chunk: number of tokens per call; a last, shorter chunk is compiled by itself.
      cache: policy of the caches of attention. One that compresses prompts takes the first half of the row for one.

    Raises:
      ValueError: if shapes differ or a row is empty, or `chunk` is below 1, or the policy cannot be used.
    """
    if inputs.shape != labels.shape or inputs.ndim != 2 or not inputs.size:
        raise ValueError(
            f"inputs {inputs.shape} and labels {labels.shape} must both be (n, t), and not empty"
        )
    if chunk < 1:
        raise ValueError(f"chunk={chunk}; expected at least 1")
    batch = dict(inputs=inputs, labels=labels)
    found = in_chunks(model, batch, _losses, chunk=chunk, cache=cache)
    return np.concatenate([np.asarray(losses) for _, losses in found], axis=1)


def _losses(outputs, batch):
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs.logits, jnp.maximum(batch["labels"], 0))
    return jnp.where(batch["labels"] >= 0, losses, jnp.nan)


def by_range(losses: Float[np.ndarray, "n t"], *, trained: int) -> list[dict[str, Any]]:
    """Returns the mean loss of ranges of positions that double: 1, 2 to 3, 4 to 7, and so on.

    Args:
      losses: losses by position, NaN where there is none.
      trained: length of the rows of training, in tokens.

    Returns:
      Per range "first" and "last" position (counted from 1), "nats" and "bits" per token, "perplexity", "count", and
      whether the range is "beyond" the trained length. A range ends at that length too.
    """
    if losses.ndim != 2 or not losses.size:
        raise ValueError(f"losses have shape {losses.shape}; expected (n, t), not empty")
    time = losses.shape[1]
    starts = sorted({1 << k for k in range(time.bit_length()) if 1 << k <= time} | {min(trained, time) + 1})
    rows = []
    for first, following in zip(starts, [*starts[1:], time + 1], strict=True):
        piece = losses[:, first - 1 : following - 1]
        if first > time or not np.isfinite(piece).any():
            continue
        nats = float(np.nanmean(piece))
        rows.append(
            dict(
                first=first,
                last=following - 1,
                nats=nats,
                bits=nats / math.log(2),
                perplexity=math.exp(min(nats, 700.0)),
                count=int(np.isfinite(piece).sum()),
                beyond=first > trained,
            )
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the ranges as a readable table."""
    lines = [f"{'positions':>17}  {'bits':>7}  {'perplexity':>10}  {'labels':>9}"]
    for row in rows:
        place = f"{row['first']}-{row['last']}" + (" *" if row["beyond"] else "  ")
        lines.append(f"{place:>17}  {row['bits']:7.4f}  {row['perplexity']:10.4g}  {row['count']:9d}")
    return "\n".join([*lines, "* beyond the length of training"])
