"""What generation is asked for: sequences of tokens, how new ones are chosen, and where a row ends."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from layers.indices import check_indices
from layers.typing import Array, Int, Key
from seqmodels.decoding import ANY, NOTHING, Generation, Rows
from seqmodels.sampling import Number, Sampling, make_sampling

Prompts = Array | np.ndarray | Sequence[Any]


class Request(NamedTuple):
    """What generation is asked for.

    Attributes:
      given: token ids of the prompts or sources, int32.
      sampling: how a token is chosen.
      stops: stop sequences, the shorter ones with `ANY` in front; None without any.
      key: key of the sampling.
    """

    given: list[np.ndarray]
    sampling: Sampling
    stops: Int[np.ndarray, "n l"] | None
    key: Key[Array, ""]


def read_request(
    name: str,
    given: Prompts,
    *,
    vocab_size: int,
    counts: Mapping[str, Any],
    stop: Sequence[Any],
    seed: int,
    **sampling: Number | None,
) -> Request:
    """Returns a request, checked.

    Args:
      name: what the sequences are called, such as "tokens".
      given: see `seqmodels.generate`, as are `stop` and `seed`.
      counts: arguments that must be integers of at least 1, by name.
      sampling: options of `make_sampling`.

    Raises:
      ValueError, TypeError: an argument is invalid.
    """
    for argument, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{argument}={value!r}; expected an integer of at least 1")
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed!r}; expected an integer from 0 to {2**32 - 1}")
    chosen = make_sampling(vocab_size=vocab_size, **sampling)
    read = sequences(name, given, vocab_size)
    if not read:
        raise ValueError(f"{name} holds no sequence; expected at least one")
    stops = sequences("stop", stop, vocab_size)
    return Request(read, chosen, aligned(stops) if stops else None, jax.random.key(np.uint32(seed)))


def sequences(name: str, given: Any, vocab_size: int) -> list[np.ndarray]:
    """Returns sequences of token ids as int32 arrays; raises unless each has a token and all are in the vocabulary."""
    if isinstance(given, str | bytes) or not hasattr(given, "__len__"):
        raise TypeError(f"{name} is {given!r}; expected sequences of token ids")
    found = []
    for number, one in enumerate(given):
        ids = np.asarray(one)
        if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
            raise TypeError(
                f"{name}[{number}] is {ids.dtype}{list(ids.shape)}; expected integer token ids (t,)"
            )
        if not ids.size:
            raise ValueError(f"{name}[{number}] is empty; expected at least one token id")
        check_indices(f"{name}[{number}]", ids, vocab_size, of="vocab_size")
        found.append(ids.astype(np.int32))
    return found


def aligned(stops: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the stop sequences (n, l), the shorter ones with ANY in front."""
    longest = max(map(len, stops))
    return np.stack([np.pad(one, (longest - len(one), 0), constant_values=ANY) for one in stops])


def remembering(rows: Rows, texts: Sequence[Any], request: Request, vocab_size: int) -> Rows:
    """Returns the rows before their first new tokens, with what stop sequences and the repetition penalty need.

    Args:
      texts: the tokens of each row so far.
    """
    if request.stops is not None:
        rows = rows._replace(recent=jnp.full((len(texts), request.stops.shape[1]), NOTHING, jnp.int32))
    if request.sampling.repetition_penalty is not None:
        seen = np.zeros((len(texts), vocab_size), bool)
        for row, text in enumerate(texts):
            seen[row, text] = True
        rows = rows._replace(seen=jnp.asarray(seen))
    return rows


def received(new: Generation, start: int) -> Generation:
    """Returns new tokens on the host, without the room that no row took.

    Args:
      start: number of new tokens of each row before these.

    Raises:
      FloatingPointError: a log-probability is not finite.
    """
    new = jax.tree.map(np.asarray, new)
    wrong = np.argwhere(~np.isfinite(new.log_probabilities))
    if len(wrong):
        row, step = wrong[0]
        raise FloatingPointError(
            f"the logits of row {row} are not finite at new token {start + step}: the row is longer than a mixer's max_length, "
            "or the parameters are not finite"
        )
    done = int(new.lengths.max())
    return Generation(new.tokens[:, :done], new.lengths, new.log_probabilities[:, :done], int(new.calls))
