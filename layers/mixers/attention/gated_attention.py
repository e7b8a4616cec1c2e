"""Gated attention: a sigmoid gate at the positions that its paper compares (Qiu et al. 2025, arXiv:2505.06708)."""

from typing import Literal

import jax
from flax import nnx

from layers.mixers.attention.attention import Attention
from layers.options import checked_dataclass
from layers.parameters import linear
from layers.parts.attention_config import AttentionConfig
from layers.parts.heads import split_heads
from layers.typing import Array, Float

GATE_AT = ("attention", "value", "key", "query", "output")


@checked_dataclass
class GatedAttentionConfig(AttentionConfig):
    """Options of `GatedAttention`: those of `AttentionConfig`, and two more.

    Attributes:
      qk_norm: whether RMSNorm normalizes the features of each query and key head before the rotation; True by default here.
      gate: the gated quantity: the "attention" output before the output projection (the paper's G1, its best), the "value"
        (G2), "key" (G3) or "query" (G4) after projection and norm and before the rotation, or the "output" after the
        output projection (G5).
      gate_size: "elementwise" for one gate per feature or "headwise" for one gate per head. "output" allows only the former.
    """

    qk_norm: bool = True
    gate: Literal["attention", "value", "key", "query", "output"] = "attention"
    gate_size: Literal["elementwise", "headwise"] = "elementwise"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gate == "output" and self.gate_size == "headwise":
            raise ValueError("gate='output' comes after the heads are mixed; use gate_size='elementwise'")


class GatedAttention(Attention):
    """Gated attention: softmax attention whose output a sigmoid of the input gates (Qiu et al. 2025, arXiv:2505.06708).

        y = W_o (o * sigmoid(W_g x)),  o the heads' outputs of `Attention`

    or, with the option `gate`, the same gate on queries, keys, values or y. Gates start near 1/2.
    """

    def __init__(self, config: GatedAttentionConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        count = config.groups if config.gate in ("key", "value") else config.heads
        each = config.size if config.gate_size == "elementwise" else 1
        outputs = config.width if config.gate == "output" else count * each
        axes = ("embed", None if config.gate == "output" else "heads")
        self.gate = linear(config.width, outputs, axes=axes, bias=config.bias, dtype=config.dtype, rngs=rngs)

    def heads(
        self, x: Float[Array, "b t d"]
    ) -> tuple[Float[Array, "b t h k"], Float[Array, "b t g k"], Float[Array, "b t g k"]]:
        """Returns queries, keys and values before the rotation, one of them gated if so configured."""
        return tuple(
            self._gated(y, x) if self.config.gate == name else y
            for name, y in zip(("query", "key", "value"), super().heads(x), strict=True)
        )

    def finish(self, o: Float[Array, "b t h k"], x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Returns the mixer's output; it or the heads' outputs are gated if so configured."""
        y = super().finish(self._gated(o, x) if self.config.gate == "attention" else o, x)
        return y * jax.nn.sigmoid(self.gate(x)) if self.config.gate == "output" else y

    def _gated(self, y, x):
        return y * split_heads(jax.nn.sigmoid(self.gate(x)), y.shape[2])
