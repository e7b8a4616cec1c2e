"""Choosing a token from logits: greedy, or random from a filtered distribution.

The options apply in the order of `Sampling`: the repetition penalty, the temperature, then the filters. A token that a
filter removes has logit -inf; at least the most probable token stays. Tokens of equal logit stay or go together.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from layers.typing import Array, Bool, Float, Int, Key, Num

Number = float | int


class Sampling(NamedTuple):
    """How a token is chosen; what is None is not computed.

    Attributes:
      repetition_penalty: divisor of positive logits, and factor of negative ones, of tokens that occurred.
      temperature: divisor of the logits; None takes the most probable token.
      top_k: number of tokens that stay.
      top_p: probability that the fewest tokens that stay sum to.
      min_p: probability of a token that stays, as a fraction of the largest.
    """

    repetition_penalty: float | Num[Array, ""] | None
    temperature: float | Num[Array, ""] | None
    top_k: int | Int[Array, ""] | None
    top_p: float | Num[Array, ""] | None
    min_p: float | Num[Array, ""] | None


def make_sampling(
    *,
    vocab_size: int,
    temperature: Number = 1.0,
    top_k: int | None = None,
    top_p: Number | None = None,
    min_p: Number | None = None,
    repetition_penalty: Number = 1.0,
) -> Sampling:
    """Returns the options as `choose` takes them; those that change nothing are None.

    Raises:
      ValueError: an option is out of range, or a filter is set although temperature=0 leaves it without effect.
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature}; expected a finite number of at least 0")
    if top_k is not None and (isinstance(top_k, bool) or top_k != int(top_k) or not 1 <= top_k <= vocab_size):
        raise ValueError(
            f"top_k={top_k}; expected an integer from 1 to {vocab_size}, as vocab_size={vocab_size}"
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}; expected a number above 0 and at most 1")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ValueError(f"min_p={min_p}; expected a number from 0 to 1")
    if not 0 < repetition_penalty < math.inf:
        raise ValueError(
            f"repetition_penalty={repetition_penalty}; expected a finite number above 0 (1 for none)"
        )
    filters = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    given = [f"{name}={value}" for name, value in filters.items() if value is not None]
    if temperature == 0 and given:
        raise ValueError(
            f"temperature=0 takes the most probable token, so {', '.join(given)} has no effect; expected None, or a "
            "temperature above 0"
        )
    return Sampling(
        repetition_penalty=None if repetition_penalty == 1 else float(repetition_penalty),
        temperature=float(temperature) if temperature else None,
        top_k=None if top_k in (None, vocab_size) else int(top_k),
        top_p=None if top_p in (None, 1) else float(top_p),
        min_p=None if min_p in (None, 0) else float(min_p),
    )


def penalize(
    logits: Float[Array, "b v"], seen: Bool[Array, "b v"], penalty: float | Num[Array, ""]
) -> Float[Array, "b v"]:
    """Returns the logits with those of seen tokens lowered (CTRL, Keskar et al. 2019, arXiv:1909.05858).

    A positive logit is divided by the penalty, a negative one multiplied by it.
    """
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Float[Array, "b v"], k: int | Int[Array, ""]) -> Float[Array, "b v"]:
    """Returns the logits with -inf below the k-th largest."""
    ranked = jnp.sort(logits, axis=-1, descending=True)
    least = jnp.take(ranked, jnp.asarray(k) - 1, axis=-1)
    return jnp.where(logits >= least[:, None], logits, -jnp.inf)


def keep_top_p(logits: Float[Array, "b v"], p: float | Num[Array, ""]) -> Float[Array, "b v"]:
    """Returns the logits with -inf outside the nucleus (Holtzman et al. 2020, arXiv:1904.09751).

    The nucleus is the smallest set of most probable tokens whose probabilities sum to at least p.
    """
    ranked = jnp.sort(logits, axis=-1, descending=True)
    chances = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(chances, axis=-1) - chances
    inside = (before < p).at[:, 0].set(True)
    least = jnp.min(ranked, axis=-1, where=inside, initial=jnp.inf)
    return jnp.where(logits >= least[:, None], logits, -jnp.inf)


