"""The interface of cache policies: what is kept of a prompt, what new tokens see of it, and what they evict.

    state = policy.begin(cache, heads, place)      in place of an empty cache: the prompt is read into it
    states = policy.compressed(prompts, views, ...)     at the end of the prompt, all layers at once
    policy.adjusted(kept, view, q, bias)           what a call sees of the kept tokens
    policy.evicted(kept, view, q, bias, visit)     what it evicts

A policy is a frozen dataclass of its options. It writes `scores` alone if it keeps `budget` tokens of the prompt and evicts
nothing later. Sizes are Python numbers: a budget is a number of slots, and empty ones are masked.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from layers.caches.kept import Kept, keep
from layers.caches.prompt import Prompt
from layers.caches.state import CacheState, View
from layers.parts.cache import Cache
from layers.segments import Visit
from layers.typing import Array, Float, Int


class CachePolicy:
    """Base class of policies.

    Attributes:
      observed: number of last queries of the prompt that `Prompt` holds.
      compresses: whether something happens at the end of the prompt.
      needs_surprise: whether that takes the log-probabilities of the prompt's tokens.
      shares: whether rows share what their prompts begin with (see `layers.caches.hydragen`).
      packs: whether prompts are read side by side (see `layers.caches.prepacking`).
      filters: whether it leaves out tokens before prompts are read (see `layers.caches.gemfilter`).
    """

    observed: int = 0
    compresses: bool = True
    needs_surprise: bool = False
    shares: bool = False
    packs: bool = False
    filters: bool = False

    def check(self, total: int, layers: Mapping[int, Any]) -> None:
        """Raises ValueError if the policy cannot keep such rows.

        Args:
          total: tokens of the longest row, prompt and new ones.
          layers: configs of the layers of attention whose caches it keeps, by number.
        """
        budget = getattr(self, "budget", None)
        if budget is not None and budget > total:
            raise ValueError(
                f"budget={budget} of the cache is more than the {total} tokens that the longest row has, so that nothing "
                f"would be evicted; expected at most {total}, or cache='full'"
            )

    def begin(self, cache: Cache, heads: int, place: int) -> CacheState | Cache:
        """Returns the state that a layer reads a prompt into.

        Args:
          cache: an empty cache of as many slots.
          heads: query heads.
          place: number of the layer among those with a cache.
        """
        return Prompt.empty(self, cache, heads)

    def first_scores(self, cache: Cache, heads: int) -> Any:
        """Returns what `scored` starts from, given an empty cache and the number of query heads."""
        return None

    def scored(self, scores: Any, view: View, q: Array, cache: Cache, visit: Visit) -> Any:
        """Returns what is gathered of the queries of a prompt with those of one more call; the cache has its tokens."""
        return scores

    def budgets(
        self, prompts: Sequence[CacheState], views: Sequence[View]
    ) -> list[Int[Array, "#b #g"]] | None:
        """Returns how many tokens of a prompt each row and head keeps, per layer; None for `budget` everywhere.

        Args:
          prompts, views: of each layer with a cache its prompt, and how its queries weigh keys.
        """
        return None

    def compressed(
        self,
        prompts: Sequence[Prompt],
        views: Sequence[View],
        *,
        room: int,
        call: int = 1,
        budgets: Sequence[Int[Array, "#b #g"]] | None = None,
        counts: Sequence[int] | None = None,
        surprise: Float[Array, "b s"] | None = None,
    ) -> list[CacheState]:
        """Returns what is kept of a prompt by each layer.

        Args:
          prompts, views: as in `budgets`.
          room: the most new tokens.
          call: the most of them in one call.
          budgets: what `budgets` returns, and `counts` at least the largest of each layer.
          surprise: -log p of each token of the prompt given those before it, where `needs_surprise`; 0 at the first.
        """
        budgets = [None] * len(prompts) if budgets is None else budgets
        counts = [self.budget] * len(prompts) if counts is None else counts
        return [
            keep(prompt, self.scores(prompt, view), count, room, budgets=one)
            for prompt, view, count, one in zip(prompts, views, counts, budgets, strict=True)
        ]

    def scores(self, prompt: Prompt, view: View) -> Float[Array, "b s g"]:
        """Returns the scores by which tokens of a prompt are kept; inf for those that are kept in any case."""
        raise NotImplementedError(
            f"the cache policy {type(self).__name__} writes neither `scores` nor `compressed`; expected one of them, or "
            "compresses=False"
        )

    def adjusted(
        self, kept: Kept, view: View, q: Float[Array, "b t h k"], bias: Float[Array, "b h t n"]
    ) -> Float[Array, "b h t n"]:
        """Returns what is added to the logits, given what positions and segments add; -inf hides a token."""
        return bias

    def evicted(
        self,
        kept: Kept,
        view: View,
        q: Float[Array, "b t h k"],
        bias: Float[Array, "b h t n"],
        visit: Visit,
    ) -> Kept:
        """Returns what is kept after a call, given its queries and what was added to their logits."""
        return kept
