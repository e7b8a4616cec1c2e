"""Generation from language models: chunked prefill of prompts, then a compiled loop of steps.

    new = seqmodels.generate(model, [[3, 1, 4], [1, 5]], max_new_tokens=20, temperature=0.8, top_p=0.95)

Prompts of different lengths are padded on the left. Padding has segment id 0, so that it enters no state and takes no slot of a
cache: each row is what its prompt gives alone.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layers.caches import CachePolicy, read_cache
from layers.typing import Array, Float
from seqmodels import caching, drafting, prepacking, speculative
from seqmodels.decoding import Generation, Rows, decode, flat
from seqmodels.language_model import LanguageModel
from seqmodels.request import Prompts, Request, read_request, received, remembering
from seqmodels.sampling import Number

# Caches have a multiple of so many slots, so that prompts of similar lengths share what is compiled.
SLOTS = 128
# Tokens that a draft is looked up by, unless said otherwise.
NGRAM = 3
# Tokens of the draft of a model, unless said otherwise.
DRAFT = 4
# The policy of caches unless another is given.
FULL = read_cache("full")


def generate(
    model: LanguageModel,
    tokens: Prompts,
    *,
    max_new_tokens: int,
    temperature: Number = 1.0,
    top_k: int | None = None,
    top_p: Number | None = None,
    min_p: Number | None = None,
    repetition_penalty: Number = 1.0,
    stop: Sequence[Any] = (),
    seed: int = 0,
    chunk: int = 512,
    block: int = 64,
    lookup: int | None = None,
    ngram: int | None = None,
    draft: LanguageModel | None = None,
    draft_tokens: int | None = None,
    draft_cache: str | CachePolicy | None = None,
    cache: str | CachePolicy | None = None,
) -> Generation:
    """Returns the tokens with which the model continues each prompt.

    Args:
      model: a language model.
      tokens: prompts, as an array (b, t) or as a sequence of sequences of token ids, whose lengths may differ. A prompt has at
        least one token.
      max_new_tokens: the most new tokens per row.
      temperature: divisor of the logits; 0 takes the most probable token.
      top_k: number of most probable tokens that are sampled from; None for all.
      top_p: samples from the smallest set of most probable tokens whose probabilities sum to at least this; None for all.
      min_p: samples from tokens at least this fraction as probable as the most probable one; None for all.
      repetition_penalty: logits of tokens of the prompt and the output are divided by it if positive and multiplied by it
        if negative; 1 changes nothing.
      stop: sequences of token ids; a row ends after the first that its output contains.
      seed: seed of the sampling. The tokens of row r depend on the seed, r and its prompt, not on other rows.
      chunk: the most tokens per row and call in which prompts are read.
      block: number of steps that are compiled as one loop; the host reads tokens after each block.
      lookup: the most tokens of a draft that one call of the model checks (see `seqmodels.speculative`): the outputs are those
        without, from fewer calls where the text repeats itself. None for one token per call. Calls on several tokens round
        differently, which can decide between tokens of nearly equal probability. Rows wait for each other at the end of a block.
      ngram: number of last tokens by which a draft is looked up, 3 by default; needs `lookup`.
      draft: a smaller language model of the same vocabulary, which drafts in place of `lookup` (see `seqmodels.drafting`). Greedy
        tokens are those without. Sampled ones are others of the same distribution, and depend on `block` too. The calls of
        the draft model are not counted.
      draft_tokens: the most tokens of a draft, 4 by default; needs `draft`.
      draft_cache: policy of the caches of the draft model, such as "streaming(budget=512)", with which its memory does not grow; needs
        `draft`.
      cache: policy of the caches of attention, such as "snapkv(budget=1024)" (see `layers.caches`). It acts after the
        first new token, which the whole prompt gives, on layers whose cache grows with the text. Without `lookup` and `draft`.

    Raises:
      ValueError, TypeError: an argument is invalid, or a row is longer than the model's table of positions.
      FloatingPointError: the logits of a row are not finite.
    """
    blocks = list(
        stream(
            model,
            tokens,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            stop=stop,
            seed=seed,
            chunk=chunk,
            block=block,
            lookup=lookup,
            ngram=ngram,
            draft=draft,
            draft_tokens=draft_tokens,
            draft_cache=draft_cache,
            cache=cache,
        )
    )
    return Generation(
        np.concatenate([each.tokens for each in blocks], axis=1),
        np.sum([each.lengths for each in blocks], axis=0, dtype=np.int32),
        np.concatenate([each.log_probabilities for each in blocks], axis=1),
        sum(each.calls for each in blocks),
    )


def stream(
    model: LanguageModel,
    tokens: Prompts,
    *,
    max_new_tokens: int,
    temperature: Number = 1.0,
    top_k: int | None = None,
    top_p: Number | None = None,
    min_p: Number | None = None,
    repetition_penalty: Number = 1.0,
    stop: Sequence[Any] = (),
    seed: int = 0,
    chunk: int = 512,
    block: int = 16,
    lookup: int | None = None,
    ngram: int | None = None,
    draft: LanguageModel | None = None,
    draft_tokens: int | None = None,
    draft_cache: str | CachePolicy | None = None,
    cache: str | CachePolicy | None = None,
) -> Iterator[Generation]:
    """Returns an iterator over the new tokens, `block` of each row at a time; see `generate`.

    It ends once every row has stopped. A row that stopped in an earlier block has length 0.
    """
    if not isinstance(model, LanguageModel):
        raise TypeError(f"model is a {type(model).__name__}; expected a LanguageModel")
    counts = {"max_new_tokens": max_new_tokens, "chunk": chunk, "block": block}
    if lookup is not None:
        counts |= {"lookup": lookup, "ngram": NGRAM if ngram is None else ngram}
    elif ngram is not None:
        raise ValueError(f"ngram={ngram!r} has no effect without lookup; expected None, or lookup=NUMBER too")
    if draft is not None:
        counts |= {"draft_tokens": DRAFT if draft_tokens is None else draft_tokens}
        if lookup is not None:
            raise ValueError(f"lookup={lookup} with a draft model: each makes drafts; expected one of them")
    for name, value in (("draft_tokens", draft_tokens), ("draft_cache", draft_cache)):
        if draft is None and value is not None:
            raise ValueError(
                f"{name}={value!r} has no effect without draft; expected None, or a draft model too"
            )
    request = read_request(
        "tokens",
        tokens,
        vocab_size=model.config.input.vocab_size,
        counts=counts,
        stop=stop,
        seed=seed,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    longest = max(map(len, request.given))
    read = longest + max_new_tokens - 1  # the last new token is not read
    table, first = model.config.input.longest, model.config.input.first_position
    if table is not None and read > table:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} after a prompt of {longest} tokens needs {read + first} positions, but max_positions="
            f"{table + first}; expected at most {max(0, table + 1 - longest)} new tokens, or a shorter prompt"
        )
    if lookup is not None and counts["ngram"] > read:
        raise ValueError(
            f"ngram={ngram}; expected at most {read}, as no text here is longer when a draft is looked up"
        )
    policy = FULL if cache is None else read_cache(cache)
    if cache is not None:
        caching.check(model, policy, longest, int(max_new_tokens), filters=True)
        if lookup is not None or draft is not None:
            raise ValueError(
                f"{'draft' if lookup is None else f'lookup={lookup}'} with cache={cache!r}: a draft that fails would have changed "
                "what is kept; expected one of them"
            )
    drafts = None if lookup is None else (None, FULL, int(lookup), int(counts["ngram"]))
    if draft is not None:
        own = FULL if draft_cache is None else read_cache(draft_cache)
        drafting.check(model, draft, own, longest, int(max_new_tokens), cache=draft_cache)
        drafts = draft, own, int(counts["draft_tokens"]), None
    return _blocks(model, request, int(max_new_tokens), int(chunk), int(block), drafts, policy)


def _blocks(
    model: LanguageModel, request: Request, max_new_tokens: int, chunk: int, size: int, drafts, policy
) -> Iterator[Generation]:
    """Yields the new tokens, `size` of each row at a time; with a policy that compresses prompts, first one of each."""
    prompts = request.given
    if policy.filters:
        prompts, policy = filtered(model, prompts, chunk, policy), FULL
    rows, surprise = prefill(model, prompts, max_new_tokens, chunk, policy)
    state, *others = remembering(rows, prompts, request, model.config.input.vocab_size)
    rows = Rows(state, *_beside(model, others))
    if drafts is not None:
        drafter, own, most, ngram = drafts
        history, stands = _beside(model, _history(prompts, max_new_tokens)), None
        if drafter is not None:
            begun, _ = prefill(drafter, prompts, max_new_tokens, chunk, own)
            stands = drafting.Drafting(begun.state, _beside(drafter, jnp.ones(len(prompts), jnp.int32)))
    first, flattened = 1 if policy.compresses else 0, flat(model)
    for start in [*range(first), *range(first, max_new_tokens, size)]:
        some = size if start >= first else 1
        if start == first > 0:
            options = dict(policy=policy, room=max_new_tokens - 1, call=1, surprise=surprise)
            rows = rows._replace(state=caching.compress(model, rows.state, **options))
        given = (request.sampling, request.stops, request.key, start, min(some, max_new_tokens - start))
        if drafts is None:
            rows, new = decode(flattened, rows, *given, size=some)
        else:
            options = dict(size=size, most=most, ngram=ngram)
            made = speculative.decode(model, rows, history, drafter, stands, *given, **options)
            rows, history, stands, new = made
        yield received(new, start)
        if rows.stopped.all():
            return


def _history(prompts: Sequence[np.ndarray], max_new_tokens: int) -> speculative.History:
    """Returns the tokens of the prompts, with room for the new ones."""
    lengths = [len(prompt) for prompt in prompts]
    tokens = np.zeros((len(prompts), _slots(max(lengths) + max_new_tokens)), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    return speculative.History(
        jnp.asarray(tokens), jnp.asarray(lengths, jnp.int32), jnp.ones(len(prompts), jnp.int32)
    )


def _slots(tokens: int) -> int:
    """Returns the number of slots that are made for so many tokens."""
    return -(-tokens // SLOTS) * SLOTS


def prefill(
    model: LanguageModel,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    chunk: int,
    policy: CachePolicy = FULL,
) -> tuple[Rows, Float[Array, "b s"] | None]:
    """Returns the rows after all tokens of their prompts but the last, which the first step reads.

    The second result is -log p of each token of the prompts given those before it, with those of a row in order, as the slots of a
    cache are; None unless the policy needs it.
    """
    count, longest = len(prompts), max(map(len, prompts))
    slots = _slots(longest if policy.compresses else longest + max_new_tokens - 1)
    shared = _shared(prompts) if policy.shares else 0
    given = [prompt[shared:] for prompt in prompts]
    if policy.packs:
        packed = prepacking.pack(prompts)
        state = _initial(model, len(packed.inputs), _slots(packed.inputs.shape[1]), FULL)
        state, _ = _read_all(model, state, packed.inputs, packed.ids, chunk)
        state = prepacking.unpacked(state, packed.row, packed.start, packed.length, slots=slots)
        given = [prompt[-1:] for prompt in prompts]
    elif shared:
        state = _initial(model, 1, slots, FULL)
        state, _ = _read_all(model, state, *_side_by_side([prompts[0][: shared + 1]]), chunk)
        options = dict(policy=policy, tokens=shared, rows=count)
        state = caching.share(model, state, slots=_slots(slots - shared), **options)
    else:
        state = _initial(model, count, slots, policy)
    surprise = np.zeros((count, slots), np.float32) if policy.needs_surprise else None
    following = [np.append(prompt[1:], 0) for prompt in given]
    labels = None if surprise is None else _side_by_side(following)[0]
    state, losses = _read_all(model, state, *_side_by_side(given), chunk, labels)
    for row, prompt in enumerate(prompts if surprise is not None else ()):
        surprise[row, 1 : len(prompt)] = losses[row, losses.shape[1] + 1 - len(prompt) :]
    token = jnp.asarray([prompt[-1] for prompt in prompts], jnp.int32)
    rows = Rows(state, token, jnp.zeros(count, bool), None, None)
    return rows, None if surprise is None else jnp.asarray(surprise)


def filtered(
    model: LanguageModel, prompts: Sequence[np.ndarray], chunk: int, policy: CachePolicy
) -> list[np.ndarray]:
    """Returns the tokens that a policy leaves of each prompt, in their order."""
    state = _initial(model, len(prompts), _slots(max(map(len, prompts))), policy)
    whole = _side_by_side([np.append(prompt, 0) for prompt in prompts])
    state, _ = _read_all(model, state, *whole, chunk, until=policy.layer)
    chosen = np.asarray(caching.chosen(model, state, policy))
    return [prompt[chosen[row, : len(prompt)]] for row, prompt in enumerate(prompts)]


def _shared(prompts: Sequence[np.ndarray]) -> int:
    """Returns the number of tokens that all prompts begin with, without the last token of any."""
    shortest = min(map(len, prompts)) - 1
    begun = np.stack([prompt[:shortest] for prompt in prompts])
    return int(np.cumprod((begun == begun[:1]).all(0)).sum())


def _side_by_side(prompts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens (b, t) and segments of prompts without their last tokens, padded on the left."""
    inputs, ids = np.zeros((2, len(prompts), max(map(len, prompts)) - 1), np.int32)
    for row, prompt in enumerate(prompts):
        inputs[row, inputs.shape[1] + 1 - len(prompt) :] = prompt[:-1]
        ids[row, inputs.shape[1] + 1 - len(prompt) :] = 1
    return inputs, ids


