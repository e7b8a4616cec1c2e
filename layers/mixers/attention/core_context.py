"""CCA: far groups of tokens as one core token each, near tokens as they are (Chen et al. 2024, arXiv:2412.12465)."""

import jax
import jax.numpy as jnp

from layers.kernels.attention import Logits, Mask, Piece, Tokens, attention_with_lse, compose
from layers.mixers.attention.patterned import Patterned, refuse_options
from layers.options import checked_dataclass
from layers.parts.attention_config import AttentionConfig
from layers.parts.cache import Cache, empty_cache
from layers.parts.grouped_attention import Grouped, grouped_attention
from layers.parts.position_blocks import block_index, some_at_a_time
from layers.segments import Segments
from layers.typing import Array, Float, Int

# Queries whose near keys are held as a mask at once, where rows are packed or cached.
QUERIES = 128


@checked_dataclass
class CoreContextConfig(AttentionConfig):
    """Options of `CoreContext`, and those of `AttentionConfig` but for windows, sinks and biases of positions.

    Attributes:
      group: g, tokens that one core token stands for.
      near: s, least number of last tokens that a query sees as they are, its own included.
    """

    group: int = 16
    near: int = 1024

    fixed = ("window", "causal", "sink_logits")

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_options(self, "core_context")


class CoreContext(Patterned):
    """CCA: core context aware attention (Chen et al. 2024, arXiv:2412.12465).

        w_Gj = softmax_{j in G}(q_last(G) . k_j / sqrt(head_dim)),   k~_G = sum_j w_Gj k_j,   v~_G = sum_j w_Gj v_j
        n_i  = max(0, floor((i + 1 - s) / g))
        y_i  = W_o softmax over k~_G of the first n_i groups and k_j of g n_i <= j <= i, of v~_G and v_j

    per query head, with groups G of g tokens from the start of a segment, last(G) the last token of one, and rotated q and k, as in the
    authors' code. Every token up to i counts once, the s to s + g - 1 last ones by themselves. Products grow with t (t / g + s + g);
    packed rows, and rows in a cache, are masks over all keys. The cache holds queries, keys and values of all tokens.
    """

    def initial(self, batch_size: int, max_length: int | None) -> Cache:
        config = self.config
        shapes = tuple((count, config.size) for count in (config.groups, config.groups, config.heads))
        return empty_cache(type(self).__name__, batch_size, shapes, config.dtype, max_length=max_length)

    def project(
        self, x: Float[Array, "b t d"], positions: Int[Array, "#b t"], segments: Segments | None
    ) -> tuple[Float[Array, "b t _ k"], ...]:
        """Returns queries, and what the cache holds: keys, values, and queries, of which those of last tokens ask for cores."""
        q, k, v = super().project(x, positions, segments)
        return q, k, v, q

    def attend(self, q, entries, here, there, given):
        k, v, _ = entries
        if given is None:
            return self._in_rows(q, k, v).output.astype(v.dtype)
        config, (numbers, positions) = self.config, there
        options = {"causal": True, "scale": config.scale}
        places = positions // config.group
        index = block_index(numbers, places)
        cores, of_cores, last = self._cores(*entries, index, numbers.shape[1])
        ends, whole = (jnp.take_along_axis(x, jnp.maximum(last, 0), axis=1) for x in (positions, numbers))
        whole = jnp.where((last >= 0) & (ends % config.group == config.group - 1), whole, 0)

        def attend(q, q_numbers, q_positions):
            first = (q_positions + 1 - config.near) // config.group
            bias = jnp.where(places[:, None] >= first[..., None], 0.0, -jnp.inf)[:, None]
            tokens = Tokens(numbers, q_positions, positions)
            logits = Logits(bias=bias, logit_cap=config.logit_cap)
            near = attention_with_lse(q, k, v, logits=logits, segment_ids=q_numbers, tokens=tokens, **options)
            tokens, logits = Tokens(whole, q_positions, ends + config.near), self.logits()
            far = attention_with_lse(
                *(q, cores, of_cores), logits=logits, segment_ids=q_numbers, tokens=tokens, **options
            )
            return compose(near, far).output.astype(v.dtype)

        return some_at_a_time(attend, QUERIES, q, *here)

    def _in_rows(self, q, k, v) -> Piece:
        """Attention in whole rows: to the last s tokens, to those before that no core stands for, and to cores."""
        (b, t), s, g = q.shape[:2], self.config.near, self.config.group
        options = {"scale": self.config.scale, "logits": self.logits()}
        last = attention_with_lse(q, k, v, causal=True, mask=Mask(window=s), **options)
        if t <= s:
            return last
        # The query at i reads what token i - s sees of its own group, of which a core stands for the whole at its end.
        index = jnp.broadcast_to(jnp.arange(t - s, dtype=jnp.int32)[None], (b, t - s))
        keys = Grouped(jnp.ones_like(index), index, index // g)
        queries = keys._replace(numbers=jnp.where(index % g == g - 1, 0, 1))
        early = q[:, s:], k[:, : t - s], v[:, : t - s]
        rest = grouped_attention(*early, queries, keys, None, reach=g, **options)
        if (count := (t - s) // g) > 0:
            cores, of_cores, ends = self._cores(k, v, q, jnp.arange(t, dtype=jnp.int32)[None] // g, count)
            tokens = Tokens(q_positions=index, kv_positions=ends)
            far = attention_with_lse(q[:, s:], cores, of_cores, causal=True, tokens=tokens, **options)
            rest = compose(rest, far)
        return compose(last, _after(s, rest))

    def _cores(self, k, v, q, index, count):
        """Keys and values (b, count, h, k) of the core tokens of blocks, given the block of each token, and the last tokens.

        Tokens of no block have an index of `count` or more; -1 is the last token where there is no block.
        """
        (b, s, h, size), groups = q.shape, k.shape[2]
        index = jnp.broadcast_to(index, (b, s))
        fit = jnp.stack([jnp.isfinite(x).all((2, 3)) for x in (k, v)]).all(0)
        # What is not finite is left out here, through whose derivatives it would reach other tokens of its group.
        k, v = (jnp.where(fit[..., None, None], x, 0).astype(jnp.float32) for x in (k, v))
        k, v = (jnp.repeat(x, h // groups, axis=2) for x in (k, v))

        def joined(join, x):
            return jax.vmap(lambda x, index: join(x, index, count))(x, index)

        def spread(x):
            return jax.vmap(lambda x, index: x[jnp.minimum(index, count - 1)])(x, index)

        last = joined(jax.ops.segment_max, jnp.broadcast_to(jnp.arange(s, dtype=jnp.int32)[None], (b, s)))
        last = jnp.maximum(last, -1)
        asking = jnp.take_along_axis(q, jnp.maximum(last, 0)[..., None, None], axis=1)
        asks = jnp.isfinite(asking).all((2, 3))
        asking = jnp.where(asks[..., None, None], asking, 0).astype(jnp.float32)
        scale = size**-0.5 if self.config.scale is None else self.config.scale
        a = scale * jnp.sum(spread(asking) * k, axis=-1)
        top = jax.lax.stop_gradient(spread(joined(jax.ops.segment_max, a)))
        weights = jnp.exp(jnp.where(index[..., None] < count, a - top, 0))
        total = joined(jax.ops.segment_sum, weights)
        weights /= spread(jnp.where(total > 0, total, 1))
        spoiled = ~asks | (joined(jax.ops.segment_max, (~fit).astype(jnp.int32)) > 0)
        cores = tuple(joined(jax.ops.segment_sum, weights[..., None] * x) for x in (k, v))
        return *(jnp.where(spoiled[..., None, None], jnp.nan, x).astype(q.dtype) for x in cores), last


def _after(count: int, piece: Piece) -> Piece:
    """The piece behind `count` queries that see none of its keys."""
    fills = (0.0, -jnp.inf, 0.0)
    return Piece(
        *(
            jnp.pad(x, [(0, 0), (count, 0)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
            for x, fill in zip(piece, fills, strict=True)
        )
    )
