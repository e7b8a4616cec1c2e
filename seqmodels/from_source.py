"""Generation from encoder-decoders: sources are read once, then a compiled loop of steps.

new = seqmodels.generate_from(model, [[3, 1, 4], [1, 5]], start=9, max_new_tokens=20, temperature=0.0, stop=[[10]])
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layers.segments import Segments
from seqmodels.decoding import Generation, Rows, decode, flat
from seqmodels.encoder_decoder import EncoderDecoder
from seqmodels.request import Prompts, read_request, received, remembering
from seqmodels.sampling import Number


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
    vocab_size, longest = model.config.input.vocab_size, model.config.input.longest
    request = read_request(
        "sources",
        sources,
        vocab_size=vocab_size,
        counts={"max_new_tokens": max_new_tokens},
        stop=stop,
        seed=seed,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    if isinstance(start, bool) or not isinstance(start, int | np.integer) or not 0 <= start < vocab_size:
        raise ValueError(
            f"start={start!r}; expected an integer from 0 to {vocab_size - 1}, as vocab_size={vocab_size}"
        )
    count, size, most = len(request.given), max(map(len, request.given)), int(max_new_tokens)
    # The last new token is not read, and the first one is.
    if longest is not None and max(size, most) > longest:
        raise ValueError(
            f"{max(size, most)} tokens of a source or target, but the table of positions has {longest}; expected at most as many"
        )
    inputs, ids = np.zeros((2, count, size), np.int32)
    for row, source in enumerate(request.given):
        inputs[row, : len(source)], ids[row, : len(source)] = source, 1
    state = _begun(model, jnp.asarray(inputs), jnp.asarray(ids), max_length=most)
    rows = Rows(state, jnp.full(count, start, jnp.int32), jnp.zeros(count, bool), None, None)
    rows = remembering(rows, [[start]] * count, request, vocab_size)
    given = request.sampling, request.stops, request.key, 0, most
    _, new = decode(flat(model.decoder), rows, *given, size=most)
    return received(new, 0)


@partial(jax.jit, static_argnames="max_length")
def _begun(model, inputs, ids, *, max_length):
    """Returns the state before targets of sources that are padded at their ends."""
    segments = Segments.of(ids, padding="end", packed=False)
    return model.init_state(inputs, max_length=max_length, segment_ids=segments)
