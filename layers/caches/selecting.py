"""Policies that keep all tokens and let each query read some of them."""

import abc
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layers.caches.kept import Kept, keep
from layers.caches.policy import CachePolicy
from layers.caches.prompt import Prompt
from layers.caches.state import CacheState, View
from layers.typing import Array, Bool, Float, Int


class Selecting(CachePolicy, abc.ABC):
    """Base class of policies under which every key/value head holds all tokens, in the same slots.

    What is not read is masked: memory and products are those of the whole cache.
    """

    @abc.abstractmethod
    def read(
        self, kept: Kept, view: View, q: Float[Array, "b t h k"], bias: Float[Array, "b h t n"]
    ) -> Bool[Array, "b #h t n"]:
        """Returns which of the tokens that it sees each query reads, by query head."""

    def compressed(
        self, prompts: Sequence[Prompt], views: Sequence[View], *, room: int, call: int = 1, **_: Any
    ) -> list[CacheState]:
        return [everything(prompt, room) for prompt in prompts]

    def adjusted(
        self, kept: Kept, view: View, q: Float[Array, "b t h k"], bias: Float[Array, "b h t n"]
    ) -> Float[Array, "b h t n"]:
        return jnp.where(self.read(kept, view, q, bias), bias, -jnp.inf)


def everything(prompt: Prompt, room: int, **beside: Any) -> Kept:
    """Returns all tokens of a prompt in their order, and empty slots for new ones; `beside` as in `keep`."""
    return keep(prompt, jnp.zeros(prompt.keys.shape[:3]), prompt.slots, room, **beside)


def places(
    kept: Kept, bias: Float[Array, "b h t n"]
) -> tuple[Bool[Array, "b t n"], Int[Array, "b 1 n"], Int[Array, "b t 1"]]:
    """Returns which tokens each query sees, the positions of the tokens, and those of the queries, -1 for padding."""
    seen, positions = bias[:, 0] > -jnp.inf, kept.positions[:, None, :, 0]
    return seen, positions, jnp.where(seen, positions, -1).max(2, keepdims=True)


def among_best(scores: Float[Array, "*b n"], count: Any) -> Bool[Array, "*b n"]:
    """Returns which of the last axis are the `count` largest scores; of equal ones the earlier, and none of -inf.

    `count` is a number, or an array of numbers that broadcasts against the axes before the last.
    """
    n, count = scores.shape[-1], np.broadcast_to(count, scores.shape[:-1])
    most = min(int(count.max(initial=0)), n)
    ranked, index = jax.lax.top_k(scores, most)
    there = (ranked > -jnp.inf) & (np.arange(most) < count[..., None])
    index = jnp.where(there, index, n).reshape(scores.size // n, most)
    rows = jnp.arange(len(index))[:, None]
    chosen = jnp.zeros((len(index), n), bool).at[rows, index].set(True, mode="drop")
    return chosen.reshape(scores.shape)


def to_heads(x: Array, heads: int) -> Array:
    """Returns x (b, g, ...) of key/value heads for each of their query heads, (b, h, ...)."""
    return jnp.repeat(x, heads // x.shape[1], axis=1)
