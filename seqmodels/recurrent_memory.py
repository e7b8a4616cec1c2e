"""Recurrent memory: vectors that a language model hands from segment to segment (Bulatov et al. 2022, arXiv:2207.06881)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from layers.cross_entropy import Unprojected
from layers.parameters import NO_DECAY, AuxiliaryLoss, parameter
from layers.segments import SegmentIds, Segments
from layers.typing import Array, Bool, Float, Int, Key
from seqmodels.backbone import normalized
from seqmodels.config import RecurrentMemoryConfig
from seqmodels.language_model import LanguageModel


class MemoryState(NamedTuple):
    """The memory after a segment, float32, and how many segments of each row there were."""

    memory: Float[Array, "b m d"]
    count: Int[Array, "b"]


class RecurrentMemory(LanguageModel):
    """A language model that reads a text segment by segment, with a memory (RMT, Bulatov et al. 2022, arXiv:2207.06881).

        [_; h_n; M_n] = norm(stack([M_{n-1}; embed(x_n); M_{n-1}])),   logits_n = W h_n,   M_0 learned

    x_n are the tokens of segment n. The tokens of a segment see the memory in front of them, which sees itself, and the one behind them,
    which is written, sees all. Positions begin anew in every segment. With `unroll=k` the memories that enter segments k, 2k, ...
    (from 0) have no gradient, so that it passes k - 1 borders at most. A segment without a real token leaves the memory as it is.

    A row is one text. A state is carried between whole segments: calls with one take multiples of `segment` tokens, so that
    `generate` does not run.

    Raises:
      ValueError: a mixer of the pattern or the norm is not causal, or layers add losses of their own.
    """

    def __init__(self, config: RecurrentMemoryConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        if jax.tree.leaves(nnx.state(self, AuxiliaryLoss)):
            raise ValueError(
                "channel mixers that add a loss, such as 'moe', would add that of the last segment alone; expected others"
            )
        shape = (config.memory, config.stack.width)
        small = nnx.initializers.normal(config.stack.width**-0.5)
        self.memory = parameter(rngs, small, shape, axes=(None, "embed"), **NO_DECAY)

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> MemoryState:
        """Returns the memory before the first segment; `max_length` is not needed, as it does not grow."""
        memory = jnp.broadcast_to(self.memory[...][None], (batch_size, *self.memory.shape))
        return MemoryState(memory, jnp.zeros(batch_size, jnp.int32))

    def __call__(
        self,
        inputs: Int[Array, "b t"],
        state: Any = None,
        *,
        segment_ids: SegmentIds = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "b t v"], Any]:
        """Returns the logits of the next token at each position, and the next state (None if none was passed); see `unprojected`."""
        outputs, state = self.unprojected(inputs, state, segment_ids=segment_ids, key=key)
        return outputs.logits, state

    def unprojected(
        self,
        inputs: Int[Array, "b t"],
        state: Any = None,
        *,
        segment_ids: SegmentIds = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Unprojected, Any]:
        """Returns what the logits are computed from, and the next state, as `LanguageModel.unprojected` does.

        Raises:
          ValueError: with a state, t is no multiple of `segment`, or `segment_ids` do not say that a row is one text.
        """
        size, (b, t) = self.config.segment, inputs.shape
        segments = Segments.of(segment_ids)
        if segments is not None and segments.packed:
            raise ValueError(
                "segment_ids may pack several texts into a row, of which a memory would mix them; expected one text per row, as "
                "Segments.of(ids, packed=False) says"
            )
        if state is not None and t % size:
            raise ValueError(
                f"{t} tokens with a state; a memory is carried between whole segments, expected a multiple of segment={size}"
            )
        x, _ = self.embedding(_in_segments(inputs, size).reshape(-1, size))
        x = jnp.moveaxis(x.reshape(b, -1, size, x.shape[2]), 1, 0)
        real = None
        if segments is not None or t % size:
            real = jnp.ones((b, t), bool) if segments is None else segments.real
            real = jnp.moveaxis(_in_segments(real, size), 1, 0)
        first = self.init_state(b) if state is None else state
        graph, variables = nnx.split(self)

        def read(carried, given):
            number, x, real = given
            own = None if key is None else jax.random.fold_in(key, number)
            return nnx.merge(graph, variables)._read(carried, x, real, own)

        last, h = jax.lax.scan(read, first, (jnp.arange(len(x)), x, real))
        h = jnp.moveaxis(h, 0, 1).reshape(b, -1, h.shape[3])[:, :t]
        return self.outputs(h), None if state is None else last

    def _read(
        self,
        carried: MemoryState,
        x: Float[Array, "b t d"],
        real: Bool[Array, "b t"] | None,
        key: Key[Array, ""] | None,
    ) -> tuple[MemoryState, Float[Array, "b t d"]]:
        """Returns the state after a segment, and its features."""
        memory, count = carried
        memory = self._cut(memory, count)
        h, written = self._between(memory, x, real, key)
        if real is None:
            return MemoryState(written, count + 1), h
        some = real.any(1)
        return MemoryState(jnp.where(some[:, None, None], written, memory), count + some), h

    def _cut(self, memory: Float[Array, "b m d"], count: Int[Array, "b"]) -> Float[Array, "b m d"]:
        """Returns the memory, without its gradient where a row is at a border that none passes."""
        if self.config.unroll is None:
            return memory
        cut = (count % self.config.unroll == 0) & (count > 0)
        return jnp.where(cut[:, None, None], jax.lax.stop_gradient(memory), memory)

    def _between(
        self,
        ends: Float[Array, "b m d"],
        x: Float[Array, "b t d"],
        real: Bool[Array, "b t"] | None,
        key: Key[Array, ""] | None,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b m d"]]:
        """Returns the features of x between two copies of `ends`, and those of the second copy, float32."""
        count, segments = ends.shape[1], None
        ends = ends.astype(x.dtype)
        if real is not None:
            kept = jnp.ones(ends.shape[:2], bool)
            ids = jnp.concatenate([kept, real, kept], axis=1).astype(jnp.int32)
            segments = Segments.of(ids, packed=False)
        y, _ = self.stack(jnp.concatenate([ends, x, ends], axis=1), segment_ids=segments, key=key)
        y = normalized(self.norm, y, segments, key)
        _, h, written = jnp.split(y, (count, count + x.shape[1]), axis=1)
        return h, written.astype(jnp.float32)


def _in_segments(x: Array, size: int) -> Array:
    """x (b, t) in segments (b, n, size), the last one filled up with zeros."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)))
    return x.reshape(x.shape[0], -1, size)
