"""Layers that read fewer and fewer tokens, and compute those left out when they are needed (LazyLLM, Fu et al. 2024, arXiv:2407.14057)."""

import dataclasses
import math
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from layers.caches.lazyllm import LazyCache
from layers.mixer import MixerState
from layers.options import Bound, Count, checked_dataclass
from layers.reduction.kept import kept_segments, places_of, taken
from layers.segments import initial_place
from layers.typing import Array, Bool, Float, Int
from seqmodels import caching
from seqmodels.backbone import normalized
from seqmodels.language_model import LanguageModel
from seqmodels.rows import read_rows

Share = Annotated[float, Bound(above=0, most=1)]


@checked_dataclass
class LazyLLMConfig:
    """Options of `lazy_read`.

    Attributes:
      layers: the layers behind which tokens are left out, in order.
      keep: for each of them the part of all tokens so far that later layers read, above 0 and never growing.
    """

    layers: tuple[Count, ...]
    keep: tuple[Share, ...]

    def __post_init__(self) -> None:
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers={self.layers}; expected one or more layers in order, each once")
        if len(self.keep) != len(self.layers) or list(self.keep) != sorted(self.keep, reverse=True):
            raise ValueError(
                f"keep={self.keep}; expected one part per layer of layers={self.layers}, none above the one before"
            )

    def kept(self, layer: int, tokens: int) -> int | None:
        """Returns how many of so many tokens the layers behind `layer` read; None for those that it reads itself."""
        if layer not in self.layers:
            return None
        # A product that is whole but for rounding is that number.
        return math.ceil(self.keep[self.layers.index(layer)] * tokens - 1e-6)


class LazyState(NamedTuple):
    """What calls of `lazy_read` have computed.

    Attributes:
      caches: the cache of each layer, which lacks the tokens that it has never read.
      inputs: what enters each layer, (b, s, d), for the tokens that the layer before has computed: the auxiliary cache.
      length: number of tokens so far.
    """

    caches: tuple[LazyCache, ...]
    inputs: tuple[Float[Array, "b s d"], ...]
    length: int

    @property
    def read(self) -> list[Bool[np.ndarray, "b s"]]:
        """Which tokens each layer read in the last call."""
        return [np.asarray(cache.read) for cache in self.caches]


def lazy_state(model: LanguageModel, rows: int, max_length: int) -> LazyState:
    """Returns the state before the first token of `lazy_read`, with room for `max_length` tokens per row.

    Raises:
      ValueError: a layer of the model is no attention to all tokens, or the model has positions, residuals or blocks that need all.
    """
    stack = model.config.stack
    layers = caching.layers_of(model)
    if len(layers) < stack.depth or model.stack.uses or stack.residual == "reversible":
        raise ValueError(
            f"model has layers of {', '.join(stack.pattern)}, residual={stack.residual!r} and "
            f"{'shared' if model.stack.uses else 'no shared'} blocks; expected attention to all tokens in every layer, one stream and "
            "no shared blocks"
        )
    if model.config.input.absolute_positions != "none":
        raise ValueError(
            f"absolute_positions={model.config.input.absolute_positions!r} of the model; expected 'none', with positions in attention"
        )
    state = model.init_state(rows, max_length=max_length)
    caches = tuple(LazyCache.empty(layer.carried) for layer in state.layers)
    empty = jnp.zeros((rows, max_length, stack.width), jnp.dtype(stack.dtype))
    return LazyState(caches, (empty,) * stack.depth, 0)


