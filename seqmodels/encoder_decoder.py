"""An encoder-decoder: an encoder of whole sources, and a decoder of targets whose layers read them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.segments import SegmentIds, Segments
from layers.typing import Array, Float, Int, Key, Num
from seqmodels.backbone import final_norm, normalized
from seqmodels.block import Encoded
from seqmodels.config import EncoderDecoderConfig, LanguageModelConfig
from seqmodels.language_model import LanguageModel, LanguageModelState
from seqmodels.stack import Stack


class EncoderDecoder(nnx.Module):
    """Logits of the next token of a target at each of its positions, given a source (Vaswani et al. 2017, arXiv:1706.03762).

        e = norm(encoder(embed(source)))
        logits = decoder(embed(target); e),   per layer of the decoder
            x = x + mixer(norm(x));   x = x + cross(norm(x), e);   x = x + channel(norm(x))

    Both embed tokens by one table. The mixers of the decoder are causal, the keys of the cross-attention are all tokens of the source: in
    the words of CAB (arXiv:2210.07661) the encoder is noncausal self, the decoder causal self and causal cross.

    With `reading="prefix"` there is no cross-attention: the decoder reads e as what stands before the target, and a recurrent one keeps of
    it what its state holds. Then a row of a source is one segment, and so is that of its target, with the same id.

    With `deletion` tokens leave the encoder (MrT5; see `seqmodels.deletion`): in training their gates weaken them in its later layers and in
    the cross-attention, in inference they are gone from both.

    Attributes:
      decoder: a `LanguageModel`, with a cross-attention unless sources are prefixes. It is called by itself where a state is carried:
        `decoder(target, model.init_state(source))`.
    """

    def __init__(self, config: EncoderDecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(LanguageModelConfig)}
        if config.reading == "prefix" and config.cross:
            raise ValueError(
                f"cross={dict(config.cross)} with reading='prefix', which has no cross-attention; leave it out"
            )
        cross = config.cross if config.reading == "attention" else None
        self.decoder = LanguageModel(LanguageModelConfig(**fields), cross=cross, rngs=rngs)
        self.encoder = Stack(config.encoder, deletion=config.deletion, rngs=rngs)
        self.encoder_norm = final_norm(config.encoder, rngs) if config.final_norm else None

    def encode(
        self,
        source: Int[Array, "b s"],
        *,
        segment_ids: SegmentIds = None,
        key: Key[Array, ""] | None = None,
    ) -> Encoded:
        """Returns what the decoder reads of token ids (b, s); 0 in `segment_ids` marks padding. A key means training."""
        segments = Segments.of(segment_ids)
        x, _ = self.decoder.embedding(source, segment_ids=segments)
        x, segments = self.encoder.encode(x, segment_ids=segments, key=key)
        return Encoded(normalized(self.encoder_norm, x, segments, key), segments)

    def init_state(
        self,
        source: Int[Array, "b s"],
        *,
        max_length: int | None = None,
        segment_ids: SegmentIds = None,
    ) -> LanguageModelState:
        """Returns the state of the decoder before the first token of a target.

        The encoder and what each layer reads are computed here, once.

        Args:
          source: token ids (b, s).
          max_length: the most tokens of a target, for caches of the decoder.
          segment_ids: 0 marks padding of the source.
        """
        encoded = self.encode(source, segment_ids=segment_ids)
        if self.config.reading == "prefix":
            return self._after(encoded, max_length, None)
        state = self.decoder.init_state(source.shape[0], max_length=max_length)
        return state._replace(sources=self.decoder.stack.sources(encoded))

    def _after(
        self, encoded: Encoded, max_length: int | None, key: Key[Array, ""] | None
    ) -> LanguageModelState:
        """Returns the state of the decoder after a source as a prefix, with room for `max_length` tokens of a target."""
        rows, length = encoded.x.shape[:2]
        state = self.decoder.init_state(rows, max_length=None if max_length is None else length + max_length)
        _, layers = self.decoder.stack(encoded.x, state.layers, segment_ids=encoded.segments, key=key)
        return state._replace(layers=layers)

    def __call__(
        self,
        source: Int[Array, "b s"],
        target: Int[Array, "b t"],
        *,
        source_segment_ids: Int[Array, "b s"] | Segments | None = None,
        segment_ids: SegmentIds = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "b t v"], None]:
        """Returns the logits of the token of a target that follows each of its tokens.

        Args:
          source, target: token ids, of any two lengths.
          source_segment_ids: segments of the source; 0 marks padding. The n-th segment of a target reads the n-th of its source.
          segment_ids: segments of the target.
          key: random key of the dropout; passed in training only.

        Returns:
          float32 logits (b, t, v), and None.

        Raises:
          ValueError: source and target have different numbers of rows.
        """
        if source.shape[0] != target.shape[0]:
            raise ValueError(
                f"source has {source.shape[0]} rows, and target has {target.shape[0]}; expected one source per target"
            )
        keys = (None, None) if key is None else jax.random.split(key)
        encoded = self.encode(source, segment_ids=source_segment_ids, key=keys[0])
        if self.config.reading == "prefix":
            keys = (None, None) if key is None else jax.random.split(keys[1])
            state = self._after(encoded, target.shape[1], keys[0])
            outputs, _ = self.decoder.unprojected(target, state, segment_ids=segment_ids, key=keys[1])
            return outputs.logits, None
        outputs, _ = self.decoder.unprojected(target, segment_ids=segment_ids, key=keys[1], source=encoded)
        return outputs.logits, None


def of_pairs(
    model: Any,
    inputs: Num[Array, "b 2 t *c"],
    *,
    segment_ids: Int[Array, "b 2 t"] | None,
    **options: Any,
) -> Float[Array, "b t v"]:
    """Returns the logits of an `EncoderDecoder` or a `PointerNetwork` on pairs of a source and a target.

    Where sources are vectors, targets are the first of their numbers. `options` are those of `Segments.of` and `key`.
    """
    key = options.pop("key", None)
    ids = (None, None) if segment_ids is None else jnp.moveaxis(segment_ids, 1, 0)
    source_segments, segments = (Segments.of(one, **options) for one in ids)
    source, target = inputs[:, 0], inputs[:, 1]
    target = target if inputs.ndim == 3 else target[..., 0].astype(jnp.int32)
    return model(source, target, source_segment_ids=source_segments, segment_ids=segments, key=key)[0]
