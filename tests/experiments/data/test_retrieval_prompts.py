"""Prompts of retrieval: lengths, answers that the text determines, and scores."""

import re
from collections import Counter

import pytest

from experiments.data.retrieval_prompts import TASKS, Prompt, make_prompts, score

LENGTHS = {"common_words": 4000}


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


def solve(task, text):
    """The answers by reading the text."""
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


def test_needles_stand_everywhere():
    places = [p.text.index("The pass key") / len(p.text) for p in prompts("passkey", count=60)]
    assert min(places) < 0.2
    assert max(places) > 0.7


def test_scores_and_refusals():
    assert score(Prompt("", ("12", "34", "56", "78")), "34, 12") == 0.5
    with pytest.raises(ValueError, match="task='niah' is unknown; available: passkey"):
        prompts("niah")
    with pytest.raises(ValueError, match="count=0; expected at least 1"):
        prompts("passkey", count=0)
