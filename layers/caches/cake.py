"""CAKE: budgets by how spread and how changing the attention of a layer is (Qin et al. 2025, arXiv:2503.12491)."""

from collections.abc import Sequence

import jax.numpy as jnp

from layers.caches.kept import by_group
from layers.caches.prompt import Prompt
from layers.caches.snapkv import SnapKV
from layers.caches.state import View
from layers.options import NonNegative, Positive, checked_dataclass
from layers.typing import Array, Float, Int


@checked_dataclass
class Cake(SnapKV):
    """CAKE: budgets by spread and change of attention in each layer (Qin et al. 2025, arXiv:2503.12491).

        A_ij = attention of the last queries i to tokens j before the window
        H = -sum_ij A_ij log A_ij,   V = sum_j var_i A_ij,   P_l = H^(1/tau1) V^(1/tau2)          summed over heads
        b_l = min(t - window, floor(P_l / sum P  L (budget - window))) + window
        s_j = pool(mean_i A_ij + gamma var_i A_ij)

    in layer l of the L layers with a cache. What the minimum leaves over goes to the other layers in equal parts. Each row has budgets
    of its own. Kept are the window and the b_l - window tokens of largest s; new tokens are kept too.

    Attributes:
      budget: mean over layers of the tokens that a head keeps, the window included.
      window, kernel, pooling: as in `SnapKV`.
      gamma: factor of the variance in the scores.
      tau1, tau2: temperatures of H and V; the authors choose them by model.
    """

    gamma: NonNegative = 200.0
    tau1: Positive = 1.0
    tau2: Positive = 1.0

    def budgets(self, prompts: Sequence[Prompt], views: Sequence[View]) -> list[Int[Array, "b 1"]]:
        found = []
        for prompt, view in zip(prompts, views, strict=True):
            a = self._before(prompt, view)
            entropy = -(a * jnp.log(a + 1e-10)).sum((1, 2, 3))
            change = a.var(axis=2, ddof=1).sum((1, 2))
            found.append(entropy ** (1 / self.tau1) * change ** (1 / self.tau2))
        preferred = jnp.stack(found, axis=1)  # b L
        total = len(prompts) * (self.budget - self.window)
        share = preferred / jnp.maximum(preferred.sum(1, keepdims=True), 1e-30)
        most = jnp.maximum(prompts[0].length[:, None] - self.window, 0)
        wanted = jnp.floor(share * total)
        given = jnp.minimum(wanted, most)
        below = wanted < most
        spare = (wanted - given).sum(1, keepdims=True) // jnp.maximum(below.sum(1, keepdims=True), 1)
        given = jnp.minimum(given + jnp.where(below, spare, 0.0), most).astype(jnp.int32) + self.window
        return [given[:, place, None] for place in range(len(prompts))]

    def scores(self, prompt: Prompt, view: View) -> Float[Array, "b s g"]:
        a = self._before(prompt, view)
        found = a.mean(2) + self.gamma * a.var(axis=2, ddof=1)
        return self.pooled(prompt, by_group(found, prompt.keys.shape[2]))

    def _before(self, prompt, view):
        """The attention of the last queries to tokens before the window, (b, h, w, s)."""
        before = prompt.live & ~prompt.recent(self.window)
        return jnp.where(before[:, None, None], prompt.observed(view), 0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 2:
            raise ValueError(f"window={self.window} of the cache 'cake'; a variance takes at least 2 queries")
