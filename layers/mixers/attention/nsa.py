"""NSA: compressed, chosen and recent tokens, each by an attention of its own (Yuan et al. 2025, arXiv:2502.11089)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from layers.kernels.attention import Logits, Mask, Tokens, attention
from layers.mixer import Visit
from layers.mixers.attention.moba import QUERIES
from layers.mixers.attention.patterned import Patterned, refuse_options
from layers.options import checked_dataclass
from layers.parameters import linear
from layers.parts.attention_config import AttentionConfig
from layers.parts.position_blocks import block_means, row_block_means, some_at_a_time
from layers.typing import Array, Float, Int

# Blocks that every query sees: the first of its segment, its own and the one before.
ALWAYS = 3


@checked_dataclass
class NSAConfig(AttentionConfig):
    """Options of `NSA`, and those of `AttentionConfig` but for sinks, caps and biases of positions.

    Attributes:
      block: tokens in a block, of compression and of choice.
      top_k: blocks whose tokens a query sees, the first, its own and the one before included.
      window: tokens of the sliding window, the query's own included.
    """

    block: int = 64
    top_k: int = 16
    window: int = 512

    fixed = ("causal", "sink_logits", "sink_tokens", "logit_cap")

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_options(self, "nsa")
        if self.top_k < ALWAYS:
            raise ValueError(
                f"top_k={self.top_k}; a query sees the first block, its own and the one before, expected at least {ALWAYS}"
            )


class Blocks(NamedTuple):
    """Blocks of keys: means of keys and values (b, n, g, k), and their segments and places in them (b, n), -1 for none."""

    keys: Float[Array, "b n g k"]
    values: Float[Array, "b n g k"]
    numbers: Int[Array, "#b n"]
    places: Int[Array, "#b n"]


class NSA(Patterned):
    """NSA: native sparse attention to compressed, chosen and recent tokens (Yuan et al. 2025, arXiv:2502.11089).

        k~_b, v~_b = means of k and v over block b,   seen where the block ends at i or before
        s_ib = sum_{heads of a group} softmax_b(q_i . k~_b / sqrt(head_dim))
        y_i  = W_o (g_1 A(q_i, k~, v~) + g_2 A(q_i, k, v; chosen blocks) + g_3 A(q_i, k, v; window)),   g = sigmoid(W_g x_i)

    with softmax attention A, gates per head, and rotated q and k, which all three share. The blocks that the heads of a group
    see are the first, their own, the one before, and those of the largest s_ib, up to `top_k`; the choice has no gradient.
    Means stand in place of the paper's learned map of a block to a key, and blocks of compression do not overlap, as in
    flash-linear-attention. Products grow with t (top_k block + window) and t^2 / block; with packed rows and with a cache,
    which holds all keys, the choice is a mask over all of them.
    """

    def __init__(self, config: NSAConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        options = {"axes": ("embed", "heads"), "bias": False, "dtype": config.dtype, "rngs": rngs}
        self.gate = linear(config.width, 3 * config.heads, **options)

    @property
    def kept(self) -> dict[str, int | None]:
        return {}

    def attend(self, q, entries, here, there, given):
        """Returns what the queries read of compressed, of chosen and of recent tokens."""
        config, options, (k, v) = self.config, {"causal": True, "scale": self.config.scale}, entries
        own = {"segment_ids": given}
        if isinstance(given, Visit):
            own = {"segment_ids": here[0], "tokens": Tokens(there[0], here[1], there[1])}
        if given is None:
            means = tuple(row_block_means(y, config.block) for y in (k, v))
            places = jnp.arange(means[0].shape[1], dtype=jnp.int32)[None]
            blocks = Blocks(*means, jnp.ones_like(places), places)
            chosen = some_at_a_time(lambda *query: self._choose(blocks, *query), QUERIES, q, *here)
            lists = jnp.repeat(jnp.moveaxis(chosen, 2, 1), config.heads // config.groups, axis=1)
            mask = Mask(block_indices=lists, block_size=config.block, query_block_size=1)
            picked = attention(q, k, v, mask=mask, **options)
        else:
            index, means, places = block_means(there[0], there[1] // config.block, k, v)
            blocks = Blocks(*means, *places)
            picked = self._masked(q, k, v, here, there, index, blocks)
        rows = (q.shape[0], blocks.places.shape[1])
        ends = Tokens(
            jnp.broadcast_to(jnp.maximum(blocks.numbers, 0), rows),
            here[1],
            jnp.broadcast_to((blocks.places + 1) * config.block - 1, rows),
        )
        keys, values = (y.astype(q.dtype) for y in (blocks.keys, blocks.values))
        coarse = attention(q, keys, values, segment_ids=here[0], tokens=ends, **options)
        recent = attention(q, k, v, mask=Mask(window=config.window), **own, **options)
        return coarse, picked, recent

    def finish(
        self, o: tuple[Float[Array, "b t h k"], ...], x: Float[Array, "b t d"]
    ) -> Float[Array, "b t d"]:
        coarse, picked, recent = o
        gates = jax.nn.sigmoid(self.gate(x)).reshape(*x.shape[:2], self.config.heads, 3, 1)
        o = gates[..., 0, :] * coarse + gates[..., 1, :] * picked + gates[..., 2, :] * recent
        return super().finish(o, x)

    def _masked(self, q, k, v, here, there, index, blocks):
        """Attention to the chosen blocks where these are told by segment and position, some queries at a time."""

        def attend(q, numbers, positions):
            chosen = self._choose(blocks, q, numbers, positions)
            seen = (chosen[..., None] == index[:, None, None, None]).any(3)
            seen = jnp.repeat(jnp.moveaxis(seen, 2, 1), q.shape[2] // k.shape[2], axis=1)
            return attention(
                *(q, k, v),
                causal=True,
                scale=self.config.scale,
                logits=Logits(bias=jnp.where(seen, 0.0, -jnp.inf)),
                segment_ids=numbers,
                tokens=Tokens(there[0], positions, there[1]),
            )

        return some_at_a_time(attend, QUERIES, q, *here)

    def _choose(self, blocks, q, numbers, positions):
        """The blocks that the heads of a group see, (b, t, g, top_k), and -1 where there are too few."""
        config = self.config
        b, t, h, size = q.shape
        own = (positions // config.block)[..., None]
        exists = (blocks.numbers[:, None] == numbers[..., None]) & (blocks.places[:, None] <= own)
        whole = exists & ((blocks.places[:, None] + 1) * config.block <= positions[..., None] + 1)
        always = exists & ((blocks.places[:, None] == 0) | (blocks.places[:, None] >= own - 1))
        grouped = q.reshape(b, t, config.groups, h // config.groups, size).astype(jnp.float32)
        scale = size**-0.5 if config.scale is None else config.scale
        logits = scale * jnp.einsum(
            "btgrk,bngk->btgrn", grouped, blocks.keys, precision=jax.lax.Precision.HIGHEST
        )
        weights = jax.nn.softmax(jnp.where(whole[:, :, None, None], logits, -jnp.inf), axis=-1)
        scores = jax.lax.stop_gradient(jnp.where(whole[:, :, None, None], weights, 0).sum(3))
        scores = jnp.where(exists[:, :, None], scores, -jnp.inf)
        scores = jnp.where(always[:, :, None], jnp.inf, scores)
        ranked, best = jax.lax.top_k(scores, min(config.top_k, scores.shape[-1]))
        return jnp.where(ranked > -jnp.inf, best, -1)
