"""Prompts that ask for what stands far back in a long text: the download-free tasks of RULER, and passkey retrieval.

    passkey            one number in repeated filler (Mohtashami and Jaggi 2023, arXiv:2305.16300)
    niah_single        the code of one name
    niah_multikey      the code of one name among four with codes
    niah_multivalue    all four codes of one name
    niah_multiquery    the codes of four names
    variable_tracking  all five variables that a chain of assignments gives one value
    common_words       the ten words that occur ten times as often as the others
    frequent_words     the three most frequent words of a Zipf-like text

and those of `experiments.data.reasoning_prompts`, which take several facts: qa1, qa2, qa3 and ancestral_trace.

RULER: Hsieh et al. 2024 (arXiv:2404.06654). Structure and scores are RULER's; the wording is ours and plain, so that small
models of bytes can learn it, and scores compare among models here only. Names and words are made of syllables.
"""

import functools
import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence

from experiments.data.prompt_parts import Prompt, among, filler, make_number, make_words, places
from experiments.data.reasoning_prompts import ancestors, rooms

NEEDLES = 4
HOPS = 4  # assignments after the first of a chain
COMMON, COMMON_TIMES, OTHER_TIMES = 10, 30, 3
FREQUENT, EXPONENT = 3, 2.0

Count = Callable[[str], int]


def make_prompts(task: str, *, length: int, count: int, seed: int, tokens: Count) -> list[Prompt]:
    """Returns `count` prompts of a task, the same for equal arguments.

    Args:
      task: name in `TASKS`.
      length: the most tokens of a prompt; it is at least about 0.9 of it.
      seed: seed of the prompts.
      tokens: function that returns the number of tokens of a text.

    Raises:
      ValueError: an unknown task, or the length does not hold its facts and question.
    """
    if task not in TASKS:
        raise ValueError(f"task={task!r} is unknown; available: {', '.join(TASKS)}")
    if count < 1:
        raise ValueError(f"count={count}; expected at least 1")
    return [
        _longest(TASKS[task], task, f"{seed}/{task}/{length}/{number}", length, tokens)
        for number in range(count)
    ]


def score(prompt: Prompt, output: str) -> float:
    """Returns the share of the answers that a continuation contains; if the prompt has labels, all or nothing."""
    if prompt.labels:
        first = output.partition(".")[0]
        return float({label for label in prompt.labels if label in first} == set(prompt.answers))
    return sum(answer in output for answer in prompt.answers) / len(prompt.answers)


def _longest(make, task: str, seed: str, length: int, tokens: Count) -> Prompt:
    """Returns the prompt with the most filler that fits, by bisection; randomness is that of the seed at every size."""

    def at(size: int) -> Prompt:
        return make(random.Random(seed), size)

    if tokens(at(0).text) > length:
        raise ValueError(
            f"length={length}: the shortest prompt of {task} has {tokens(at(0).text)} tokens; expected at least as many"
        )
    most = 1
    while tokens(at(most).text) <= length:
        most *= 2
    least = 0
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if tokens(at(middle).text) <= length else (least, middle)
    return at(least)


def _in_filler(rng: random.Random, facts: Sequence[str], size: int) -> str:
    """The facts at random places among `size` sentences of filler."""
    where = places(rng, facts, size)
    left = list(facts)
    rng.shuffle(left)
    return among(filler(size), left[::-1], where)


def _passkey(rng: random.Random, size: int) -> Prompt:
    key = make_number(rng, 5)
    text = _in_filler(rng, [f"The pass key is {key}. Remember it: {key} is the pass key."], size)
    return Prompt(f"{text} What is the pass key? The pass key is", (key,))


def _needles(rng: random.Random, size: int, *, keys: int, values: int, asked: int) -> Prompt:
    names = make_words(rng, keys)
    codes = {name: [make_number(rng, 7) for _ in range(values)] for name in names}
    facts = [f"The code of {name} is {code}." for name in names for code in codes[name]]
    question = " and ".join(names[:asked])
    answers = tuple(code for name in names[:asked] for code in codes[name])
    text = _in_filler(rng, facts, size)
    many = "codes" if len(answers) > 1 else "code"
    verb = "are" if len(answers) > 1 else "is"
    return Prompt(f"{text} The {many} of {question} {verb}", answers)


def _variables(rng: random.Random, size: int) -> Prompt:
    names = [word.upper() for word in make_words(rng, HOPS + 1)]
    value = make_number(rng, 5)
    chain = [f"VAR {names[0]} = {value}."]
    chain += [f"VAR {name} = VAR {before}." for before, name in itertools.pairwise(names)]
    # A chain is read in order.
    text = among(filler(size), chain, places(rng, chain, size))
    return Prompt(f"{text} The variables with the value {value} are", tuple(names))


def _common(rng: random.Random, size: int) -> Prompt:
    words = make_words(rng, COMMON + size)
    text = words[:COMMON] * COMMON_TIMES + words[COMMON:] * OTHER_TIMES
    rng.shuffle(text)
    return Prompt(f"{' '.join(text)}. The {COMMON} most common words are", tuple(words[:COMMON]))


def _frequent(rng: random.Random, size: int) -> Prompt:
    words = make_words(rng, 50)
    weights = [(rank + 1) ** -EXPONENT for rank in range(len(words))]
    drawn = rng.choices(words, weights, k=size)
    # So many of the first that they are the most frequent ones whatever is drawn, with a clear third.
    counts = Counter(drawn)
    most = max((counts[word] for word in words[FREQUENT:]), default=0)
    for word in words[:FREQUENT]:
        drawn += [word] * max(0, most + 2 - counts[word])
    rng.shuffle(drawn)
    text = " ".join(drawn)
    return Prompt(f"{text}. The {FREQUENT} most frequent words are", tuple(words[:FREQUENT]))


TASKS: dict[str, Callable[[random.Random, int], Prompt]] = {
    "passkey": _passkey,
    "niah_single": lambda rng, size: _needles(rng, size, keys=1, values=1, asked=1),
    "niah_multikey": lambda rng, size: _needles(rng, size, keys=NEEDLES, values=1, asked=1),
    "niah_multivalue": lambda rng, size: _needles(rng, size, keys=1, values=NEEDLES, asked=1),
    "niah_multiquery": lambda rng, size: _needles(rng, size, keys=NEEDLES, values=1, asked=NEEDLES),
    "variable_tracking": _variables,
    "common_words": _common,
    "frequent_words": _frequent,
    "qa1": functools.partial(rooms, supporting=1),
    "qa2": functools.partial(rooms, supporting=2),
    "qa3": functools.partial(rooms, supporting=3),
    "ancestral_trace": functools.partial(ancestors, statements=8),
    "ancestral_trace_32": functools.partial(ancestors, statements=32),
}
