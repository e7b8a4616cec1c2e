"""The search of sparse patterns of attention, one per head, on rows of text."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layers.caches.minference import MInference
from layers.caches.patterns import Pattern, read_patterns
from layers.caches.watching import Watching
from layers.segments import Place, Visit
from layers.typing import Array, Int
from seqmodels import caching
from seqmodels.language_model import LanguageModel
from seqmodels.rows import read_rows

# Candidates of MInference, whose products are about as many.
CANDIDATES = (
    ("a_shape", 100, 800),
    ("vertical_slash", 30, 800),
    ("vertical_slash", 100, 750),
    ("vertical_slash", 500, 700),
    ("vertical_slash", 3500, 100),
    ("block_sparse", 100, 0),
)


def search(
    model: LanguageModel,
    tokens: Int[Array, "n t"] | Int[np.ndarray, "n t"],
    *,
    candidates: Sequence[Sequence[Any]] = CANDIDATES,
    policy: MInference | None = None,
    skip: int = 0,
) -> list[list[Pattern]]:
    """Returns the pattern of each layer and query head that keeps most of its attention, for `cache="minference(heads=...)"`.

        recall = mean_{rows, i >= skip} sum_{j read by i} p_ij,    p_ij the weights of attention to all tokens

    as MInference does (Jiang et al. 2024, arXiv:2407.02490). Of equal candidates the first is taken. `json.dump` writes the result to
    a file that the policy reads. Memory grows with t^2 and the heads of the model.

    Args:
      model: a language model with attention to all tokens.
      tokens: rows without padding.
      candidates: patterns [name, m, n] to choose from.
      policy: an `MInference` with the sizes of blocks and windows; the default one if None.
      skip: first queries that are not counted.

    Raises:
      ValueError, TypeError: the model has no layer with a cache of all tokens, a candidate is none, or no query is left.
    """
    policy = MInference() if policy is None else policy
    (patterns,) = read_patterns("candidates", [list(candidates)])
    tokens = read_rows(model, tokens)
    if not 0 <= skip < tokens.shape[1]:
        raise ValueError(
            f"skip={skip} in tokens {list(tokens.shape)}; expected rows (n, t) and 0 <= skip < t"
        )
    policy.check(tokens.shape[1], {layer: one.config for layer, one in caching.layers_of(model).items()})
    caching.check(model, Watching(length=tokens.shape[1]), tokens.shape[1], 1, name=None)
    recalls = [_recalls(model, jnp.asarray(row)[None], policy, patterns, skip) for row in tokens]
    means = [np.mean([np.asarray(row[layer]) for row in recalls], axis=0) for layer in range(len(recalls[0]))]
    return [[patterns[int(best)] for best in layer.argmax(0)] for layer in means]


@partial(jax.jit, static_argnums=(2, 3, 4))
def _recalls(model, tokens, policy, patterns, skip):
    """Returns the recall of each candidate and query head, (c, h) per layer, on one row."""
    time = tokens.shape[1]
    state = caching.begin(model, Watching(length=time), 1, time)
    _, state = model.unprojected(tokens, state)
    numbers, positions = jnp.ones((1, time), jnp.int32), jnp.arange(time, dtype=jnp.int32)[None]
    visit = Visit(
        jnp.ones(1, bool),
        numbers,
        positions,
        Place(jnp.ones(1, jnp.int32), jnp.ones(1, jnp.int32), jnp.full(1, time, jnp.int32)),
    )
    found = []
    for layer, mixer in caching.layers_of(model).items():
        prompt, view, block = state.layers[layer].carried, mixer.view(), positions[0] // policy.block
        weights, per_pattern = prompt.observed(view), []
        for pattern in patterns:
            heads = (pattern,) * weights.shape[1]
            blocks, columns = policy.chosen(heads, view, prompt.queries, prompt.cache, visit)
            read = blocks[:, :, block[:, None], block[None]] | columns[:, :, None]
            per_pattern.append(jnp.where(read, weights, 0.0).sum(3)[0, :, skip:].mean(1))
        found.append(jnp.stack(per_pattern))
    return found
