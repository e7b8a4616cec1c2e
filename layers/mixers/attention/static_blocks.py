"""What attention shares whose queries see blocks of keys at fixed distances or places."""

import jax.numpy as jnp
import numpy as np

from layers.kernels.attention import Mask
from layers.mixers.attention.attention import Attention
from layers.options import Count, checked_dataclass
from layers.parts.attention_config import AttentionConfig


@checked_dataclass
class StaticBlocksConfig(AttentionConfig):
    """Options of attention with a fixed pattern of blocks, and those of `AttentionConfig` but for windows and sinks in tokens.

    Attributes:
      block: tokens of a block, counted from the start of a segment.
      local_blocks: number of last blocks that a query sees up to itself, its own included.
      sink_blocks: number of first blocks that it sees besides.
    """

    block: int = 64
    local_blocks: int = 1
    sink_blocks: Count = 0

    fixed = ("causal",)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, instead in (("window", "local_blocks"), ("sink_tokens", "sink_blocks")):
            if getattr(self, name):
                raise ValueError(
                    f"{name}={getattr(self, name)}; expected {instead} where patterns are of blocks"
                )
        if not self.causal:
            raise ValueError("causal=False; a pattern of blocks looks back, expected True")


class StaticBlocks(Attention):
    """Base class of causal attention to blocks that are the same for all data.

    A mixer has `far(rows, count)`, which blocks of `count` the blocks of queries `rows` (count, 1) see besides local and first ones:
    numbers (count, any); those below 0 or beyond the query's own block are left out.
    """

    patterns = ("causal_self",)

    def mask(self, length: int) -> Mask:
        config = self.config
        count = max(1, -(-length // config.block))
        rows = np.arange(count)[:, None]
        near, first = rows - np.arange(config.local_blocks), np.arange(min(config.sink_blocks, count))[None]
        lists = (near, first, self.far(rows, count))
        lists = np.concatenate([np.broadcast_to(each, (count, each.shape[1])) for each in lists], axis=1)
        lists = np.where(lists > rows, -1, np.maximum(lists, -1))
        return Mask(block_indices=jnp.asarray(lists, jnp.int32)[None, None], block_size=config.block)
