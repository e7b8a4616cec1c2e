"""What prompts with facts far back are made of: made-up words, numbers, filler, and facts among its sentences."""

import random
from collections.abc import Sequence
from typing import NamedTuple

FILLER = (
    "The grass is green and the sky is blue.",
    "The sun goes up and the sun goes down.",
    "Here we go, and there and back again.",
)
SYLLABLES = tuple(first + last for first in "bdfgklmnprstvz" for last in ("a", "e", "i", "o", "u"))
# Of the background: words, those that may follow one, and the fewest and most words of a sentence.
VOCABULARY, SUCCESSORS, SENTENCE = 200, 5, (10, 14)


class Prompt(NamedTuple):
    """A prompt and what its continuation should hold.

    Attributes:
      text: the prompt.
      answers: strings that a right continuation contains.
      labels: if there are any, strings of which its first sentence contains the answers alone.
    """

    text: str
    answers: tuple[str, ...]
    labels: tuple[str, ...] = ()


def make_words(rng: random.Random, count: int) -> list[str]:
    """Returns different words, none part of another, as all have six letters."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choices(SYLLABLES, k=3))] = None
    return list(found)


def make_number(rng: random.Random, digits: int) -> str:
    """Returns a uniform number with so many digits."""
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def filler(size: int) -> list[str]:
    """Returns so many sentences, which repeat."""
    return [FILLER[place % len(FILLER)] for place in range(size)]


def background(rng: random.Random, size: int) -> list[str]:
    """Returns so many sentences of a Markov chain of made-up words, each of which has a few that may follow it."""
    vocabulary = make_words(rng, VOCABULARY)
    following = {word: rng.sample(vocabulary, SUCCESSORS) for word in vocabulary}
    sentences, word = [], vocabulary[0]
    for _ in range(size):
        sentence = []
        for _ in range(rng.randint(*SENTENCE)):
            word = rng.choice(following[word])
            sentence.append(word)
        sentences.append(f"{' '.join(sentence).capitalize()}.")
    return sentences


def places(rng: random.Random, facts: Sequence[str], size: int) -> list[int]:
    """Returns a place for each fact among `size` sentences, uniform and in order, so that facts keep theirs."""
    return sorted(rng.randrange(size + 1) for _ in facts)


def among(sentences: Sequence[str], facts: Sequence[str], where: Sequence[int]) -> str:
    """Returns a text of sentences, with facts before those whose numbers are given in order."""
    lines, left = [], list(zip(where, facts, strict=True))
    for place in range(len(sentences) + 1):
        while left and left[0][0] == place:
            lines.append(left.pop(0)[1])
        lines.extend(sentences[place : place + 1])
    return " ".join(lines)
