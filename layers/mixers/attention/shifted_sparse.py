"""Shifted sparse attention: causal groups, half of the heads shifted by half a group (Chen et al. 2023, arXiv:2309.12307)."""

import jax.numpy as jnp

from layers.kernels.attention import Tokens, attention_with_lse, compose
from layers.mixers.attention.patterned import Patterned, refuse_options
from layers.options import Count, checked_dataclass
from layers.parts.attention_config import AttentionConfig
from layers.parts.grouped_attention import Grouped, grouped_attention


@checked_dataclass
class ShiftedSparseConfig(AttentionConfig):
    """Options of `ShiftedSparse`, and those of `AttentionConfig` but for windows, sinks and biases of positions.

    Attributes:
      group: G, tokens of a group, even. The papers take a quarter of the length.
      shifted_heads: number of heads, the last ones, whose groups begin at G/2; half of them if None. SinkLoRA (Zhang 2024,
        arXiv:2406.05678) returns some of the shifted heads to the others.
      group_sinks: number of first tokens that stay visible outside their group, at most G/2; SinkLoRA's sinks.
    """

    group: int = 2048
    shifted_heads: Count | None = None
    group_sinks: Count = 0

    fixed = ("window", "causal", "sink_logits")

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_options(self, "shifted_sparse")
        if self.group % 2:
            raise ValueError(f"group={self.group}; expected an even number")
        if self.group_sinks > self.group // 2:
            raise ValueError(f"group_sinks={self.group_sinks}; expected at most half of group={self.group}")
        each = self.heads // self.groups
        if self.shifted > self.heads or self.shifted % each:
            raise ValueError(
                f"shifted_heads={self.shifted}; expected at most heads={self.heads} and a multiple of {each}, the heads "
                "that share keys"
            )

    @property
    def shifted(self) -> int:
        """Number of shifted heads."""
        return self.heads // 2 if self.shifted_heads is None else self.shifted_heads


class ShiftedSparse(Patterned):
    """S2-Attn: attention within groups of G tokens (Chen et al. 2023, arXiv:2309.12307).

        y_i = W_o softmax_j(q_i . k_j / sqrt(head_dim)) v_j,   j <= i with floor((j + s) / G) = floor((i + s) / G), or j < sinks

    with s = 0, or G/2 in shifted heads, whose first group has G/2 tokens. The released code also has a form that rolls the
    sequence by G/2 instead: there the first tokens share a group with the last ones and see the future. Linear in t. The
    cache holds G tokens and the sinks.
    """

    @property
    def kept(self) -> dict[str, int | None]:
        return {"window": self.config.group, "sinks": self.config.group_sinks}

    def attend(self, q, entries, here, there, given):
        config, (k, v) = self.config, entries
        plain, each = config.heads - config.shifted, config.heads // config.groups
        parts = []
        for own, shift in ((slice(plain), 0), (slice(plain, None), config.group // 2)):
            mine = slice(plain // each) if shift == 0 else slice(plain // each, None)
            if q[:, :, own].shape[2]:
                parts.append(
                    self._in_groups(q[:, :, own], k[:, :, mine], v[:, :, mine], here, there, shift, given)
                )
        return jnp.concatenate(parts, axis=2)

    def _in_groups(self, q, k, v, here, there, shift, given):
        config = self.config
        q_at, k_at = (Grouped(*side, (side[1] + shift) // config.group) for side in (here, there))
        options = {"scale": config.scale, "logits": self.logits()}
        piece = grouped_attention(q, k, v, q_at, k_at, given, reach=config.group, **options)
        if config.group_sinks:
            # Sinks of whole rows come first.
            few = slice(config.group_sinks if given is None else None)
            k_numbers, k_positions = k_at.numbers[:, few], k_at.positions[:, few]
            far = attention_with_lse(
                *(q, k[:, few], v[:, few]),
                causal=True,
                segment_ids=jnp.where(q_at.groups > 0, q_at.numbers, 0),
                tokens=Tokens(
                    kv_segment_ids=jnp.where(k_positions < config.group_sinks, k_numbers, 0),
                    q_positions=q_at.positions,
                    kv_positions=k_positions,
                ),
                **options,
            )
            piece = compose(piece, far)
        return piece.output.astype(v.dtype)
