"""Drafts of the next tokens by another model, which a call of the model that generates then checks.

A draft costs little time if its model is small, and little memory if that does not grow with the text, as in LongSpec (Yang et al.
2025, arXiv:2502.17421): a recurrent model, or one under a policy such as `streaming`. Its state covers tokens that are
settled. What it reads of its own draft is forgotten, and what became of the draft is read again with the next call.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layers.caches import CachePolicy
from layers.segments import Segments
from layers.typing import Array, Bool, Float, Int, Key
from seqmodels import caching
from seqmodels.language_model import LanguageModel, LanguageModelState
from seqmodels.sampling import Sampling, choose, filtered


class Draft(NamedTuple):
    """What may follow each row.

    Attributes:
      tokens: guesses of the next tokens.
      count: number of them that are there.
      likely: logits of the distribution that each was sampled from; None if it was not sampled.
    """

    tokens: Int[Array, "b k"]
    count: Int[Array, "b"]
    likely: Float[Array, "b k v"] | None


class Drafting(NamedTuple):
    """Where a draft model stands between two drafts.

    Attributes:
      state: its state after all tokens of each row but the last ones.
      pending: number of those, at least 1.
    """

    state: LanguageModelState
    pending: Int[Array, "b"]


def check(
    model: LanguageModel, draft: Any, policy: CachePolicy, longest: int, new: int, *, cache: Any
) -> None:
    """Raises unless a model can draft for another.

    Args:
      model, draft: the model that generates, and the one that drafts.
      policy: what keeps the caches of the draft model.
      longest: tokens of the longest prompt.
      new: the most new tokens.
      cache: the policy as it was given; None if it was not.
    """
    if not isinstance(draft, LanguageModel):
        raise TypeError(f"draft is a {type(draft).__name__}; expected a LanguageModel")
    own, wanted = draft.config.input.vocab_size, model.config.input.vocab_size
    if own != wanted:
        raise ValueError(
            f"draft has vocab_size={own}; expected {wanted}, that of the model, as both read the same tokens"
        )
    inputs, read = draft.config.input, longest + new - 1
    if inputs.longest is not None and read > inputs.longest:
        raise ValueError(
            f"draft has max_positions={inputs.max_positions}, but a prompt of {longest} tokens and max_new_tokens={new} need "
            f"{read + inputs.first_position}; expected a draft model with more positions, or fewer tokens"
        )
    if cache is None:
        return
    if policy.compresses or policy.filters or policy.packs or policy.shares:
        raise ValueError(
            f"draft_cache={cache!r} acts on whole prompts; expected a policy that acts on every call alike, such as "
            "'streaming(budget=512)', or None"
        )
    caching.check(draft, policy, longest, new, name="draft_cache")


def propose(
    model: LanguageModel,
    drafting: Drafting,
    tokens: Int[Array, "b h"],
    length: Int[Array, "b"],
    room: Int[Array, "b"],
    active: Bool[Array, "b"],
    seen: Bool[Array, "b v"] | None,
    sampling: Sampling,
    keys: Key[Array, "b"],
    number: Int[Array, "b"],
    *,
    most: int,
) -> tuple[Draft, Drafting]:
    """Returns `room` tokens for each row, each chosen as the model would continue it, and where the draft model stands then.

    Args:
      tokens, length: the tokens of each row, then anything, and their number.
      room: at most `most`.
      active: rows of which the draft model reads the pending tokens.
      seen: tokens that occurred; None without a repetition penalty.
      keys: a key per row; with the number of a new token it gives the key of its guess.
      number: number of new tokens of each row.
    """
    columns, row = jnp.arange(most + 1)[None], jnp.arange(len(length))
    first = (length - drafting.pending)[:, None]
    inputs = jnp.take_along_axis(tokens, first + columns, axis=1, mode="clip")
    ids = (columns < jnp.where(active, drafting.pending, 0)[:, None]).astype(jnp.int32)
    ids = Segments.of(ids, padding="end", packed=False)
    outputs, settled = model.unprojected(inputs, drafting.state, segment_ids=ids)
    x = jnp.take_along_axis(outputs.x, drafting.pending[:, None, None] - 1, axis=1)
    sampled = sampling.temperature is not None

    def guess(place, logits, guesses, likely, seen):
        """Puts a token at a place of the draft."""
        token, _ = choose(logits, sampling, jax.vmap(jax.random.fold_in)(keys, number + place), seen)
        if sampled:
            likely = likely.at[:, place].set(filtered(logits, sampling, seen))
        seen = None if seen is None else seen.at[row, token].set(True)
        return guesses.at[:, place].set(token), likely, seen

    def go_on(place, carry):
        (guesses, likely, seen), state = carry
        # Rows that have no room for another guess do not read theirs.
        ids = (place < room)[:, None].astype(jnp.int32)
        logits, state = model(guesses[:, place - 1][:, None], state, segment_ids=ids)
        return guess(place, logits[:, 0], guesses, likely, seen), state

    logits = outputs._replace(x=x).logits[:, 0]
    guesses = jnp.zeros((len(length), most), jnp.int32)
    likely = jnp.zeros((len(length), most, logits.shape[1]), logits.dtype) if sampled else None
    begun = guess(0, logits, guesses, likely, seen), settled
    (guesses, likely, _), _ = jax.lax.fori_loop(1, room.max(), go_on, begun)
    return Draft(guesses, room, likely), drafting._replace(state=settled)
