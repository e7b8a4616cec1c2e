"""Rows of text read in chunks with a carried state, under a policy of the caches of attention."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layers.caches import CachePolicy
from layers.cross_entropy import Unprojected
from layers.segments import Segments
from seqmodels import LanguageModel, caching

PER_TOKEN = "inputs", "labels", "segment_ids"


def prompt_length(time: int, cache: CachePolicy | None) -> int:
    """Returns the number of tokens of a row that are its prompt: the first half for a policy that acts at the end of a prompt."""
    return time // 2 if cache is not None and cache.compresses else 0


def in_chunks(
    model: LanguageModel,
    batch: Mapping[str, Any],
    measure: Callable[[Unprojected, Mapping[str, Any]], Any],
    *,
    chunk: int = 512,
    cache: CachePolicy | None = None,
    **facts: Any,
) -> Iterator[tuple[int, Any]]:
    """Yields the first position of each chunk of the rows of a batch, and what is measured there.

    Args:
      model: a language model.
      batch: "inputs" and "labels" (b, t), if rows are packed or padded "segment_ids" (b, t), and what else `measure` reads.
      measure: outputs and the batch of a chunk to a tree of arrays; it is compiled.
      chunk: number of tokens per call; a last, shorter chunk is compiled by itself.
      cache: policy of the caches of attention. One that acts at the end of a prompt takes the first half of the rows for one.
      facts: what is known of segment ids, as in `Segments.of`.

    Raises:
      ValueError: the policy cannot keep the caches of the model.
    """
    rows, time = batch["inputs"].shape
    prompt = prompt_length(time, cache)
    # Under jit each array of the state has memory of its own, which can be donated.
    if cache is None:
        state = jax.jit(lambda: model.init_state(rows, max_length=time))()
    else:
        caching.check(model, cache, time, 1)
        state = jax.jit(lambda: caching.begin(model, cache, rows, prompt or time))()
    surprising, losses = bool(prompt) and cache.needs_surprise, []
    for start in [*range(0, prompt, chunk), *range(prompt, time, chunk)]:
        if start == prompt > 0:
            options = dict(policy=cache, room=time - start, call=chunk)
            if surprising:
                options["surprise"] = jnp.asarray(_by_slot(np.concatenate(losses, axis=1), batch, prompt))
            state = caching.compress(model, state, **options)
        piece = slice(start, min(start + chunk, prompt if start < prompt else time))
        given = {name: x[:, piece] if name in PER_TOKEN else x for name, x in batch.items()}
        fixed = dict(measure=measure, surprising=surprising and start < prompt, facts=tuple(facts.items()))
        found, surprise, state = _read(model, given, state, **fixed)
        if fixed["surprising"]:
            losses.append(np.asarray(surprise))
        yield start, found


@partial(jax.jit, static_argnames=("measure", "surprising", "facts"), donate_argnums=(2,))
def _read(model, batch, state, *, measure, surprising, facts):
    segments = Segments.of(batch.get("segment_ids"), **dict(facts))
    outputs, state = model.unprojected(batch["inputs"], state, segment_ids=segments)
    surprise = None
    if surprising:
        following = jnp.maximum(batch["labels"], 0)[..., None]
        logits = outputs.logits
        surprise = jax.nn.logsumexp(logits, axis=2) - jnp.take_along_axis(logits, following, axis=2)[..., 0]
    return measure(outputs, batch), surprise, state


def _by_slot(losses, batch, prompt):
    """Returns -log p of each token of the prompts given those before it, those of a row in order, as slots of a cache are."""
    surprise = np.pad(losses, ((0, 0), (1, 0)))[:, :prompt]
    ids = batch.get("segment_ids")
    if ids is None:
        return surprise
    order = np.argsort(np.asarray(ids)[:, :prompt] == 0, axis=1, kind="stable")
    return np.take_along_axis(surprise, order, axis=1)
