"""The options of softmax attention, which mixers that change its pattern extend."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax.numpy as jnp

from layers.options import ActivationDtype, Count, NonNegative, Positive, checked_dataclass
from layers.parts.heads import SharedHeads
from layers.positions import Clex, PositionConfig, Rotary, read_position


@checked_dataclass
class AttentionConfig(SharedHeads):
    """Options of `layers.mixers.attention.attention.Attention`.

    Attributes:
      width: d, number of input and output features.
      heads: h, number of query heads.
      kv_heads: g, number of key/value heads; divides h. If None, equals h. 1 is multi-query attention.
      head_dim: features per head; width / h if None.
      causal: whether a token sees only itself and earlier tokens.
      window: tokens that a query sees: if causal, the last `window` ones, its own included; otherwise those at a distance
        up to `window`.
      sink_tokens: number of tokens at the start of a segment that stay visible beyond the window (StreamingLLM, Xiao et
        al. 2023, arXiv:2309.17453).
      sink_distance: distance between a query and sinks beyond the window: "true", "cache", at most that in a sequence
        of sink_tokens + window tokens, as in StreamingLLM, or "window", the window itself for all sinks, as in LM-Infinite (Han
        et al. 2023, arXiv:2308.16137). Those but "true" need causal rotary attention.
      sink_logits: whether each head learns the logit of one more key, without a value, that all queries see (gpt-oss).
      position: "rope", "none", "alibi", "t5" or "fire", or a mapping with that "name" or "clex" and the options of `Rotary`,
        `T5Bias`, `Fire` or `Clex` in `layers.positions`.
      scale: factor on the logits; 1 / sqrt(head_dim) if None. T5 uses 1.
      key_scale: factor on the keys, after their norm if there is one (Falcon-H1).
      logit_cap: bound of the scaled logits, applied by tanh (Gemma 2); None for none.
      qk_norm: whether RMSNorm normalizes the features of each query and key head before the rotation.
      norm_heads: "each" for norms over the features of one head, which share a scale, or "all" for one norm over those of
        all heads together (OLMo 2).
      norm_epsilon: epsilon of these norms.
      norm_unit_offset: whether their factor is 1 + scale (Gemma 3).
      bias: whether the projections have biases.
      output_bias: whether the output projection has one; as `bias` if None.
      output_projection: whether there is an output projection; without it, the outputs of the heads are given side by side, for
        whoever maps them to another width. Then heads * head_dim must be the width.
      dtype: dtype of the activations and of the cache.
    """

    width: int
    heads: int = 8
    kv_heads: int | None = None
    head_dim: int | None = None
    causal: bool = True
    window: int | None = None
    sink_tokens: Count = 0
    sink_distance: Literal["true", "cache", "window"] = "true"
    sink_logits: bool = False
    position: str | Mapping[str, Any] | PositionConfig = "rope"
    scale: float | None = None
    key_scale: float = 1.0
    logit_cap: Positive | None = None
    qk_norm: bool = False
    norm_heads: Literal["each", "all"] = "each"
    norm_epsilon: NonNegative = 1e-6
    norm_unit_offset: bool = False
    bias: bool = False
    output_bias: bool | None = None
    output_projection: bool = True
    dtype: ActivationDtype = jnp.float32

    # Options that mixers of a base class inherit and cannot change.
    fixed: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(
                f"heads={self.heads} does not divide width={self.width}; "
                "choose heads that do, or set head_dim to give heads a size of their own"
            )
        _ = self.groups
        if not self.output_projection and self.heads * self.size != self.width:
            raise ValueError(
                f"output_projection=False with {self.heads} heads of {self.size}; expected the width {self.width} together"
            )
        if self.sink_tokens and self.window is None:
            raise ValueError(
                f"sink_tokens={self.sink_tokens} with window={self.window}; expected 0 without window"
            )
        object.__setattr__(self, "position", read_position(self.position))
        if self.sink_distance != "true" and not (
            self.sink_tokens and self.causal and isinstance(self.position, Rotary)
        ):
            raise ValueError(
                f"sink_distance={self.sink_distance!r} needs sink_tokens, causal=True and position='rope'"
            )
        if isinstance(self.position, Rotary | Clex):
            try:
                self.position.size(self.size)
            except ValueError as error:
                raise ValueError(f"head_dim={self.size}: {error}; or use position='none'") from None

    @property
    def size(self) -> int:
        """Features per head."""
        return self.head_dim or self.width // self.heads
