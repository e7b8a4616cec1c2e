"""B2S6: Mamba whose blocks of channels select by themselves, with a bias per channel (Yu and Erichson 2025, arXiv:2505.09022)."""

import jax.numpy as jnp
from flax import nnx

from layers.mixers.state_space.mamba import Mamba, MambaConfig
from layers.options import checked_dataclass
from layers.parameters import NO_DECAY, parameter
from layers.typing import Array, Float


@checked_dataclass
class B2S6Config(MambaConfig):
    """Options of `B2S6`, and those of `MambaConfig` but for dt_rank and inner_norm.

    Attributes:
      blocks: number of blocks of channels; divides expand * width.
    """

    blocks: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels % self.blocks:
            raise ValueError(f"blocks={self.blocks} does not divide expand * width = {self.channels}")
        for name in ("dt_rank", "inner_norm"):
            if getattr(self, name):
                raise ValueError(
                    f"{name}={getattr(self, name)}; b2s6 selects by block and has no such option, leave it out"
                )


class B2S6(Mamba):
    """B2S6: Mamba whose blocks of channels select by themselves, with a bias per channel (Yu and Erichson 2025, arXiv:2505.09022).

        [r^j, B_t^j, C_t^j] = W_x^j u^j                                       (1, n, n) for the block j of channels
        dt_t,i = softplus(r^j + b_i),   i in block j
        h_t,i  = exp(dt_t,i A_i) h_{t-1,i} + dt_t,i u_t,i (B_t^j + c_i)       (n)
        y_t,i  = h_t,i . C_t^j + D_i u_t,i

    and the rest as in `Mamba`, with e = expand d channels: each block reads its own channels alone to select, and c_i (n) does
    not depend on the input. Neither the authors' code nor the paper's full text was at hand. Our reading is that a block has one
    number for its step sizes, that c starts at one, as B in S4D, and that eigenvalues are Mamba's, real. As B_t + c is a
    vector per channel and token, memory grows with t e n.
    """

    def _make_selection(self, rngs: nnx.Rngs) -> None:
        config, size = self.config, self.config.state_size
        init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform", batch_axis=0)
        shape = (config.blocks, config.channels // config.blocks, 1 + 2 * size)
        self.selection = parameter(rngs, init, shape, axes=(None, "inner", None))
        ones = nnx.initializers.ones_init()
        self.b_bias = parameter(rngs, ones, (config.channels, size), axes=("inner", "state"), **NO_DECAY)

    def _select(
        self, u: Float[Array, "b t d"]
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b t d n"], Float[Array, "b t d n"]]:
        blocks, size = self.config.blocks, self.config.state_size
        by_block = u.reshape(*u.shape[:2], blocks, u.shape[2] // blocks)
        selected = jnp.einsum("btjp,jps->btjs", by_block, self.selection[...].astype(u.dtype))
        selected = jnp.repeat(selected, by_block.shape[3], axis=2)
        r, b, c = jnp.split(selected, [1, 1 + size], axis=3)
        return r[..., 0], b + self.b_bias[...].astype(b.dtype)[None, None], c
