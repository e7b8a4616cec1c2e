"""Strided blocks: local blocks and every n-th block before (LongGen's sparse layers, Ge et al. 2024, arXiv:2410.01485)."""

import numpy as np

from layers.mixers.attention.static_blocks import StaticBlocks, StaticBlocksConfig
from layers.options import checked_dataclass


@checked_dataclass
class StridedAttentionConfig(StaticBlocksConfig):
    """Options of `StridedAttention`, and those of `StaticBlocksConfig`.

    Attributes:
      stride: distance in blocks between those that all later queries see, the first one being block 0.
    """

    stride: int = 8


class StridedAttention(StaticBlocks):
    """Strided blocks of tokens, as in the sparse layers of LongGen (Ge et al. 2024, arXiv:2410.01485).

        y_i = W_o softmax_j(q_i . k_j / sqrt(head_dim)) v_j,   j <= i and I - J < local_blocks or J mod stride = 0 or J < sink_blocks

    with I and J the blocks of i and j. Places of the strided blocks are absolute, so that later queries read the same ones. Only the
    abstract was at hand: places and sizes are our reading. Products grow with t^2 / stride; packed rows and rows in a cache, which
    holds all keys, are a mask over all of them.
    """

    def far(self, rows: np.ndarray, count: int) -> np.ndarray:
        return np.arange(0, count, self.config.stride)[None]