def keep_min_p(logits: Float[Array, "b v"], p: float | Num[Array, ""]) -> Float[Array, "b v"]:
    """Returns the logits with -inf where the probability is below p times the largest (Nguyen et al. 2024, arXiv:2407.01082)."""
    largest = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.where(logits >= largest + jnp.log(p), logits, -jnp.inf)


def filtered(
    logits: Float[Array, "b v"], sampling: Sampling, seen: Bool[Array, "b v"] | None = None
) -> Float[Array, "b v"]:
    """Returns the logits of the distribution that `choose` samples from.

    Args:
      logits: logits of the model.
      sampling: see `Sampling`.
      seen: tokens that occurred in each row; needed for the repetition penalty only.
    """
    if sampling.repetition_penalty is not None:
        logits = penalize(logits, seen, sampling.repetition_penalty)
    if sampling.temperature is not None:
        # The largest logit becomes 0, so that a small temperature overflows to -inf only.
        logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / sampling.temperature
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p is not None:
        logits = keep_min_p(logits, sampling.min_p)
    return logits


def choose(
    logits: Float[Array, "b v"],
    sampling: Sampling,
    keys: Key[Array, "b"],
    seen: Bool[Array, "b v"] | None = None,
) -> tuple[Int[Array, "b"], Float[Array, "b"]]:
    """Returns a token per row and its log-probability under the model.

    The log-probability is that of the logits as given, before the penalty, the temperature and the filters.

    Args:
      logits, sampling, seen: see `filtered`.
      keys: a random key per row, so that a row does not depend on the others.
    """
    likely = filtered(logits, sampling, seen)
    if sampling.temperature is None:
        tokens = jnp.argmax(likely, axis=-1)
    else:
        tokens = jax.vmap(jax.random.categorical)(keys, likely)
    tokens = tokens.astype(jnp.int32)
    return tokens, _chances(logits, tokens)


def verified(
    logits: Float[Array, "b v"],
    sampling: Sampling,
    keys: Key[Array, "b"],
    seen: Bool[Array, "b v"] | None = None,
    *,
    guess: Int[Array, "b"],
    likely: Float[Array, "b v"],
    there: Bool[Array, "b"],
    accepting: Key[Array, "b"],
) -> tuple[Int[Array, "b"], Float[Array, "b"]]:
    """Returns what `choose` does, as often as it can the token that another distribution gave.

        x ~ q,   x with probability min(1, p(x) / q(x)),   otherwise a sample of max(p - q, 0) / sum max(p - q, 0)

    is a sample of p (Leviathan et al. 2023, arXiv:2211.17192). Rows that have no guess sample from p as `choose` does. The
    temperature is above 0.

    Args:
      logits, sampling, keys, seen: see `choose`; p is the distribution of `filtered`.
      guess: x.
      likely: logits of q.
      there: whether a row has a guess.
      accepting: a random key per row, another than that of `keys`.
    """
    wanted = filtered(logits, sampling, seen)
    p, q = jax.nn.softmax(wanted, axis=-1), jax.nn.softmax(likely, axis=-1)
    at_guess = [jnp.take_along_axis(one, guess[:, None], axis=-1)[:, 0] for one in (p, q)]
    accepted = there & (jax.vmap(jax.random.uniform)(accepting) * at_guess[1] < at_guess[0])
    beyond = jnp.maximum(p - q, 0.0)
    # Equal distributions leave nothing beyond but what rounding does.
    other = there & (beyond.sum(-1) > 0)
    remaining = jnp.where(other[:, None], jnp.log(beyond), wanted)
    sampled = jax.vmap(jax.random.categorical)(keys, remaining).astype(jnp.int32)
    tokens = jnp.where(accepted, guess, sampled)
    return tokens, _chances(logits, tokens)


def _chances(logits: Float[Array, "b v"], tokens: Int[Array, "b"]) -> Float[Array, "b"]:
    """Returns the log-probability of each token."""
    chances = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return jnp.take_along_axis(chances, tokens[:, None], axis=-1)[:, 0]
