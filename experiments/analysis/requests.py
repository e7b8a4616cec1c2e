"""Answers to the requests of evaluation harnesses: log-likelihoods of texts, and continuations of prompts."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layers.segments import Segments
from seqmodels import LanguageModel, stream

CHUNK = 512  # the most tokens per row and call of the model
NEW_TOKENS = 256  # of a continuation, if a request does not say
BLOCK = 16  # tokens between two looks at the texts
SAMPLING = ("top_k", "top_p", "min_p")
OPTIONS = ("until", "max_gen_toks", "do_sample", "temperature", "repetition_penalty", *SAMPLING)


class Requests:
    """A language model with its tokenizer, as evaluation harnesses ask it.

    Attributes:
      limit: the most tokens that the model reads of a text; None for any number.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Any,
        *,
        prefix: Sequence[int],
        batch: int = 8,
        limit: int | None = None,
    ):
        """Asks the model nothing yet.

        Args:
          tokenizer: has `end`, `encode` and `decode`.
          prefix: tokens that stand before a text whose first token is predicted, at least one.
          batch: number of texts that are read at once.
          limit: the most tokens that are read of a text; by default the model's `max_positions`, if it has such a table.

        Raises:
          ValueError: `limit` exceeds the table of positions.
        """
        table = model.config.input.longest
        if limit is not None and table is not None and limit > table:
            raise ValueError(
                f"max_length={limit}, but the model has max_positions={model.config.input.max_positions}; expected at most {table}"
            )
        self._model, self._tokenizer, self._batch = model, tokenizer, batch
        self._prefix = [int(token) for token in prefix]
        self.limit = table if limit is None else limit

    def loglikelihood(self, pairs: Iterable[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Returns for each context and continuation log P(continuation | context), and whether greedy decoding gives it.

        Spaces at the end of a context belong to the continuation, whose tokens are those that both together have beyond those of
        the context. A context that is longer than the limit loses its beginning.

        Raises:
          ValueError: a continuation is longer than the limit.
          FloatingPointError: a logit is not finite.
        """
        rows = []
        for context, continuation in pairs:
            kept = context.rstrip()
            continuation = context[len(kept) :] + continuation
            known = self._encode(kept) if kept else self._prefix
            tokens = self._encode(kept + continuation)[len(known) :] if kept else self._encode(continuation)
            if self.limit is not None and len(tokens) > self.limit:
                raise ValueError(
                    f"a continuation has {len(tokens)} tokens, and the model reads at most {self.limit}; expected at most that"
                )
            room = len(known) if self.limit is None else self.limit + 1 - len(tokens)
            known = known[max(0, len(known) - room) :]
            rows.append((known + tokens, len(known)))
        return self._scores(rows)

    def loglikelihood_rolling(self, texts: Iterable[str]) -> list[float]:
        """Returns log P(text) for each, every token given all before it, or as many of them as the limit allows."""
        windows, owners = [], []
        texts = list(texts)
        for number, text in enumerate(texts):
            tokens = [*self._prefix, *self._encode(text)]
            first, size = len(self._prefix), self.limit or len(tokens)
            while first < len(tokens):
                stop = min(len(tokens), first + size)
                windows.append((tokens[max(0, stop - 1 - size) : stop], stop - first))
                owners.append(number)
                first = stop
        rows = [(window, len(window) - predicted) for window, predicted in windows]
        sums = np.zeros(len(texts))
        np.add.at(sums, owners, [score for score, _ in self._scores(rows)])
        return sums.tolist()

    def generate_until(self, requests: Iterable[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """Returns for each prompt the text with which the model continues it, up to a stop.

        Args:
          requests: prompts with options: "until", texts before the first of which a continuation ends; "max_gen_toks";
            "do_sample"; and "temperature", "top_k", "top_p", "min_p" and "repetition_penalty" of `seqmodels.generate`. Without
            "do_sample" or a positive "temperature", continuations are greedy.

        Raises:
          ValueError: there is no such option, or its value is invalid.
        """
        requests = [(prompt, _settings(options)) for prompt, options in requests]
        answers = [""] * len(requests)
        order = sorted(range(len(requests)), key=lambda at: (repr(requests[at][1]), len(requests[at][0])))
        while order:
            stops, settings = requests[order[0]][1]
            group = [at for at in order[: self._batch] if requests[at][1] == (stops, settings)]
            order = order[len(group) :]
            prompts = [self._prompt(requests[at][0], settings["max_new_tokens"]) for at in group]
            for at, text in zip(group, self._continued(prompts, stops, settings), strict=True):
                answers[at] = text
        return answers

    def _encode(self, text: str) -> list[int]:
        return [int(token) for token in self._tokenizer.encode(text)]

    def _prompt(self, text: str, new: int) -> list[int]:
        tokens = self._encode(text) or self._prefix
        if self.limit is None:
            return tokens
        if new > self.limit:
            raise ValueError(
                f"max_gen_toks={new}, and the model reads at most {self.limit} tokens; expected at most that"
            )
        return tokens[max(0, len(tokens) - (self.limit + 1 - new)) :]

    def _continued(
        self, prompts: list[list[int]], stops: Sequence[str], settings: Mapping[str, Any]
    ) -> list[str]:
        ids: list[list[int]] = [[] for _ in prompts]
        done = [False] * len(prompts)
        texts = [""] * len(prompts)
        blocks = stream(self._model, prompts, stop=[[self._tokenizer.end]], block=BLOCK, **settings)
        for block in blocks:
            for row, (tokens, count) in enumerate(zip(block.tokens, block.lengths, strict=True)):
                if done[row]:
                    continue
                ids[row] += [int(token) for token in tokens[:count] if token != self._tokenizer.end]
                text = self._tokenizer.decode(np.asarray(ids[row], np.int32))
                places = [place for stop in stops if (place := text.find(stop)) >= 0]
                done[row] = bool(places)
                texts[row] = text[: min(places)] if places else text
            if all(done):
                break
        return texts

    def _scores(self, rows: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """Returns the sum of the log-probabilities of tokens, and whether all are the most probable ones.

        Args:
          rows: tokens, and the number of those at the start that are not predicted, at least one.
        """
        found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        order = sorted(range(len(rows)), key=lambda at: -len(rows[at][0]))
        for start in range(0, len(order), self._batch):
            group = order[start : start + self._batch]
            # Rows that fill the last group repeat one, so that no other batch size is compiled.
            filled = [rows[at] for at in group] + [rows[group[0]]] * (self._batch - len(group))
            chances, likeliest = self._read([tokens for tokens, _ in filled])
            for row, at in enumerate(group):
                tokens, known = rows[at]
                piece = slice(known - 1, len(tokens) - 1)
                total = float(chances[row, piece].sum(dtype=np.float64))
                if not np.isfinite(total):
                    raise FloatingPointError(
                        f"the logits of a text of {len(tokens)} tokens are not finite: it is longer than a mixer's max_length, "
                        "or the parameters are not finite"
                    )
                found[at] = (total, bool(likeliest[row, piece].all()))
        return found

    def _read(self, rows: Sequence[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the log-probability of the token after each, and whether it is the most probable one."""
        longest = max(max(len(tokens) - 1 for tokens in rows), 1)
        width = min(CHUNK, 1 << (longest - 1).bit_length())
        time = -(-longest // width) * width
        inputs, labels, ids = np.zeros((3, len(rows), time), np.int32)
        for row, tokens in enumerate(rows):
            count = len(tokens) - 1
            inputs[row, :count], labels[row, :count], ids[row, :count] = tokens[:-1], tokens[1:], 1
        # A power of two, so that few sizes of caches are compiled.
        state = _initial(self._model, len(rows), 1 << (time - 1).bit_length())
        found = []
        for start in range(0, time, width):
            piece = slice(start, start + width)
            *scores, state = _score(self._model, inputs[:, piece], labels[:, piece], ids[:, piece], state)
            found.append([np.asarray(array) for array in scores])
        chances, likeliest = (np.concatenate(arrays, axis=1) for arrays in zip(*found, strict=True))
        return chances, likeliest


@functools.partial(jax.jit, static_argnums=(1, 2))
def _initial(model, rows, slots):
    return model.init_state(rows, max_length=slots)


@functools.partial(jax.jit, donate_argnums=(4,))
def _score(model, inputs, labels, ids, state):
    logits, state = model(inputs, state, segment_ids=Segments.of(ids, padding="end", packed=False))
    chances = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), labels[..., None], axis=-1)[..., 0]
    return chances, jnp.argmax(logits, axis=-1) == labels, state


def _settings(options: Mapping[str, Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Returns the stops and the arguments of `stream` of a request."""
    if unknown := sorted(set(options) - set(OPTIONS)):
        raise ValueError(f"generation has the option {unknown[0]!r}; expected {', '.join(OPTIONS)}")
    until = options.get("until") or ()
    stops = (until,) if isinstance(until, str) else tuple(until)
    temperature = options.get("temperature")
    sampled = options.get("do_sample", bool(temperature))
    settings: dict[str, Any] = dict(
        max_new_tokens=int(options.get("max_gen_toks", NEW_TOKENS)), temperature=0.0
    )
    if sampled:
        settings["temperature"] = 1.0 if temperature is None else float(temperature)
        settings |= {name: options[name] for name in SAMPLING if options.get(name) is not None}
    if "repetition_penalty" in options:
        settings["repetition_penalty"] = options["repetition_penalty"]
    return tuple(stop for stop in stops if stop), settings
