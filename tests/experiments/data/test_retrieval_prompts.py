"""Prompts of retrieval: lengths, answers that the text determines, and scores."""

import itertools
import random
import re
from collections import Counter

import pytest

from experiments.data.prompt_parts import Prompt, background
from experiments.data.reasoning_prompts import question
from experiments.data.retrieval_prompts import TASKS, make_prompts, score

LENGTHS = {"common_words": 4000, "ancestral_trace_32": 3000}


def prompts(task, length=None, count=3, seed=0):
    length = length or LENGTHS.get(task, 1500)
    return make_prompts(task, length=length, count=count, seed=seed, tokens=len)


@pytest.mark.parametrize("task", TASKS)
def test_prompts_fill_their_length_and_depend_on_the_seed_alone(task):
    found = prompts(task)
    length = LENGTHS.get(task, 1500)
    assert all(0.9 * length <= len(prompt.text) <= length for prompt in found)
    assert found == prompts(task)
    assert not set(found) & set(prompts(task, seed=1))
    assert len(set(found)) == 3
    with pytest.raises(ValueError, match=rf"length=5: the shortest prompt of {task} has \d+ tokens"):
        prompts(task, length=5)


EVENT = re.compile(
    r"(Mary|John|Daniel|Sandra) (?:(?:moved|went|journeyed|travelled) to the (\w+)|"
    r"(?:took|picked up|got) the (\w+)|(?:dropped|put down|left) the (\w+))\."
)


def replay(text):
    """The rooms of persons and of things, one after the other, from the events of a text."""
    at, carried, rooms = {}, {}, {}
    for person, room, taken, dropped in EVENT.findall(text):
        if room:
            assert at.get(person) != room
            at[person] = room
            for thing in [thing for thing, by in carried.items() if by == person]:
                rooms[thing].append(room)
        elif taken:
            assert taken not in carried
            # A thing of which something was said is taken where it was left.
            assert rooms.setdefault(taken, [at[person]])[-1] == at[person]
            carried[taken] = person
        else:
            assert carried.pop(dropped) == person
    return at, rooms


def ancestor(text):
    """The name that a walk along the statements leads to."""
    is_of = re.findall(r"(\w+) is the (\w+) of (\w+)\.", text)
    has_as = [(old, term, young) for young, old, term in re.findall(r"(\w+) has (\w+) as (\w+)\.", text)]
    called = [
        (old, term, young) for term, young, old in re.findall(r"The (\w+) of (\w+) is called (\w+)\.", text)
    ]
    above = {young: (old, 2 if "grand" in term else 1) for old, term, young in is_of + has_as + called}
    name, left = re.search(r"The ancestor of (\w+) by (\d+) generations? is$", text).groups()
    # Neither end of the chain is asked about, or asked for.
    olds = {old for old, _ in above.values()}
    assert name in olds
    left = int(left)
    while left > 0:
        name, by = above[name]
        left -= by
    assert left == 0
    assert name in above
    return name


def solve(task, text):
    """The answers by reading the text."""
    if task.startswith("ancestral"):
        return [ancestor(text)]
    if task.startswith("qa"):
        at, rooms = replay(text)
        if task == "qa1":
            return [at[re.search(r"Where is (\w+)\?", text)[1]]]
        if task == "qa2":
            return [rooms[re.search(r"Where is the (\w+)\?", text)[1]][-1]]
        thing, room = re.search(r"Where was the (\w+) before the (\w+)\?", text).groups()
        assert rooms[thing].count(room) == 1
        return [rooms[thing][rooms[thing].index(room) - 1]]
    if task == "passkey":
        return [re.search(r"The pass key is (\d+)", text)[1]]
    if task.startswith("niah"):
        question = re.search(r"The codes? of ([a-z ]+) (?:is|are)$", text)[1]
        return [
            code
            for name in question.split(" and ")
            for code in re.findall(rf"The code of {name} is (\d+)", text)
        ]
    if task == "variable_tracking":
        value = re.search(r"with the value (\d+) are$", text)[1]
        known = {}
        for name, source in re.findall(r"VAR ([A-Z]+) = (?:VAR )?([A-Z]+|\d+)\.", text):
            known[name] = known.get(source, source)
        return [name for name, found in known.items() if found == value]
    body, question = text.split(". The ")
    words = Counter(body.split()).most_common(int(question.split()[0]) + 1)
    assert words[-2][1] > words[-1][1]
    return [word for word, _ in words[:-1]]


@pytest.mark.parametrize("task", TASKS)
def test_the_text_determines_the_answers(task):
    for prompt in prompts(task):
        assert sorted(solve(task, prompt.text)) == sorted(prompt.answers)
        assert score(prompt, f"x {' and '.join(prompt.answers)}.") == 1


@pytest.mark.parametrize("task", ["qa1", "qa2", "qa3", "ancestral_trace"])
def test_answers_take_reasoning(task):
    """Answers differ, stories have distractors, and the last fact alone does not tell."""
    found = prompts(task, length=900, count=20)
    last = 0
    for prompt in found:
        (answer,) = solve(task, prompt.text)
        assert prompt.answers == (answer,)
        assert answer in prompt.labels
        named = re.findall("|".join(prompt.labels), prompt.text.partition("?")[0])
        last += named[-1] == answer
        if task != "ancestral_trace":
            assert 2 <= len(EVENT.findall(prompt.text)) <= 10
            assert not set(re.findall(r"\w+", prompt.text.rpartition("?")[0].rpartition(".")[2])) & set(
                prompt.labels
            )
    assert len({prompt.answers for prompt in found}) >= 5
    assert last < 15


@pytest.mark.parametrize("supporting", [1, 2, 3])
def test_stories_are_possible(supporting):
    for seed in range(300):
        facts, asked, answer, _ = question(random.Random(seed), supporting)
        assert solve(f"qa{supporting}", f"{' '.join(facts)} {asked}") == [answer]


def test_the_background_is_a_markov_chain():
    sentences = background(random.Random(0), 3000)
    assert all(10 <= len(sentence.split()) <= 14 for sentence in sentences)
    text = re.findall("[a-z]+", " ".join(sentences).lower())
    following = {}
    for word, after in itertools.pairwise(text):
        following.setdefault(word, set()).add(after)
    assert {len(after) for after in following.values()} == {5}
    assert background(random.Random(0), 20) == sentences[:20]


def test_needles_stand_everywhere():
    places = [p.text.index("The pass key") / len(p.text) for p in prompts("passkey", count=60)]
    assert min(places) < 0.2
    assert max(places) > 0.7


def test_scores_and_refusals():
    assert score(Prompt("", ("12", "34", "56", "78")), "34, 12") == 0.5
    labelled = Prompt("", ("office",), ("office", "garden"))
    for output, expected in {
        " office. Then the garden.": 1.0,
        " office or garden.": 0.0,
        " garden.": 0.0,
        " kitchen.": 0.0,
    }.items():
        assert score(labelled, output) == expected
    with pytest.raises(ValueError, match="task='niah' is unknown; available: passkey"):
        prompts("niah")
    with pytest.raises(ValueError, match="count=0; expected at least 1"):
        prompts("passkey", count=0)
