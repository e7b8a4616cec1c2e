"""Rows of text that something is found or trained on for a language model."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from layers.indices import check_indices
from layers.typing import Int
from seqmodels.language_model import LanguageModel


def read_rows(model: LanguageModel, tokens: Any, *, least: int = 1) -> Int[np.ndarray, "n t"]:
    """Returns rows of tokens as int32, at least one row of `least` tokens.

    Raises:
      TypeError: `tokens` are not integers.
      ValueError: they are no rows, too few or too short, or a token is not in the model's vocabulary.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not len(tokens) or tokens.shape[1] < least:
        raise ValueError(
            f"tokens {list(tokens.shape)}; expected one or more rows (n, t) with t of at least {least}"
        )
    if not np.issubdtype(tokens.dtype, np.integer):
        raise TypeError(f"tokens are {tokens.dtype}; expected integers")
    check_indices("tokens", tokens, model.config.input.vocab_size, of="vocab_size")
    return tokens.astype(np.int32)


def shuffled(
    tokens: Int[np.ndarray, "n t"], *, steps: int, batch: int, seed: int
) -> Iterator[Int[np.ndarray, "b t"]]:
    """Yields batches of rows, `steps` of them, in an order that is drawn anew for every pass over the rows."""
    order, rows = np.random.default_rng(seed), np.zeros(0, np.int64)
    for _ in range(steps):
        while len(rows) < batch:
            rows = np.concatenate([rows, order.permutation(len(tokens))])
        yield tokens[rows[:batch]]
        rows = rows[batch:]
