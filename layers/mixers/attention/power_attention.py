"""PowerAttention: blocks at distances that are powers of two (Chen et al. 2025, arXiv:2503.03588)."""

import numpy as np

from layers.mixers.attention.static_blocks import StaticBlocks


class PowerAttention(StaticBlocks):
    """PowerAttention: a receptive field that doubles with every layer (Chen et al. 2025, arXiv:2503.03588).

        y_i = W_o softmax_j(q_i . k_j / sqrt(head_dim)) v_j,   j <= i and (I - J < local_blocks or I - J = 2^n or J < sink_blocks)

    with I and J the blocks of i and j and n = 0, 1, 2, ... d layers reach the last 2^d blocks, all of them; with `block=1` distances
    are those of tokens. Only the abstract and summaries of the paper were at hand: that distances are between blocks is our reading.
    Products grow with t block log(t / block); packed rows, and rows in a cache, which holds all keys, are a mask over all of them.
    """

    def far(self, rows: np.ndarray, count: int) -> np.ndarray:
        return rows - 2 ** np.arange((count - 1).bit_length())
