"""GemFilter: an early layer chooses the tokens of the prompt that the model reads (Shi et al. 2024, arXiv:2409.17422)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from layers.caches.policy import CachePolicy
from layers.caches.prompt import Prompt
from layers.caches.selecting import among_best
from layers.caches.snapkv import pool
from layers.options import Count, checked_dataclass
from layers.typing import Array, Bool


@checked_dataclass
class GemFilter(CachePolicy):
    """GemFilter: an early layer chooses the tokens of the prompt that the model reads (Shi et al. 2024, arXiv:2409.17422).

        s_j = mean_{|j' - j| <= kernel // 2} sum_heads q_t . k_j'

    with the query of the last token t of the prompt in layer `layer`. The `budget` tokens of largest s are a new prompt, in their
    order and with positions from 0, which the whole model reads and continues. The layers after `layer` are run on it alone, unless
    the stack is scanned. As in the paper nothing makes the last token one of them. Prompts of at most `budget` tokens stay as they are.

    Attributes:
      budget: tokens of the new prompt.
      layer: the layer, from 0, which must have a cache of all tokens.
      kernel: tokens that are pooled, an odd number, with zeros beyond the ends.
    """

    budget: int = 1024
    layer: Count = 13
    kernel: int = 5
    compresses = False
    filters = True
    observed = 1

    def __post_init__(self) -> None:
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel} of the cache; expected an odd number")

    def check(self, total: int, layers: Mapping[int, Any]) -> None:
        super().check(total, layers)
        if self.layer not in layers:
            raise ValueError(
                f"layer={self.layer} of the cache 'gemfilter' has no cache of all tokens; expected one of the layers "
                f"{', '.join(map(str, layers))}"
            )

    def chosen(self, prompt: Prompt) -> Bool[Array, "b s"]:
        """Returns the tokens of the new prompt, given the layer's keys and its last query."""
        (b, _, heads, width), groups = prompt.queries.shape, prompt.keys.shape[2]
        # Key/value heads have several query heads each; their products are summed.
        queries = prompt.queries.reshape(b, groups, heads // groups, width).astype(jnp.float32).sum(2)
        products = jnp.einsum(
            "bgk,bsgk->bs", queries, prompt.keys.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
        )
        scores = pool(jnp.where(prompt.live, products, 0.0)[:, None], self.kernel, "mean")[:, 0]
        return among_best(jnp.where(prompt.live, scores, -jnp.inf), self.budget)
