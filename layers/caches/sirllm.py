"""SirLLM: the tokens that surprised the model, beside the first and the last ones (Yao et al. 2024, arXiv:2405.12528)."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from layers.caches.kept import keep
from layers.caches.policy import CachePolicy
from layers.caches.prompt import Prompt
from layers.caches.state import CacheState, View
from layers.options import Count, checked_dataclass
from layers.typing import Array, Float


@checked_dataclass
class SirLLM(CachePolicy):
    """SirLLM: tokens that surprised the model, and the first and last ones (Yao et al. 2024, arXiv:2405.12528).

        e_j = -log p(x_j | x_<j)

    The same in all layers and heads: of a prompt the first `sinks`, the last `recent` and, of the others, the budget - sinks - recent
    tokens of largest e. New tokens are kept too. Positions are true ones, where the paper numbers tokens inside the cache; its decay of e
    from one round of a dialogue to the next changes nothing in one prompt.

    Attributes:
      budget: tokens of the prompt that are kept.
      sinks, recent: first and last tokens among them.
    """

    budget: int = 1516
    sinks: Count = 4
    recent: Count = 512
    needs_surprise = True

    def __post_init__(self) -> None:
        if self.budget < self.sinks + self.recent:
            raise ValueError(
                f"budget={self.budget} of the cache 'sirllm' with sinks={self.sinks} and recent={self.recent}; expected at least "
                "their sum"
            )

    def compressed(
        self,
        prompts: Sequence[Prompt],
        views: Sequence[View],
        *,
        room: int,
        call: int = 1,
        surprise: Float[Array, "b s"] | None = None,
        **_: Any,
    ) -> list[CacheState]:
        found = []
        for prompt in prompts:
            always = (prompt.cache.positions < self.sinks) | prompt.recent(self.recent)
            scores = jnp.where(always, jnp.inf, surprise)[..., None]
            found.append(keep(prompt, jnp.broadcast_to(scores, prompt.keys.shape[:3]), self.budget, room))
        return found
