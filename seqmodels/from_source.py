"""Generation from encoder-decoders: sources are read once, then a compiled loop of steps.

new = seqmodels.generate_from(model, [[3, 1, 4], [1, 5]], start=9, max_new_tokens=20, temperature=0.0, stop=[[10]])
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layers.indices import check_indices
from layers.segments import Segments
from seqmodels.decoding import NOTHING, Generation, Rows, decode, flat
from seqmodels.encoder_decoder import EncoderDecoder
from seqmodels.generation import Prompts, aligned, check_finite, sequences
from seqmodels.sampling import Number, make_sampling


def generate_from(
    model: EncoderDecoder,
    sources: Prompts,
    *,
    start: int,
    max_new_tokens: int,
    temperature: Number = 1.0,
    top_k: int | None = None,
    top_p: Number | None = None,
    min_p: Number | None = None,
    repetition_penalty: Number = 1.0,
    stop: Sequence[Any] = (),
    seed: int = 0,
) -> Generation:
    """Returns the tokens of the target that the model writes for each source.

    Args:
      model: an encoder-decoder.
      sources: an array (b, s) or sequences of token ids, whose lengths may differ.
      start: first token of every target, which is not among the new ones.
      max_new_tokens: the most new tokens per row.
      temperature, top_k, top_p, min_p, stop, seed: as in `seqmodels.generate`.
      repetition_penalty: as in `seqmodels.generate`; tokens of the target count.

    Raises:
      ValueError, TypeError: an argument is invalid, or targets are longer than the model's table of positions.
      FloatingPointError: the logits of a row are not finite.
    """
    if not isinstance(model, EncoderDecoder):
        raise TypeError(f"model is a {type(model).__name__}; expected an EncoderDecoder")
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens!r}; expected an integer of at least 1")
    vocab_size, longest = model.config.input.vocab_size, model.config.input.longest
    check_indices("start", np.asarray(start), vocab_size, of="vocab_size")
    given = sequences("sources", sources, vocab_size)
    if not given:
        raise ValueError("sources holds no source; expected at least one")
    needed = max(max_new_tokens, *map(len, given))
    if longest is not None and needed > longest:
        raise ValueError(
            f"{needed} tokens of a source or target, but the table of positions has {longest}; expected at most as many"
        )
    sampling = make_sampling(
        vocab_size=vocab_size,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    stops = sequences("stop", stop, vocab_size)
    stops = aligned(stops) if stops else None
    count, size = len(given), max(map(len, given))
    inputs, ids = np.zeros((2, count, size), np.int32)
    for row, source in enumerate(given):
        inputs[row, : len(source)], ids[row, : len(source)] = source, 1
    token = jnp.full(count, start, jnp.int32)
    recent = None if stops is None else jnp.full((count, stops.shape[1]), NOTHING, jnp.int32)
    seen = None
    if sampling.repetition_penalty is not None:
        seen = jnp.zeros((count, vocab_size), bool).at[:, start].set(True)
    state = _begun(model, jnp.asarray(inputs), jnp.asarray(ids), max_length=max_new_tokens)
    rows = Rows(state, token, jnp.zeros(count, bool), recent, seen)
    key = jax.random.key(np.uint32(seed))
    _, new = decode(flat(model.decoder), rows, sampling, stops, key, 0, max_new_tokens, size=max_new_tokens)
    new = jax.tree.map(np.asarray, new)
    check_finite(new.log_probabilities, 0)
    done = int(new.lengths.max())
    return Generation(new.tokens[:, :done], new.lengths, new.log_probabilities[:, :done], int(new.calls))


@partial(jax.jit, static_argnames="max_length")
def _begun(model, inputs, ids, *, max_length):
    """Returns the state before targets of sources that are padded at their ends."""
    segments = Segments.of(ids, padding="end", packed=False)
    return model.init_state(inputs, max_length=max_length, segment_ids=segments)
