"""PyramidKV: SnapKV with budgets that fall from layer to layer (Cai et al. 2024, arXiv:2406.02069)."""

from collections.abc import Sequence

import jax.numpy as jnp

from layers.caches.prompt import Prompt
from layers.caches.snapkv import SnapKV
from layers.caches.state import View
from layers.options import Positive, checked_dataclass
from layers.typing import Array, Int


@checked_dataclass
class PyramidKV(SnapKV):
    """PyramidKV: SnapKV with budgets that fall from layer to layer (Cai et al. 2024, arXiv:2406.02069).

        least = B // beta,   most = 2 B - least,   b_l = most - l ((most - least) // (L - 1)) + window,    B = budget - window

    in layer l of the L layers with a cache, from 0. Where the prompt has fewer than most + window tokens, most is what it has before the
    window, and least = 2 B - most.

    Attributes:
      budget: mean over layers of the tokens that a head keeps, the window included.
      window, kernel, pooling: as in `SnapKV`.
      beta: by how much the last layer keeps less than the mean.
    """

    beta: Positive = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta < 1:
            raise ValueError(f"beta={self.beta} of the cache 'pyramidkv'; expected at least 1")

    def budgets(self, prompts: Sequence[Prompt], views: Sequence[View]) -> list[Int[Array, "b 1"]]:
        mean = self.budget - self.window
        before = prompts[0].length[:, None] - self.window
        most = 2 * mean - int(mean // self.beta)
        # A prompt of no more than the mean is kept as a whole.
        most = jnp.where(before < most, jnp.maximum(before, mean), most)
        step = (2 * most - 2 * mean) // max(1, len(prompts) - 1)
        return [most - place * step + self.window for place in range(len(prompts))]
