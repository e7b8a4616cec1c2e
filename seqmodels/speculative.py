"""Speculative decoding with drafts that are looked up in the row itself.

Text repeats itself: a draft of the next tokens is what followed the last occurrence of the last n tokens, in the prompt or
the output (prompt lookup decoding, Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding). One call of the model reads
the draft and gives the logits of all its positions (Leviathan et al. 2023, arXiv:2211.17192). At each the next token is
chosen as without a draft, with the key of its number. As long as the draft agrees, its tokens are read already; the
first that differs is a new token too, and ends it. So the outputs are those of decoding without drafts, greedy or sampled, up
to the rounding of a call on several tokens.

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
from seqmodels.decoding import Generation, Rows, append, empty, keys_of_rows
from seqmodels.language_model import LanguageModel
from seqmodels.sampling import Sampling


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


@partial(jax.jit, static_argnames=("size", "most", "ngram"), donate_argnums=(1, 2))
def decode(
    model: LanguageModel,
    rows: Rows,
    history: History,
    sampling: Sampling,
    stops: Int[Array, "n l"] | None,
    key: Key[Array, ""],
    start: Any,
    steps: Any,
    *,
    size: int,
    most: int,
    ngram: int,
) -> tuple[Rows, History, Generation]:
    """Returns what `decoding.decode` does, and the history; a row that has `steps` new tokens waits for the others.

    Args:
      most: number of tokens of a draft.
      ngram: number of tokens that a draft is looked up by.
    """
    keys, window = keys_of_rows(key, rows.token.shape[0]), 2 * most + 1

    def step(carry):
        rows, history, new = carry
        active = ~rows.stopped & (new.lengths < steps)
        draft, found = look_up(history.tokens, history.length, most=most, ngram=ngram)
        drafted = jnp.where(active & found, jnp.minimum(most, steps - new.lengths - 1), 0)
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
            with_draft = _written(history.tokens, places, draft)
            count = jnp.where(active, history.pending + drafted, 0)
            outputs, state = read(with_draft, count, window)
            ahead = history.pending[:, None] - 1 + jnp.arange(most + 1)[None]
            x = jnp.take_along_axis(outputs.x, ahead[..., None], axis=1, mode="clip")
            return *choose(outputs._replace(x=x), draft), state

        def without_draft():
            outputs, state = read(history.tokens, active.astype(jnp.int32), 1)
            return *choose(outputs, draft[:, :0]), state

        def choose(outputs, draft):
            """Returns the rows and the new tokens, with those up to the first that the draft does not have."""

            def one(carry, at):
                rows, new, wanted = carry
                x, guess, number = at
                logits = outputs._replace(x=x[:, None]).logits[:, 0]
                rows, new = append(rows, new, logits, sampling, stops, keys, start, wanted)
                return (rows, new, wanted & (number < drafted) & (rows.token == guess) & ~rows.stopped), None

            guesses = jnp.pad(draft, ((0, 0), (0, 1)))
            at = (jnp.swapaxes(outputs.x, 0, 1), guesses.T, jnp.arange(guesses.shape[1]))
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
        return chosen._replace(state=state), history, grown._replace(calls=calls)

    def goes_on(carry):
        rows, _, new = carry
        return (~rows.stopped & (new.lengths < steps)).any()

    return jax.lax.while_loop(goes_on, step, (rows, history, empty(len(rows.token), size)))


def _written(
    tokens: Int[Array, "b h"], places: Int[Array, "b n"], values: Int[Array, "b n"]
) -> Int[Array, "b h"]:
    """Returns the tokens with some values at some places; those beyond the end are dropped."""
    return tokens.at[jnp.arange(tokens.shape[0])[:, None], places].set(values, mode="drop")