def lazy_read(
    model: LanguageModel,
    tokens: Int[Array, "b t"] | Int[np.ndarray, "b t"],
    state: LazyState,
    config: LazyLLMConfig,
) -> tuple[Float[Array, "b v"], LazyState]:
    """Returns the logits after the last of `tokens`, which follow those of the state, and the next state (arXiv:2407.14057).

        C_0 = all n tokens so far,   C_{l+1} = the last token and the ceil(keep n) - 1 others of C_l of the largest
        s_j = mean_heads softmax_{j in C_l}(q_n . k_j / sqrt(head_dim))   behind layer l of `layers`,   C_{l+1} = C_l behind others

    Layer l runs for those tokens of C_l alone that it has not computed in an earlier call, and each attends to the tokens of C_l up to
    itself. What enters a layer is kept for every token of the layer before, so that a token that was left out goes on from there
    when a later call chooses it. Positions stay true. The first call is a prompt, which may come in parts; each part and each token after it
    chooses anew. With keep = 1 the logits are those of the model. Only the abstract of the paper and notes on it were at hand: that
    revived tokens attend to C_l too, that the last token is always one of it, and which layers and parts to take, are our reading.

    Layers run one by one, and how many tokens each computes is read on the host. Numbers of tokens are rounded up to powers of two for
    the compiler. The inputs of all layers stay in memory, depth width numbers per token beside the cache.

    Args:
      model: a language model whose layers are all attention to all tokens.
      tokens: rows of one length without padding.
      state: from `lazy_state` or an earlier call.

    Raises:
      ValueError, TypeError: there is no room for the tokens, a layer does not exist, or tokens are no rows of the model's vocabulary.
    """
    tokens, depth = read_rows(model, tokens), model.config.stack.depth
    rows, slots = state.caches[0].held.shape
    n = state.length + tokens.shape[1]
    if len(tokens) != rows or n > slots:
        raise ValueError(
            f"tokens {list(tokens.shape)} after {state.length} in a state of {rows} rows and max_length={slots}; expected as many rows, "
            f"and at most {slots - state.length} tokens"
        )
    if config.layers[-1] >= depth:
        raise ValueError(f"layers={config.layers}; expected numbers below depth={depth}")
    x, places = (
        _embedded(model, jnp.asarray(tokens)),
        jnp.broadcast_to(jnp.arange(state.length, n), tokens.shape),
    )
    inputs, caches = list(state.inputs), []
    read, count = jnp.broadcast_to(jnp.arange(slots) < n, (rows, slots)), n
    for layer in range(depth):
        inputs[layer] = _put(inputs[layer], x, places)
        cache = dataclasses.replace(state.caches[layer], read=read, most=_rounded(count, slots))
        missing = read & ~cache.held
        places = places_of(missing, _rounded(int(missing.sum(1).max()), slots))
        x, cache = _run(model.stack.block(layer), inputs[layer], cache, places)
        caches.append(cache)
        count = min(count, config.kept(layer, n) or count)
        read = _chosen(cache, n, count)
    last = jnp.argmax(places == n - 1, axis=1)[:, None]
    return _logits(model, taken(x, last)), LazyState(tuple(caches), tuple(inputs), n)


def _rounded(count: int, most: int) -> int:
    """Returns the next power of two, at most `most`."""
    return min(1 << max(count - 1, 0).bit_length(), most)


@jax.jit
def _embedded(model, tokens):
    return model.embedding(tokens)[0]


@jax.jit
def _put(inputs, x, places):
    return inputs.at[jnp.arange(len(x))[:, None], places].set(x.astype(inputs.dtype), mode="drop")


@jax.jit
def _run(block, inputs, cache, places):
    """Runs a layer for the tokens at `places`."""
    _, placed = kept_segments(places, inputs.shape[1], None)
    state = MixerState(cache, initial_place(len(inputs)))
    x, state = block(taken(inputs, places), state, segment_ids=placed)
    return x, state.carried


@jax.jit
def _chosen(cache, n, count):
    """Returns the tokens that the next layer reads: `count` of those that this one reads, the last of n among them."""
    last = jnp.arange(cache.slots) == n - 1
    scores = jnp.where(cache.read, jnp.where(last, jnp.inf, cache.scores), -jnp.inf)
    ranks = jnp.argsort(jnp.argsort(-scores, axis=1, stable=True), axis=1)
    return cache.read & (ranks < count)


@jax.jit
def _logits(model, x):
    return model.outputs(normalized(model.norm, x, None, None)).logits[:, 0]
