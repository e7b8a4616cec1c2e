"""SnapKV: the tokens that the end of the prompt attends to (Li et al. 2024, arXiv:2404.14469)."""

from typing import Literal

import jax.numpy as jnp

from layers.caches.kept import by_group
from layers.caches.policy import CachePolicy
from layers.caches.prompt import Prompt
from layers.caches.state import View
from layers.options import checked_dataclass
from layers.typing import Array, Float


@checked_dataclass
class SnapKV(CachePolicy):
    """SnapKV: the tokens that the last queries of the prompt attend to (Li et al. 2024, arXiv:2404.14469).

        s_j = pool_{|j' - j| <= kernel // 2} sum_{i > t - window} softmax_j'(q_i . k_j' / sqrt(k)),   j <= t - window

    per key/value head, the mean over its query heads. Kept are the window and the budget - window tokens of largest s. New tokens are
    kept too. What is asked must stand at the end of the prompt.

    Attributes:
      budget: tokens of the prompt that each head keeps, the window included.
      window: w, number of last tokens, whose queries choose.
      kernel: tokens that are pooled, an odd number.
      pooling: "mean", which counts zeros beyond the ends, or "max".
    """

    budget: int = 2048
    window: int = 32
    kernel: int = 5
    pooling: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        if self.budget < self.window:
            raise ValueError(
                f"budget={self.budget} of the cache with window={self.window}; expected at least the window"
            )
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel} of the cache; expected an odd number")

    @property
    def observed(self) -> int:
        return self.window

    def scores(self, prompt: Prompt, view: View) -> Float[Array, "b s g"]:
        mass = by_group(prompt.observed(view).sum(2), prompt.keys.shape[2])
        return self.pooled(prompt, mass)

    def pooled(self, prompt: Prompt, mass: Float[Array, "b g s"]) -> Float[Array, "b s g"]:
        """Returns pooled masses of the tokens before the window, and inf in it."""
        window = prompt.recent(self.window)
        found = pool(jnp.where((prompt.live & ~window)[:, None], mass, 0.0), self.kernel, self.pooling)
        return jnp.where(window[..., None], jnp.inf, jnp.moveaxis(found, 1, 2))


def pool(x: Float[Array, "b g s"], kernel: int, how: str) -> Float[Array, "b g s"]:
    """Returns means or maxima over `kernel` neighbours, with zeros beyond the ends."""
    half, width = kernel // 2, x.shape[2]
    padded = jnp.pad(x, ((0, 0), (0, 0), (half, half)))
    shifted = jnp.stack([padded[:, :, shift : shift + width] for shift in range(kernel)])
    return shifted.mean(0) if how == "mean" else shifted.max(0)
