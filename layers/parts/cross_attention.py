"""Softmax attention of a target's queries to the keys of a source."""

import dataclasses

from layers.kernels.attention import Tokens, attention
from layers.mixer import EVERY, Mixer, Source
from layers.positions.position import NoPosition
from layers.segments import Segments
from layers.typing import Array, Float, Int


class CrossAttention(Mixer):
    """Base class of softmax attention that also reads a source y, as between decoder and encoder (Vaswani et al. 2017, arXiv:1706.03762).

        q = W_q x;   k, v = W_k y, W_v y;   o = softmax(q k^T / sqrt(head_dim)) v

    A mixer has `heads(x)`, which returns queries, keys and values, `logits()` and `finish(o, x)`, its output.
    """

    patterns = EVERY

    def entries_of(
        self, y: Float[Array, "b s d"], segments: Segments | None
    ) -> tuple[Float[Array, "b s g k"], Float[Array, "b s g k"]]:
        """Returns the keys and values of a source."""
        config = self.config
        if not isinstance(config.position, NoPosition) or config.window is not None:
            raise ValueError(
                f"position={config.position!r} and window={config.window} of {type(self).__name__} that reads a source; expected "
                "position='none' and window=None, as source and target have positions of their own"
            )
        return self.heads(y)[1:]

    def read(
        self, x: Float[Array, "b t d"], source: Source, numbers: Int[Array, "b t"]
    ) -> Float[Array, "b t d"]:
        """Returns what the queries of x read of all keys of their source."""
        q, *_ = self.heads(x)
        tokens = Tokens(kv_segment_ids=source.numbers)
        logits = self.logits()
        if source.gates is not None:
            logits = dataclasses.replace(logits, bias=source.gates[:, None, None])
        options = {"logits": logits, "scale": self.config.scale}
        o = attention(q, *source.entries, segment_ids=numbers, tokens=tokens, **options)
        return self.finish(o, x)
