"""HeadKV: SnapKV with budgets by the importance of heads (Fu et al. 2024, arXiv:2410.19258)."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from layers.caches.by_head import check_heads, read_heads
from layers.caches.prompt import Prompt
from layers.caches.snapkv import SnapKV
from layers.caches.state import View
from layers.options import Positive, checked_dataclass
from layers.typing import Array, Int


@checked_dataclass
class HeadKV(SnapKV):
    """HeadKV: SnapKV with budgets by the importance of heads, measured beforehand (Fu et al. 2024, arXiv:2410.19258).

        b_lg = round(s_lg L G (B // beta) + B - B // beta) + window,   B = budget - window,   sum_lg s_lg = 1

    for key/value head g of the G heads in layer l of the L layers with a cache. Slots are those of the layer's largest budget.

    Attributes:
      importance: a number of at least 0 per layer with a cache and key/value head, in order, such as the share of a head in
        retrieving what is asked; a JSON file or nested lists.
      budget: mean over heads of the tokens that are kept, the window included.
      window, kernel, pooling: as in `SnapKV`.
      temperature: power of the importance.
      beta: B // beta of a head's tokens are given by importance, on average; the others all heads have.
    """

    importance: Any = None
    kernel: int = 7
    pooling: Literal["mean", "max"] = "max"
    temperature: Positive = 1.0
    beta: Positive = 1.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.importance is None:
            raise ValueError(
                "importance=None of the cache 'headkv', which needs the importance of every head, measured for the model; expected "
                "a list per layer, or a JSON file of one"
            )
        object.__setattr__(self, "importance", read_heads("importance", self.importance))
        if self.beta < 1:
            raise ValueError(f"beta={self.beta} of the cache 'headkv'; expected at least 1")
        if not any(map(any, self.importance)):
            raise ValueError("importance of the cache 'headkv' is 0 for all heads; expected a number above 0")

    def check(self, total: int, layers: Mapping[int, Any]) -> None:
        super().check(total, layers)
        check_heads("importance", self.importance, layers)

    def budgets(self, prompts: Sequence[Prompt], views: Sequence[View]) -> list[Int[Array, "1 g"]]:
        mean = self.budget - self.window
        shared = int(mean // self.beta)
        powers = [np.asarray(layer) ** self.temperature for layer in self.importance]
        heads, total = sum(map(len, powers)), sum(layer.sum() for layer in powers)
        return [
            jnp.asarray(np.round(layer / total * shared * heads + mean - shared).astype(np.int32))[None]
            + self.window
            for layer in powers
        ]