def _read_all(model, state, inputs, ids, chunk, labels=None, until=None):
    """Returns the state after the tokens, and -log p of the labels, which follow them, if there are any.

    With `until`, the state is that of the layers up to this one.
    """
    time = inputs.shape[1]
    # Widths are powers of two up to `chunk`, so that few of them are compiled.
    width = min(chunk, 1 << max(0, time - 1).bit_length())
    more = -time % width
    padding = (0, 0), (more, 0)
    inputs, ids = np.pad(inputs, padding), np.pad(ids, padding)
    labels = None if labels is None else np.pad(labels, padding)
    found = [np.zeros((len(inputs), 0), np.float32)]
    for start in range(0, time, width):
        piece = slice(start, start + width)
        # Without ids, mixers take their faster paths.
        given = inputs[:, piece], state, None if ids[:, piece].all() else ids[:, piece]
        if labels is not None:
            state, loss = _read_with_losses(model, *given, labels[:, piece])
            found.append(np.asarray(loss))
        else:
            state = _read(model, *given, until=until)
    return state, np.concatenate(found, axis=1)


# The parameters are read by nobody, and kept: states lie where the model does, as those of later calls.
@partial(jax.jit, static_argnums=(1, 2, 3), keep_unused=True)
def _initial(model, count, slots, policy):
    return caching.begin(model, policy, count, slots)


@partial(jax.jit, keep_unused=True)
def _beside(model, arrays):
    """Returns arrays on the devices of the model, where steps leave theirs: the first block then runs what later ones run."""
    del model
    return jax.tree.map(jnp.copy, arrays)


@partial(jax.jit, donate_argnums=(2,), static_argnames=("until",))
def _read(model, inputs, state, ids, until=None):
    """Returns the state after a chunk; its logits are not computed, nor layers after `until`, unless they are scanned."""
    after = model.unprojected(inputs, state, segment_ids=ids)[1]
    if until is None:
        return after
    return after._replace(layers=after.layers[: until + 1] + state.layers[until + 1 :])


@partial(jax.jit, donate_argnums=(2,))
def _read_with_losses(model, inputs, state, ids, labels):
    """Returns the state after a chunk, and -log p of the token that follows each."""
    logits, state = model(inputs, state, segment_ids=ids)
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=2)[..., 0]
    return state, jax.nn.logsumexp(logits, axis=2) - chosen
