"""Speculative decoding with drafts that are looked up in the row itself, or that another model makes.

Text repeats itself: a draft of the next tokens is what followed the last occurrence of the last n tokens, in the prompt or
the output (prompt lookup decoding, Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding). Or a smaller model continues the
row (see `seqmodels.drafting`). One call of the model reads the draft and gives the logits of all its positions (Leviathan et al.
2023, arXiv:2211.17192). At each the next token is chosen as without a draft, with the key of its number. As long as the draft
agrees, its tokens are read already; the first that differs is a new token too, and ends it. So the outputs are those of decoding
without drafts, greedy or sampled, up to the rounding of a call on several tokens. Where a draft was sampled, `sampling.verified`
chooses: tokens are then others, and their distribution is the same.

A recurrent state cannot be cut back to where a draft failed. The state therefore stays behind: it covers a row but for its
last tokens, `pending` in number, which the next call reads again before its draft. When a draft is right in all
rows, the state after the call is taken. When more tokens are pending than the window of a call holds, a call without logits
reads them. Padding changes no state, so that rows of one batch accept different numbers of tokens.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layers.segments import Segments
from layers.typing import Array, Bool, Int, Key
from seqmodels import sampling as choices
from seqmodels.decoding import Generation, Rows, append, empty, keys_of_rows
from seqmodels.drafting import Draft, Drafting, propose
from seqmodels.language_model import LanguageModel
from seqmodels.sampling import Sampling

# Stand for rows in the keys of drafts and of their acceptance; the numbers of rows are smaller.
PROPOSING, ACCEPTING = 2**32 - 1, 2**32 - 2


class History(NamedTuple):
    """The tokens of each row.

    Attributes:
      tokens: tokens of the prompt and the output, then anything.
      length: number of tokens.
      pending: number of last tokens that the state does not cover, at least 1.
    """

    tokens: Int[Array, "b h"]
    length: Int[Array, "b"]
    pending: Int[Array, "b"]


def look_up(
    tokens: Int[Array, "b h"], length: Int[Array, "b"], *, most: int, ngram: int
) -> tuple[Int[Array, "b k"], Bool[Array, "b"]]:
    """Returns the `most` tokens that followed the last earlier occurrence of the last `ngram` tokens of each row.

    A draft that reaches the end of the row goes on with its own beginning, as a text that repeats does.

    Args:
      tokens, length: see `History`.

    Returns:
      The drafts, and whether there is such an occurrence.
    """
    width = tokens.shape[1]
    row, column = jnp.arange(tokens.shape[0])[:, None], jnp.arange(width)[None]
    fits = (column >= ngram - 1) & (column <= length[:, None] - 2)
    for back in range(ngram):
        last = jnp.take_along_axis(tokens, jnp.maximum(length - 1 - back, 0)[:, None], axis=1)
        fits &= jnp.roll(tokens, back, axis=1) == last
    place = jnp.max(jnp.where(fits, column, -1), axis=1, keepdims=True)
    period = jnp.maximum(length[:, None] - 1 - place, 1)
    draft = tokens[row, place + 1 + jnp.arange(most)[None] % period]
    return draft, place[:, 0] >= 0


@partial(jax.jit, static_argnames=("size", "most", "ngram"), donate_argnums=(1, 2, 4))
def decode(
    model: LanguageModel,
    rows: Rows,
    history: History,
    drafter: LanguageModel | None,
    drafting: Drafting | None,
    sampling: Sampling,
    stops: Int[Array, "n l"] | None,
    key: Key[Array, ""],
    start: Any,
    steps: Any,
    *,
    size: int,
    most: int,
    ngram: int | None,
) -> tuple[Rows, History, Drafting | None, Generation]:
    """Returns what `decoding.decode` does, the history, and where the draft model stands.

    A row that has `steps` new tokens waits for the others.

    Args:
      drafter, drafting: the draft model and where it stands; None if drafts are looked up.
      most: number of tokens of a draft.
      ngram: number of tokens that a draft is looked up by; None with a draft model.
    """
    count, window = rows.token.shape[0], 2 * most + 1
    keys = keys_of_rows(key, count)
    proposing, accepting = (
        keys_of_rows(jax.random.fold_in(key, jnp.uint32(one)), count) for one in (PROPOSING, ACCEPTING)
    )

    def step(carry):
        rows, history, drafting, new = carry
        active = ~rows.stopped & (new.lengths < steps)
        room = jnp.where(active, jnp.minimum(most, steps - new.lengths - 1), 0)
        if drafter is None:
            guesses, found = look_up(history.tokens, history.length, most=most, ngram=ngram)
            draft = Draft(guesses, jnp.where(found, room, 0), None)
        else:
            given = history.tokens, history.length, room, active, rows.seen, sampling, proposing
            draft, drafting = propose(drafter, drafting, *given, start + new.lengths, most=most)
        drafted = draft.count
        first = (history.length - history.pending)[:, None]  # that the state does not cover

        def read(known, count, width):
            """Reads some of the pending tokens and the draft of each row; returns outputs and the state."""
            columns = jnp.arange(width)[None]
            inputs = jnp.take_along_axis(known, first + columns, axis=1, mode="clip")
            ids = (columns < count[:, None]).astype(jnp.int32)
            ids = Segments.of(ids, padding="end", packed=False)
            return model.unprojected(inputs, rows.state, segment_ids=ids)

        def with_draft():
            places = history.length[:, None] + jnp.arange(most)[None]
            with_draft = _written(history.tokens, places, draft.tokens)
            count = jnp.where(active, history.pending + drafted, 0)
            outputs, state = read(with_draft, count, window)
            ahead = history.pending[:, None] - 1 + jnp.arange(most + 1)[None]
            x = jnp.take_along_axis(outputs.x, ahead[..., None], axis=1, mode="clip")
            return *choose(outputs._replace(x=x), draft), state

        def without_draft():
            outputs, state = read(history.tokens, active.astype(jnp.int32), 1)
            return *choose(outputs, jax.tree.map(lambda x: x[:, :0], draft._replace(count=None))), state

        def choose(outputs, draft):
            """Returns the rows and the new tokens, with those up to the first that the draft does not have."""

            def one(carry, at):
                rows, new, wanted = carry
                x, guess, likely, number = at
                logits, take = outputs._replace(x=x[:, None]).logits[:, 0], choices.choose
                if likely is not None:
                    here = jax.vmap(jax.random.fold_in)(accepting, start + new.lengths)
                    given = dict(guess=guess, likely=likely, there=number < drafted, accepting=here)
                    take = partial(choices.verified, **given)
                rows, new = append(rows, new, logits, sampling, stops, keys, start, wanted, choose=take)
                return (rows, new, wanted & (number < drafted) & (rows.token == guess) & ~rows.stopped), None

            def by_place(x):
                """One place more than the draft has, places first."""
                return jnp.moveaxis(jnp.pad(x, [(0, int(axis == 1)) for axis in range(x.ndim)]), 1, 0)

            guesses, likely = jax.tree.map(by_place, (draft.tokens, draft.likely))
            at = jnp.swapaxes(outputs.x, 0, 1), guesses, likely, jnp.arange(len(guesses))
            without_state = rows._replace(state=None)
            chosen, new_, _ = jax.lax.scan(one, (without_state, new, active), at)[0]
            return chosen, new_

        one_each = ~drafted.any() & (~active | (history.pending == 1)).all()
        chosen, grown, state = jax.lax.cond(one_each, without_draft, with_draft)
        added = grown.lengths - new.lengths
        places = (history.length - new.lengths)[:, None] + jnp.arange(size)[None]
        places = jnp.where(places < (history.length + added)[:, None], places, history.tokens.shape[1])
        tokens = _written(history.tokens, places, grown.tokens)
        left = ~active | chosen.stopped  # rows whose state matters no more in this call
        pending = history.pending + jnp.where(left, 0, added)
        covered = jnp.where(left, 0, pending - 1)

        def read_again():
            return read(tokens, covered, window)[1]

        right = (left | (added == drafted + 1)).all()
        behind = ~right & (pending <= most + 1).all()
        state = jax.lax.switch(
            jnp.where(right, 0, jnp.where(behind, 1, 2)), [lambda: state, lambda: rows.state, read_again]
        )
        pending = jnp.where(left | behind, pending, 1)
        calls = new.calls + jnp.where(right | behind, 1, 2)
        history = History(tokens, history.length + added, pending)
        if drafting is not None:
            drafting = drafting._replace(pending=jnp.where(active, added, drafting.pending))
        return chosen._replace(state=state), history, drafting, grown._replace(calls=calls)

    def goes_on(carry):
        rows, *_, new = carry
        return (~rows.stopped & (new.lengths < steps)).any()

    begun = rows, history, drafting, empty(count, size)
    return jax.lax.while_loop(goes_on, step, begun)


def _written(
    tokens: Int[Array, "b h"], places: Int[Array, "b n"], values: Int[Array, "b n"]
) -> Int[Array, "b h"]:
    """Returns the tokens with some values at some places; those beyond the end are dropped."""
    return tokens.at[jnp.arange(tokens.shape[0])[:, None], places].set(values, mode="drop")
