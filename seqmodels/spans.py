"""The search of the spans of heads for MoA, by what hiding tokens would do to the loss on rows of text."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layers.caches.moa import MoA
from layers.caches.perturbed import Perturbing
from layers.options import check_number
from layers.typing import Array, Float, Int
from seqmodels import caching
from seqmodels.language_model import LanguageModel, LanguageModelState
from seqmodels.rows import read_rows

# Windows of fixed and of growing length, and everything.
RULES = (
    *((alpha, 0.0) for alpha in (0, 512, 1024, 2048)),
    *((alpha, 0.25) for alpha in (0, 512, 1024)),
    *((alpha, 0.5) for alpha in (0, 512, 1024)),
    (0, 1.0),
)


def search(
    model: LanguageModel,
    tokens: Int[Array, "n t"] | Int[np.ndarray, "n t"],
    *,
    density: float = 0.5,
    rules: Sequence[Sequence[Any]] = RULES,
    sinks: int = 64,
    least: int = 128,
) -> tuple[list[list[float]], list[list[float]]]:
    """Returns alphas and betas of each layer and key/value head, for `cache="moa(alphas=..., betas=...)"`.

        minimize sum_g sum_{(i, j) hidden by r_g} E_gij    with    mean_g n_{r_g}(t) <= density t
        E_gij = sum_{heads of g} -(dL / da_ij) / (1 - p_ij)

    over rules r = (alpha, beta), as MoA does (Fu et al. 2024, arXiv:2406.14909). a are logits and p weights of attention, and L the mean
    of -log p of the next token. E is the change of L to first order if a query loses a token and its other weights grow to sum to 1. The
    choice is exact, at the length of the rows; the paper also holds the density at other lengths, and chooses among several optima
    by the loss on longer rows. Memory grows with t^2 and the heads of the model. `json.dump` writes each result to a file that the
    policy reads.

    Args:
      model: a language model with attention to all tokens.
      tokens: rows without padding.
      density: share of the tokens that a head sees at the end of a row, on average.
      rules: pairs (alpha, beta) to choose from.
      sinks, least: as in `MoA`.

    Raises:
      ValueError, TypeError: the model has no layer with a cache of all tokens, tokens are no rows of its vocabulary, a rule is no
        pair of numbers, or no rules fit the density.
    """
    tokens = read_rows(model, tokens, least=2)
    if not 0 < density <= 1:
        raise ValueError(f"density={density}; expected more than 0 and at most 1")
    time = tokens.shape[1]
    caching.check(model, Perturbing(), time, 1, name=None)
    if not len(rules) or any(len(rule) != 2 for rule in rules):
        raise ValueError(f"rules={rules!r}; expected one or more pairs (alpha, beta)")
    for number, rule in enumerate(rules):
        for name, value in zip(("alpha", "beta"), rule, strict=True):
            check_number(f"{name} of rules[{number}]", value)
    given = [[float(x) for x in each] for each in zip(*rules, strict=True)]
    spans = MoA(alphas=given[:1], betas=given[1:], sinks=sinks, least=least).spans(0, time)
    rows = [[hidden(one, spans, sinks) for one in influences(model, row)] for row in tokens]
    costs = [np.mean([row[layer] for row in rows], axis=0) for layer in range(len(rows[0]))]
    groups = [len(layer) for layer in costs]
    chosen = choose(np.concatenate(costs), spans[-1], int(density * time * sum(groups)))
    split = np.split(np.asarray(given)[:, chosen], np.cumsum(groups)[:-1], axis=1)
    return tuple([layer[number].tolist() for layer in split] for number in range(2))


def influences(model: LanguageModel, row: Int[np.ndarray, "t"]) -> list[Float[np.ndarray, "g t t"]]:
    """Returns E of each layer with a cache, by key/value head, query and token."""
    found = _influences(model, jnp.asarray(row)[None])
    groups = [mixer.config.groups for mixer in caching.layers_of(model).values()]
    return [
        np.asarray(one, np.float64).reshape(count, -1, *one.shape[1:]).sum(1)
        for one, count in zip(found, groups, strict=True)
    ]


@jax.jit
def _influences(model, tokens):
    layers = list(caching.layers_of(model))
    begun = caching.begin(model, Perturbing(), 1, tokens.shape[1])

    def loss_of(added):
        carried = {
            layer: dataclasses.replace(begun.layers[layer].carried, added=one)
            for layer, one in zip(layers, added, strict=True)
        }
        return loss(model, tokens, caching.with_carried(begun, carried))

    added = [begun.layers[layer].carried.added for layer in layers]
    gradients, state = jax.grad(loss_of, has_aux=True)(added)
    weights = [state.layers[layer].carried.weights for layer in layers]
    # The only token that a query sees cannot be hidden.
    left = [jnp.where(one < 1, 1 - one, 1.0) for one in weights]
    return [(-gradient / rest)[0] for gradient, rest in zip(gradients, left, strict=True)]


def loss(
    model: LanguageModel, tokens: Int[Array, "1 t"], state: LanguageModelState
) -> tuple[Float[Array, ""], LanguageModelState]:
    """Returns the mean of -log p of each token but the first, and the state."""
    logits, state = model(tokens, state)
    chances = jax.nn.log_softmax(logits[:, :-1], axis=2)
    return -jnp.take_along_axis(chances, tokens[:, 1:, None], axis=2).mean(), state


def hidden(
    influence: Float[np.ndarray, "g t t"], spans: Int[np.ndarray, "n r"], sinks: int
) -> Float[np.ndarray, "g r"]:
    """Returns the influence of all that each rule hides, given its spans for every number of tokens."""
    i, j = np.arange(influence.shape[1])[:, None], np.arange(influence.shape[1])[None]
    found = [
        np.where((j <= i) & (j >= sinks) & (i - j >= one[1:, None] - sinks), influence, 0.0).sum((1, 2))
        for one in spans.T
    ]
    return np.stack(found, axis=1)


def choose(costs: Float[np.ndarray, "g r"], sizes: Int[np.ndarray, "r"], most: int) -> list[int]:
    """Returns the rule of each head of the smallest sum of costs whose sizes sum to at most `most`.

    Raises:
      ValueError: the smallest sizes sum to more.
    """
    unit = math.gcd(*map(int, sizes))
    weights, room = sizes // unit, most // unit
    if (smallest := len(costs) * int(weights.min())) > room:
        raise ValueError(
            f"rules of {smallest * unit // len(costs)} tokens at least for each of {len(costs)} heads, which may see {most} together; "
            "expected a larger density, or smaller rules"
        )
    # best[c]: the smallest cost of the heads so far, with sizes of at most c.
    best, picked = np.zeros(room + 1), []
    for head in costs:
        options = np.full((len(weights), room + 1), np.inf)
        for rule, weight in enumerate(weights):
            options[rule, weight:] = head[rule] + best[: room + 1 - weight]
        picked.append(options.argmin(0).astype(np.int32))
        best = options.min(0)
    chosen: list[int] = []
    for rules in reversed(picked):
        chosen.append(int(rules[room]))
        room -= int(weights[chosen[-1]])
    return chosen[::-1]
